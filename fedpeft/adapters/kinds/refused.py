"""What PEFT has and a run cannot train, by PEFT's name, and why."""

from __future__ import annotations

REFUSED = {
    "poly": "it mixes skills by the number of a row's task, and rows here carry none; use lora",
    "xlora": "it gates LoRA adapters that were trained before, which PEFT loads from a folder of each site; use lora",
    "lily": "its layers share matrices through a router that looks at the inputs, so no update of a weight exists; use "
    "vblora",
    "frod": "half of its basis are eigenvectors that PEFT computes anew wherever it loads, and they come out otherwise "
    "with another number of threads: what a run saves would not be what it scored; use psoft",
    "shadow": "it runs a second network beside the model, and changes none of its layers; use lora",
    "mixed": "it is a container of several adapters and no kind of its own; name one of them",
    "trainable_tokens": "it trains rows of the model's own embeddings for tokens that were added, and a run adds none; "
    "use prompt-tuning",
    "cpt": "it needs one fixed context of examples as token ids, with a type for every token; use prompt-tuning",
    "multitask_prompt_tuning": "it needs the number of a row's task, and rows here carry none; use prompt-tuning",
    "adaption_prompt": "PEFT knows it for the attention of a few language models alone, and saves no head with it; use "
    "prefix-tuning",
    "cartridge": "it begins at the keys and values of a text, which every site would have to have; use prefix-tuning",
}

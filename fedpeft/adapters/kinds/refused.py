"""What PEFT has and a run cannot train, by PEFT's name, and why."""

from __future__ import annotations

REFUSED = {
    "poly": "it mixes skills by a task's number, which every row would have to carry, and no task here has one; use lora",
    "xlora": "it gates LoRA adapters that were trained before, and PEFT loads those from a folder of each site; use lora, "
    "and `fedpeft merge` for adapters that you have",
    "lily": "its layers share matrices through a router that looks at the inputs, so that no update of a weight exists "
    "which could be compared, merged or exported; use vblora",
    "shadow": "it runs a second network beside the model and not inside its layers, so that nothing can be averaged layer "
    "by layer or merged; use lora",
    "mixed": "it is a container of several adapters and no kind of its own; name one of them",
    "trainable_tokens": "it trains rows of the model's own embeddings for tokens that were added, and a run adds none; "
    "use prompt-tuning",
    "cpt": "it needs one fixed context of examples as token ids, with a type for every token; use prompt-tuning",
    "multitask_prompt_tuning": "it needs a task's number with every row, and no task here has one; use prompt-tuning",
    "adaption_prompt": "PEFT knows it for the attention of a few language models alone, and saves no head with it; use "
    "prefix-tuning",
    "cartridge": "it begins at the keys and values of a text, which every site would have to have; use prefix-tuning",
}

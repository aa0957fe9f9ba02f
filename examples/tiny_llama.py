"""A language model to try things out with in seconds and without a hub: a tiny Llama that is taught capitals.

    python examples/tiny_llama.py
    cd capitals && fedpeft simulate run.toml --strategy fedit --out runs/capitals

The first writes a base, rows, a task for lm-eval and settings into the folder ``capitals``.
"""

from __future__ import annotations

import json
from pathlib import Path

from fedpeft.chatter import silence

silence()

import torch  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402
from transformers.utils.logging import disable_progress_bar  # noqa: E402

CAPITALS = {
    "Europe": "France Paris Italy Rome Spain Madrid Norway Oslo Poland Warsaw Greece Athens Austria Vienna Latvia Riga",
    "Asia": "Japan Tokyo China Beijing Nepal Kathmandu Iran Tehran Iraq Baghdad Syria Damascus Oman Muscat Qatar Doha",
    "Africa": "Egypt Cairo Kenya Nairobi Ghana Accra Mali Bamako Niger Niamey Angola Luanda Chad Ndjamena Togo Lome",
}
TEMPLATE = (
    "{% for turn in messages %}<|{{ turn['role'] }}|> {{ turn['content'] }} <|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)
TASK = """\
task: capitals
dataset_path: json
dataset_kwargs:
  data_files:
    test: rows.jsonl
test_split: test
output_type: generate_until
doc_to_text: "<|user|> {{messages[0].content}} <|end|> <|assistant|>"
doc_to_target: "{{messages[1].content}}"
generation_kwargs:
  until: ["<|end|>"]
  max_gen_toks: 4
  do_sample: false
metric_list:
  - metric: exact_match
"""
SETTINGS = """\
[model]
name = "llama"

[data]
source = "rows.jsonl"
test = "rows.jsonl"
domain = "continent"
metric = "exact_match,choice_likelihood"
max_new_tokens = 4

[partition]
by = "continent"

[adapter]
rank = 16
alpha = 32
targets = ["all-linear"]

[train]
local_steps = 10
batch_size = 8
learning_rate = 5e-3

[federation]
rounds = 8

[run]
evaluate_every = 4
generate = 2

[simulation]
workers = 0
"""


def write_rows(path: Path) -> list[str]:
    """Write a conversation for each country, and return all words in them."""
    words = ["What", "is", "the", "capital", "of", "?"]
    with path.open("w", encoding="utf-8") as file:
        for continent, names in CAPITALS.items():
            pairs = names.split()
            words += pairs
            for country, capital in zip(pairs[::2], pairs[1::2], strict=True):
                asked = {"role": "user", "content": f"What is the capital of {country} ?"}
                row = {"messages": [asked, {"role": "assistant", "content": capital}], "continent": continent}
                file.write(json.dumps(row) + "\n")
    return words


def write_base(folder: Path, words: list[str]) -> None:
    """Write a Llama of random weights that knows these words."""
    special = ["<|pad|>", "<|unknown|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    vocabulary = {word: index for index, word in enumerate([*special, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unknown|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<|unknown|>",
        pad_token="<|pad|>",
        eos_token="<|end|>",
        additional_special_tokens=special[3:],
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
        max_position_embeddings=64,
        initializer_range=0.3,  # large, so that an adapter finds features that tell words apart
        pad_token_id=0,
        eos_token_id=2,
        bos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def main() -> None:
    """Write everything, and say what to type next."""
    disable_progress_bar()
    folder = Path("capitals")
    folder.mkdir(exist_ok=True)
    write_base(folder / "llama", write_rows(folder / "rows.jsonl"))
    (folder / "capitals.yaml").write_text(TASK, encoding="utf-8")
    (folder / "run.toml").write_text(SETTINGS, encoding="utf-8")
    print("next: cd capitals && fedpeft simulate run.toml --strategy fedit --out runs/capitals")


if __name__ == "__main__":
    main()

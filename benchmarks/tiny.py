"""A model and rows too small to learn anything from, for measuring what is not learning."""

from __future__ import annotations

import random
from pathlib import Path

WORDS = [f"w{index}" for index in range(60)]
LABELS = ("first", "second")


def write_model(folder: Path, hidden: int = 64) -> Path:
    """Write a BERT of two layers with a tokenizer of sixty words."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    BertModel(
        BertConfig(
            vocab_size=len(WORDS) + 2,
            hidden_size=hidden,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=2 * hidden,
            max_position_embeddings=128,
        )
    ).save_pretrained(folder)
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(folder)
    return folder


def write_rows(folder: Path, train: int, test: int = 16, words: int = 16) -> Path:
    """Write rows of so many words, whose label says which half of the words they are of."""
    import datasets

    datasets.disable_progress_bars()
    draw = random.Random(0)
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=list(LABELS))})
    splits = {}
    for name, count in (("train", train), ("test", test)):
        labels = [index % 2 for index in range(count)]
        texts = [" ".join(draw.choices(WORDS[30 * label : 30 * label + 30], k=words)) for label in labels]
        splits[name] = datasets.Dataset.from_dict({"text": texts, "label": labels}, features=features)
    datasets.DatasetDict(splits).save_to_disk(folder)
    return folder

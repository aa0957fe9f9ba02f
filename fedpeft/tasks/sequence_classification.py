"""One of several labels for each text, or for each pair of texts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fedpeft.data.columns import Column
from fedpeft.tasks.losses import label_losses, most_likely
from fedpeft.tasks.task import Task

if TYPE_CHECKING:
    import datasets

    from fedpeft.bases import Inputs
    from fedpeft.config import RunConfig
    from fedpeft.data.readers import Place
    from fedpeft.data.splits import Encoding


def encode(config: RunConfig, model_dir: Path, inputs: Inputs, place: Place, rows: datasets.Dataset) -> Encoding:
    """Tokenise each text, or both of a pair together."""
    from fedpeft.data.tokens import encode_texts

    return encode_texts(config, model_dir, inputs, place, rows)


TASK = Task(
    name="sequence-classification",
    auto="AutoModelForSequenceClassification",
    peft="SEQ_CLS",
    columns=(Column("text", "text"), Column("text_pair", "text", optional=True), Column("label", "label")),
    encode=encode,
    losses=label_losses,
    predict=most_likely,
    metrics=("accuracy", "macro_f1"),
    reads_last_token=True,  # as Llama-like classifiers do
)

"""One of several labels for each text, or for each pair of texts."""

from __future__ import annotations

from fedpeft.data.columns import Column
from fedpeft.tasks.inputs import texts
from fedpeft.tasks.losses import label_losses, most_likely
from fedpeft.tasks.task import Task

TASK = Task(
    name="sequence-classification",
    auto="AutoModelForSequenceClassification",
    peft="SEQ_CLS",
    columns=(Column("text", "text"), Column("text_pair", "text", optional=True), Column("label", "label")),
    encode=texts,
    losses=label_losses,
    predict=most_likely,
    metrics=("accuracy", "macro_f1"),
    reads_last_token=True,  # as Llama-like classifiers do
)

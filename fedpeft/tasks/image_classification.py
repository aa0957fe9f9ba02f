"""One of several labels for each image."""

from __future__ import annotations

from fedpeft.data.columns import Column
from fedpeft.tasks.inputs import images
from fedpeft.tasks.losses import label_losses, most_likely
from fedpeft.tasks.task import Task

TASK = Task(
    name="image-classification",
    auto="AutoModelForImageClassification",
    peft=None,
    columns=(Column("image", "image"), Column("label", "label")),
    encode=images,
    losses=label_losses,
    predict=most_likely,
    metrics=("accuracy", "macro_f1"),
    spoken_by=("image",),
)

"""One of several labels for each image."""

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
    """Bring each image to the model's size."""
    from fedpeft.data.pixels import encode_images

    return encode_images(config, model_dir, inputs, place, rows)


TASK = Task(
    name="image-classification",
    auto="AutoModelForImageClassification",
    peft=None,
    columns=(Column("image", "image"), Column("label", "label")),
    encode=encode,
    losses=label_losses,
    predict=most_likely,
    metrics=("accuracy", "macro_f1"),
    spoken_by="image",
)

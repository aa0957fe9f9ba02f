"""How rows become a model's inputs, without loading what that takes before there are rows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import datasets

    from fedpeft.bases import Inputs
    from fedpeft.config import RunConfig
    from fedpeft.data.readers import Place
    from fedpeft.data.splits import Encoding


def texts(config: RunConfig, model_dir: Path, inputs: Inputs, place: Place, rows: datasets.Dataset) -> Encoding:
    """Tokenise a text, or a pair of texts together; see `encode_texts`."""
    from fedpeft.data.tokens import encode_texts

    return encode_texts(config, model_dir, inputs, place, rows)


def conversations(config: RunConfig, model_dir: Path, inputs: Inputs, place: Place, rows: datasets.Dataset) -> Encoding:
    """Tokenise turns by the chat template, or a raw text; see `encode_conversations`."""
    from fedpeft.data.exchanges import encode_conversations

    return encode_conversations(config, model_dir, inputs, place, rows)


def images(config: RunConfig, model_dir: Path, inputs: Inputs, place: Place, rows: datasets.Dataset) -> Encoding:
    """Bring an image to the model's size; see `encode_images`."""
    from fedpeft.data.pixels import encode_images

    return encode_images(config, model_dir, inputs, place, rows)

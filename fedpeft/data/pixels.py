"""Images as pixels: opened, brought to the model's size, kept in 8 bits where the model's processor allows it."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import torch
from torch import Tensor

from fedpeft.bases import Inputs, first_line
from fedpeft.config import RunConfig
from fedpeft.data.formats.images import listed
from fedpeft.data.readers import Place, plain_batches
from fedpeft.data.splits import EncodedSplit, Encoding, Normalisation
from fedpeft.errors import DataError, ModelError

BATCH_ROWS = 64
MODES = {1: "L", 3: "RGB"}  # of images, by the model's channels
# what the library's decoders raise at damaged files of one kind or another
UNREADABLE: tuple[type[Exception], ...] = (
    *(OSError, ValueError, SyntaxError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError),
    *(EOFError, struct.error, zlib.error, PIL.Image.DecompressionBombError),
)


class BrokenImageError(DataError):
    """An image that cannot be opened, or not to its end."""


def encode_images(config: RunConfig, model_dir: Path, inputs: Inputs, place: Place, rows: datasets.Dataset) -> Encoding:
    """Bring all images of a place to a model's size, once they are written.

    Parameters
    ----------
    config, model_dir, place, rows
        As for `ImageEncoder`, which says what is raised.
    inputs : Inputs
        What the model can be given.
    """
    images = ImageEncoder(config, model_dir, inputs.channels, place, rows)
    return Encoding({}, normalisation=images.normalisation, write_pixels=images.write)


class ImageEncoder:
    """What brings the images of one place to a model's size.

    Parameters
    ----------
    config : RunConfig
        Says whether code of the model's folder may run.
    model_dir : Path
        Folder of the image processor.
    channels : int
        Of the model's images.
    place : Place
        Where the rows lie, for messages.
    rows : datasets.Dataset
        Normalised rows.

    Raises
    ------
    ModelError
        There is no image processor, or it fails.
    DataError
        An image cannot be read.
    """

    normalisation: Normalisation | None

    def __init__(self, config: RunConfig, model_dir: Path, channels: int, place: Place, rows: datasets.Dataset) -> None:
        self._place, self._rows = place, rows
        self._processor, self._mode = load_processor(config, model_dir, channels)
        first = next(plain_batches(rows, BATCH_ROWS))
        self.normalisation = _find_normalisation(self._processor, self._decoded(first))

    def write(self, path: Path) -> None:
        """Write all images as the tensor ``pixels``, a few at a time, since all of them may not fit in memory.

        Raises
        ------
        DataError
            An image cannot be read, or the processor gives images of different sizes.
        """
        raw = self.normalisation is not None
        chunks = (
            preprocess(self._processor, self._decoded(batch), raw=raw)
            for batch in plain_batches(self._rows, BATCH_ROWS)
        )
        try:
            write_pixels(path, chunks, len(self._rows))
        except ValueError as error:
            raise DataError(
                f"the images of {self._place}: {error}. Give the model's processor one size or a crop."
            ) from None

    def _decoded(self, batch: Mapping[str, list[Any]]) -> list[Any]:
        """Open a few images; where one is broken, look for all that are before saying so."""
        try:
            return decode(self._place, batch, self._mode)
        except BrokenImageError:
            raise broken_images(self._place, self._rows) from None


def broken_images(place: Place, rows: datasets.Dataset) -> DataError:
    """Return the error that names the first few images that cannot be read, and counts all of them."""
    found: list[int] = []
    names: list[str] = []
    why = ""
    for batch in plain_batches(rows, BATCH_ROWS):
        for row, stored in zip(batch["row"], batch["image"], strict=True):
            try:
                _opened(stored)
            except UNREADABLE as error:
                found.append(row)
                why = why or _reason(error)
                names += [stored["path"]] if stored.get("path") else []
    more = f" and {len(found) - 1} more hold" if len(found) > 1 else " holds"
    named = f" ({listed([Path(name) for name in names], place.path.resolve())})" if names and place.path else ""
    return DataError(
        f"{place.row(found[0])}{more} no image that can be read{named}: {why}. Replace or remove what is broken."
    )


def _opened(stored: Any) -> Any:
    return datasets.Image().decode_example(stored)


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def load_processor(config: RunConfig, model_dir: Path, channels: int) -> tuple[Any, str]:
    """Load a base's image processor, and say how images are to be opened for it.

    A processor for another number of channels is brought to the model's where that changes no value: grey images are
    not made colour ones, and one mean that all channels share is that of any number of them.

    Raises
    ------
    ModelError
        There is no processor, or it cannot make images of so many channels.
    """
    import transformers

    if channels not in MODES:
        raise ModelError(
            f"'{model_dir}' reads images of {channels} channels (num_channels). Files of images have 1 or 3: take a "
            "model for one of these."
        )
    try:
        # one backend everywhere: torchvision's, where that is installed, resizes to other values
        processor = transformers.AutoImageProcessor.from_pretrained(
            model_dir, local_files_only=True, backend="pil", trust_remote_code=config.model.trust_remote_code
        )
    except Exception as error:  # files of another processor make its code raise whatever it likes
        raise ModelError(
            f"'{model_dir}' has no image processor that can be loaded ({first_line(error)}). Save one there with "
            "save_pretrained."
        ) from error
    if channels == 1 and getattr(processor, "do_convert_rgb", None):
        processor.do_convert_rgb = False
    for name in ("image_mean", "image_std") if getattr(processor, "do_normalize", False) else ():
        values = np.atleast_1d(getattr(processor, name)).tolist()
        if name == "image_std" and 0 in values:
            raise ModelError(f"the image processor in '{model_dir}' divides by image_std = {values}: none may be 0.")
        if len(values) != channels and None not in values:
            if len(set(values)) > 1:
                raise ModelError(
                    f"the image processor in '{model_dir}' has {len(values)} different values of {name}, {values}, but "
                    f"the model reads images of {channels} channel{'s' * (channels > 1)}. Give it as many in "
                    "preprocessor_config.json."
                )
            setattr(processor, name, values[:1] * channels)
    return processor, MODES[channels]


def decode(place: Place, batch: Mapping[str, list[Any]], mode: str) -> list[Any]:
    """Open a few images, upright and in the model's colours (``RGB`` or ``L``).

    Raises
    ------
    BrokenImageError
        One cannot be read.
    DataError
        One has more than 8 bits a channel.
    """
    images = []
    for row, stored in zip(batch["row"], batch["image"], strict=True):
        try:
            image = _opened(stored)
        except UNREADABLE as error:
            raise BrokenImageError(
                f"{place.row(row)} holds no image that can be read: {_reason(error)}. Replace it or remove the row."
            ) from None
        if image.mode[0] in "IF":  # would be cut off at 255, not scaled
            raise DataError(f"{place.row(row)} holds an image of more than 8 bits a channel. Convert it to 8 bits.")
        images.append(image.convert(mode))
    return images


def preprocess(processor: Any, images: list[Any], *, raw: bool) -> Tensor:
    """Bring images to the model's size; the one place where images become tensors.

    Parameters
    ----------
    processor : transformers.BaseImageProcessor
        The base model's.
    images : list of PIL.Image.Image
        Of any sizes.
    raw : bool
        Leave out scaling and normalisation.

    Returns
    -------
    Tensor
        Shape ``(len(images), C, H, W)``.

    Raises
    ------
    ModelError
        The processor fails.
    """
    options = {"do_rescale": False, "do_normalize": False} if raw else {}
    try:
        made = processor(images, return_tensors="pt", **options)
    except UNREADABLE as error:
        raise ModelError(
            f"the model's image processor fails: {first_line(error).rstrip('.')}. It needs one size for all images and "
            "one mean per channel."
        ) from None
    pixels = made.get("pixel_values")
    if not isinstance(pixels, Tensor) or pixels.ndim != 4:  # patches, tokens, or several cuts of an image
        shapes = ", ".join(f"{name} of shape {tuple(value.shape)}" for name, value in made.items())
        raise ModelError(
            f"the model's image processor ({type(processor).__name__}) makes {shapes} of {len(images)} images, and "
            "only pixel_values of shape (images, channels, height, width) can be trained on. Take another base."
        )
    return pixels


def _find_normalisation(processor: Any, images: list[Any]) -> Normalisation | None:
    """Find what makes the processor's output from 8-bit pixels; None where nothing does, as tried on a few images."""
    whole, raw = preprocess(processor, images, raw=False), preprocess(processor, images, raw=True)
    if raw.dtype != torch.uint8:
        return None
    normalised = bool(getattr(processor, "do_normalize", False))
    found = Normalisation(
        float(processor.rescale_factor) if getattr(processor, "do_rescale", False) else 1.0,
        tuple(np.atleast_1d(processor.image_mean).tolist()) if normalised else (0.0,),
        tuple(np.atleast_1d(processor.image_std).tolist()) if normalised else (1.0,),
    )
    split = EncodedSplit("", {"pixels": raw}, normalisation=found)
    remade = split.batch(range(len(images)))["pixel_values"]
    return found if remade.shape == whole.shape and torch.allclose(remade, whole.float(), atol=1e-5) else None


def write_pixels(path: Path, chunks: Iterable[Tensor], count: int) -> None:
    """Write chunks of one tensor ``pixels`` as a safetensors file.

    Parameters
    ----------
    path : Path
        The file.
    chunks : iterable of Tensor
        Each ``(b, C, H, W)``, in uint8; anything else is kept in float32.
    count : int
        Number of images in all chunks together.

    Raises
    ------
    ValueError
        Chunks differ in shape.
    """
    shape: list[int] = []
    with path.open("wb") as file:
        for chunk in chunks:
            data = chunk if chunk.dtype == torch.uint8 else chunk.float()
            if not shape:
                shape = [*data.shape[1:]]
                kind = "U8" if data.dtype == torch.uint8 else "F32"
                size = count * data[0].numel() * data.element_size()
                entry = {"dtype": kind, "shape": [count, *shape], "data_offsets": [0, size]}
                head = json.dumps({"pixels": entry}).encode()
                head += b" " * (-len(head) % 8)  # keeps what follows aligned, as the format asks
                file.write(len(head).to_bytes(8, "little") + head)
            if [*data.shape[1:]] != shape:
                raise ValueError(f"sizes differ, {tuple(data.shape[1:])} and {tuple(shape)}")
            file.write(data.contiguous().numpy().tobytes())

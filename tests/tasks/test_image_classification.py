"""Images as pixels of the model's size."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from fedpeft.data import pixels
from fedpeft.data.splits import EncodedData, EncodedSplit
from fedpeft.errors import DataError, ModelError
from fedpeft.tasks.encoding import encode, encode_rows
from tests.tasks.rows import configure, write_csv


def images(folder: Path, mode: str = "RGB", suffix: str = "png") -> Path:
    draw = np.random.default_rng(0)
    for label in ("a", "b"):
        (folder / label).mkdir(parents=True)
        for index in range(5):
            shape = (9 + index, 14, 3)
            image = Image.fromarray(draw.integers(0, 256, shape, dtype=np.uint8)).convert(mode)
            image.save(folder / label / f"{index}.{suffix}")
    return folder


def processor_folder(tmp_path: Path, **options: Any) -> Path:
    folder = tmp_path / "processor"
    ViTImageProcessorPil(size={"height": 8, "width": 6}, **options).save_pretrained(folder)
    return folder


def expected_pixels(folder: Path, source: Path, mode: str) -> torch.Tensor:
    processor = ViTImageProcessorPil.from_pretrained(folder)
    opened = [Image.open(path).convert(mode) for path in sorted(source.rglob("*.*"))]
    pixel_values: torch.Tensor = processor(opened, return_tensors="pt")["pixel_values"]
    return pixel_values


def encoded_images(source: Path, folder: Path) -> tuple[EncodedData, EncodedSplit]:
    config = configure(source, model__task="image-classification")
    return encode(config, folder), encode_rows(config, folder, source)


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("RGB", {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]}),
        ("RGBA", {"do_normalize": False}),
        ("L", {"do_rescale": False}),
        ("P", {"rescale_factor": 1 / 127}),
    ],
)
def test_pixels_are_what_the_processor_itself_makes_of_them(tmp_path: Path, mode: str, options: dict[str, Any]) -> None:
    source, folder = images(tmp_path / "images", mode), processor_folder(tmp_path, **options)
    data, everything = encoded_images(source, folder)
    assert everything.tensors["pixels"].dtype == torch.uint8
    batch = everything.batch(range(10))
    assert torch.allclose(batch["pixel_values"], expected_pixels(folder, source, "RGB").float(), atol=1e-5)
    assert batch["labels"].tolist() == [0] * 5 + [1] * 5
    assert (data.labels, data.pad_token_id, len(data.train) + len(data.test)) == (("a", "b"), None, 10)
    assert everything.lengths.tolist() == [1] * 10


def test_a_model_of_one_channel_gets_grey_images(tmp_path: Path) -> None:
    source = images(tmp_path / "images")
    folder = processor_folder(tmp_path, image_mean=[0.5], image_std=[0.25])
    (folder / "config.json").write_text(json.dumps({"model_type": "vit", "num_channels": 1}))
    _, everything = encoded_images(source, folder)
    pixel_values = everything.batch([0, 9, 4])["pixel_values"]
    assert pixel_values.shape == (3, 1, 8, 6)
    assert torch.allclose(pixel_values, expected_pixels(folder, source, "L")[[0, 9, 4]], atol=1e-5)


def test_pixels_that_no_scaling_explains_are_kept_as_the_processor_gives_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = pixels.preprocess

    def squared(processor: Any, opened: list[Any], *, raw: bool) -> torch.Tensor:
        values = original(processor, opened, raw=raw)
        return values if raw else values.square()

    monkeypatch.setattr(pixels, "preprocess", squared)
    source, folder = images(tmp_path / "images"), processor_folder(tmp_path)
    _, everything = encoded_images(source, folder)
    assert everything.tensors["pixels"].dtype == torch.float32
    wanted = expected_pixels(folder, source, "RGB").square()
    assert torch.allclose(everything.batch(range(10))["pixel_values"], wanted)


def test_changed_images_behind_unchanged_paths_are_encoded_anew(tmp_path: Path) -> None:
    source, folder = images(tmp_path / "images"), processor_folder(tmp_path)
    files = sorted(source.rglob("*.png"))
    table = write_csv(
        tmp_path / "rows.csv",
        {"image": [file.relative_to(tmp_path) for file in files], "label": [file.parent.name for file in files]},
    )
    _, before = encoded_images(table, folder)
    Image.new("RGB", (4, 4)).save(files[0])
    _, after = encoded_images(table, folder)
    assert not torch.equal(before.batch([0])["pixel_values"], after.batch([0])["pixel_values"])
    assert torch.equal(before.batch([1])["pixel_values"], after.batch([1])["pixel_values"])


def grey_16_bits(path: Path) -> None:
    Image.fromarray(np.full((4, 4), 40_000, dtype=np.uint16)).save(path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:60]), "row 3 of .* holds no image that can be read"),
        (grey_16_bits, "row 3 of .* more than 8 bits"),
    ],
)
def test_a_spoiled_image_is_named_by_its_row(tmp_path: Path, spoil: Callable[[Path], None], message: str) -> None:
    source, folder = images(tmp_path / "images"), processor_folder(tmp_path)
    spoil(source / "a" / "2.png")
    with pytest.raises(DataError, match=message):
        encoded_images(source, folder)


def test_a_processor_must_give_one_size(tmp_path: Path) -> None:
    def chunks() -> Iterator[torch.Tensor]:
        yield torch.zeros(2, 3, 4, 4)
        yield torch.zeros(2, 3, 5, 4)

    with pytest.raises(ValueError, match="sizes differ"):
        pixels.write_pixels(tmp_path / "pixels.safetensors", chunks(), 4)
    source, folder = images(tmp_path / "images"), processor_folder(tmp_path, do_resize=False)
    with pytest.raises(ModelError, match="one size for all images"):
        encoded_images(source, folder)

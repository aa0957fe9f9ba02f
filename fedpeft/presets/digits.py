"""The `digits` preset: small pictures in six visual domains, and a TOY vision transformer that is made on the spot.

No pretrained vision transformer comes in a package, so a small one is trained here, in seconds, on plain digits that
neither a client nor the test rows hold. It shows what federated fine-tuning does; it is no model for anything else.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedpeft.seeds import derive_seed, generator

if TYPE_CHECKING:
    import torch
    from transformers import ViTForImageClassification

BUILDER = 1  # raise it with every change of what is written
SEED = 0
PACKAGES = ("datasets", "numpy", "pillow", "scikit-learn", "scipy", "torch", "transformers")

DOMAINS = ("plain", "rotated", "shifted", "coloured", "pale", "gradient")
SIDE = 16  # pixels
BASE_ROWS, TEST_ROWS = 500, 180  # the clients hold the other 1,117

EPOCHS, BATCH, LEARNING_RATE, WEIGHT_DECAY = 24, 32, 2e-3, 0.05
INITIAL_SPREAD = 0.1  # of weights; the usual 0.02 is meant for wider layers and learns worse here
JITTER = 0.2  # of angle (radians), scale, shear and place (half sides) while pre-training

Pictures = NDArray[np.uint8]


def ingredients() -> Mapping[str, str]:
    """Return everything that the files depend on."""
    return {"builder": str(BUILDER), "seed": str(SEED)} | {package: version(package) for package in PACKAGES}


def divide(count: int) -> dict[str, NDArray[np.int64]]:
    """Divide scikit-learn's digits: none is in two parts.

    Parameters
    ----------
    count : int
        Number of digits.

    Returns
    -------
    dict of str to array of int
        ``base``: what the base is pre-trained on; ``test``: drawn in every domain; and for each domain the digits that
        its client trains on, drawn in that domain alone.
    """
    order = generator(SEED, "digits", "rows").permutation(count)
    test, base, clients = np.split(order, [TEST_ROWS, TEST_ROWS + BASE_ROWS])
    parts = np.array_split(clients, len(DOMAINS))
    return {"base": base, "test": test} | dict(zip(DOMAINS, parts, strict=True))


def draw(digits: NDArray[np.float64], domain: str) -> Pictures:
    """Draw digits as they look in a domain.

    Parameters
    ----------
    digits : array of float, shape (n, 8, 8)
        Ink in [0, 1].
    domain : str
        One of `DOMAINS`.

    Returns
    -------
    array of uint8, shape (n, 16, 16, 3)
    """
    from scipy import ndimage

    scale = SIDE // digits.shape[1]
    ink = ndimage.zoom(digits, (1, scale, scale), order=1, grid_mode=True, mode="nearest")  # (n, 16, 16)
    if domain == "rotated":
        ink = ndimage.rotate(ink, -25, axes=(1, 2), reshape=False, order=1)
    elif domain == "shifted":
        ink = ndimage.shift(ink, (0, 1, 2), order=1)
    ink = np.clip(ink, 0, 1)[..., None]  # (n, 16, 16, 1)
    paper, pen = np.zeros(3), np.ones(3)
    if domain == "coloured":
        paper, pen = np.array([0.1, 0.35, 0.5]), np.array([0.9, 0.75, 0.2])  # yellow on blue
    elif domain == "pale":
        paper, pen = np.full(3, 0.35), np.full(3, 0.75)
    elif domain == "gradient":
        ramp = np.linspace(0, 0.225, SIDE)
        paper = (ramp[:, None] + ramp)[..., None] * np.ones(3)  # (16, 16, 3)
        pen = paper + 0.55
    drawn: Pictures = np.round(255 * (paper + (pen - paper) * ink)).astype(np.uint8)
    return drawn


def build(folder: Path) -> dict[str, Any]:
    """Write ``model`` and ``data`` below `folder`, and return their provenance."""
    from sklearn.datasets import load_digits

    source = load_digits()
    digits, labels = source.images / 16.0, source.target.astype(np.int64)
    parts = divide(len(labels))
    rows = _write_rows(folder / "data", digits, labels, parts)
    accuracy = _write_base(folder / "model", digits, labels, parts)
    weights = hashlib.sha256((folder / "model" / "model.safetensors").read_bytes()).hexdigest()
    return {
        "model": {
            "what": f"a TOY ViT, pre-trained by fedpeft on {BASE_ROWS} plain digits; no published model",
            "sha256": weights,
            "accuracy_on_plain_test_digits": round(accuracy, 4),
            "head": "ten digits; kept as the federation's first head",
        },
        "data": {
            "what": "scikit-learn's digits (UCI ML hand-written digits), drawn in six visual domains",
            "license": "CC BY 4.0",
            "domains": list(DOMAINS),
            "train_rows": sum(len(parts[domain]) for domain in DOMAINS),
            "test_rows": TEST_ROWS * len(DOMAINS),
            "disjoint": "no digit is in two of: pre-training, one client, another client, test",
            "sha256": rows,
        },
    }


def _write_rows(
    folder: Path, digits: NDArray[np.float64], labels: NDArray[np.int64], parts: Mapping[str, NDArray[np.int64]]
) -> str:
    import datasets

    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=[str(digit) for digit in range(10)]),
            "domain": datasets.Value("string"),
        }
    )
    digest = hashlib.sha256()
    splits = {}
    for split in ("train", "test"):
        columns: dict[str, list[Any]] = {"image": [], "label": [], "domain": []}
        for domain in DOMAINS:
            chosen = parts[domain] if split == "train" else parts["test"]
            pictures = draw(digits[chosen], domain)
            columns["image"] += [{"bytes": _png(picture), "path": None} for picture in pictures]
            columns["label"] += labels[chosen].tolist()
            columns["domain"] += [domain] * len(chosen)
            digest.update(f"{split}\x1f{domain}\x1f{labels[chosen].tolist()}".encode() + pictures.tobytes())
        splits[split] = datasets.Dataset.from_dict(columns, features=features)
    datasets.DatasetDict(splits).save_to_disk(folder)
    return digest.hexdigest()


def _png(picture: Pictures) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG")
    return buffer.getvalue()


def _write_base(
    folder: Path, digits: NDArray[np.float64], labels: NDArray[np.int64], parts: Mapping[str, NDArray[np.int64]]
) -> float:
    """Pre-train the base, write it, and return its accuracy on the plain test digits."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

    names = [str(digit) for digit in range(10)]
    config = ViTConfig(
        image_size=SIDE,
        patch_size=4,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        initializer_range=INITIAL_SPREAD,
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums over several threads depend on their number
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(SEED, "digits", "weights"))
            model = ViTForImageClassification(config)
            _pretrain(model, _pixels(digits[parts["base"]]), torch.from_numpy(labels[parts["base"]]))
        model.eval()
        with torch.no_grad():
            predicted = model(pixel_values=_pixels(digits[parts["test"]])).logits.argmax(1).numpy()
    finally:
        torch.set_num_threads(threads)
    model.save_pretrained(folder)
    size = {"height": SIDE, "width": SIDE}
    ViTImageProcessorPil(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(folder)
    return float((predicted == labels[parts["test"]]).mean())


def _pixels(digits: NDArray[np.float64]) -> torch.Tensor:
    """Return plain pictures as the processor does, shape (n, 3, 16, 16) in [-1, 1]."""
    import torch

    pictures = torch.from_numpy(draw(digits, "plain").transpose(0, 3, 1, 2).astype(np.float32))
    return pictures / 127.5 - 1


def _pretrain(model: ViTForImageClassification, pixels: torch.Tensor, labels: torch.Tensor) -> None:
    import torch
    from torch.nn import functional

    rng = torch.Generator().manual_seed(derive_seed(SEED, "digits", "batches"))
    per_epoch = len(labels) // BATCH
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, EPOCHS * per_epoch)
    model.train()
    for _ in range(EPOCHS):
        order = torch.randperm(len(labels), generator=rng)
        for batch in order[: per_epoch * BATCH].view(per_epoch, BATCH):
            angle, width, height, shear, right, down = JITTER * (2 * torch.rand(6, BATCH, generator=rng) - 1)
            width, height = 1 + width, 1 + height
            rows = (width * angle.cos(), shear - height * angle.sin(), right, width * angle.sin(), height * angle.cos())
            warp = torch.stack([*rows, down], dim=1).view(BATCH, 2, 3)
            grid = functional.affine_grid(warp, [BATCH, *pixels.shape[1:]], align_corners=False)
            warped = functional.grid_sample(pixels[batch], grid, padding_mode="border", align_corners=False)
            loss = model(pixel_values=warped, labels=labels[batch]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import DatasetDict, load_from_disk
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from transformers import AutoImageProcessor, AutoModelForImageClassification

from fedpeft.presets import PRESETS, PresetFiles
from fedpeft.presets import digits as preset

Opened = dict[tuple[str, str], list[dict[str, Any]]]

DIGITS: NDArray[np.float64] = load_digits().images / 16
LABELS: NDArray[np.int64] = load_digits().target


@pytest.fixture(scope="session")
def rows(digits_files: PresetFiles) -> DatasetDict:
    return load_from_disk(digits_files.data)


@pytest.fixture(scope="session")
def by_domain(rows: DatasetDict) -> Opened:
    """Rows with opened images, by split and domain."""
    return {
        (split, domain): [row for row in opened if row["domain"] == domain]
        for split, held in rows.items()
        for opened in [list(held)]
        for domain in preset.DOMAINS
    }


def test_every_digit_is_in_one_part_only() -> None:
    parts = preset.divide(len(LABELS))
    assert set(parts) == {"base", "test", *preset.DOMAINS}
    assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(len(LABELS)))


def test_no_picture_that_was_trained_on_comes_back_in_the_test() -> None:
    parts = preset.divide(len(LABELS))
    plain = preset.draw(DIGITS, "plain")
    seen = {plain[row].tobytes() for name, part in parts.items() if name != "test" for row in part}
    assert not seen & {plain[row].tobytes() for row in parts["test"]}


def test_rows_are_the_divided_digits_as_their_domain_draws_them(
    by_domain: Opened,
) -> None:
    parts = preset.divide(len(LABELS))
    for (split, domain), held in by_domain.items():
        part = parts[domain] if split == "train" else parts["test"]
        pictures = np.stack([np.asarray(row["image"]) for row in held])
        np.testing.assert_array_equal(pictures, preset.draw(DIGITS[part], domain))
        assert [row["label"] for row in held] == LABELS[part].tolist()


def test_rows_have_an_image_a_named_label_and_a_domain(rows: DatasetDict) -> None:
    for split in rows.values():
        assert split.column_names == ["image", "label", "domain"]
        assert split.features["label"].names == [str(digit) for digit in range(10)]
        assert {image.size for image in split["image"]} == {(preset.SIDE, preset.SIDE)}
        assert {image.mode for image in split["image"]} == {"RGB"}
    # every client sees every digit, so that what sets clients apart is the domain
    assert len(Counter(zip(rows["train"]["domain"], rows["train"]["label"], strict=True))) == 60


def test_domains_draw_the_same_digit_differently() -> None:
    drawn = {domain: preset.draw(DIGITS[:20], domain).astype(int) for domain in preset.DOMAINS}
    for one, other in combinations(preset.DOMAINS, 2):
        assert (np.abs(drawn[one] - drawn[other]).mean(axis=(1, 2, 3)) > 5).all(), (one, other)


def test_the_base_knows_plain_digits_and_leaves_room_in_the_other_domains(
    digits_files: PresetFiles, by_domain: Opened
) -> None:
    model, info = AutoModelForImageClassification.from_pretrained(
        digits_files.model, num_labels=10, output_loading_info=True
    )
    # the head that was pre-trained is the one that a federation starts from
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    processor = AutoImageProcessor.from_pretrained(digits_files.model, backend="pil")
    right: dict[str, float] = {}
    for domain in preset.DOMAINS:
        chosen = by_domain["test", domain]
        with torch.no_grad():
            scores = model(**processor([row["image"] for row in chosen], return_tensors="pt")).logits
        right[domain] = float(np.mean(scores.argmax(1).numpy() == [row["label"] for row in chosen]))
    assert right.pop("plain") >= 0.85
    assert max(right.values()) <= 0.85
    assert np.mean(list(right.values())) <= 0.65


def test_the_processor_makes_what_the_base_was_trained_on(digits_files: PresetFiles, by_domain: Opened) -> None:
    processor = AutoImageProcessor.from_pretrained(digits_files.model, backend="pil")
    plain = [row["image"] for row in by_domain["test", "plain"]]
    expected = preset._pixels(DIGITS[preset.divide(len(LABELS))["test"]])
    torch.testing.assert_close(processor(plain, return_tensors="pt")["pixel_values"], expected, atol=1e-6, rtol=0)


def test_a_second_build_elsewhere_gives_the_same_bytes_whatever_the_threads_and_the_seed(
    digits_files: PresetFiles, tmp_path: Path, hashes: Callable[[Path], dict[str, str]]
) -> None:
    before = torch.get_num_threads()
    torch.manual_seed(99)
    state = torch.get_rng_state()
    torch.set_num_threads(2)
    try:
        facts = preset.build(tmp_path)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: digits_files.provenance[name] for name in ("model", "data")} == facts
    for part in ("model", "data"):
        assert hashes(tmp_path / part) == hashes(getattr(digits_files, part))


def test_the_base_is_called_a_toy_wherever_it_is_described(digits_files: PresetFiles) -> None:
    assert "toy" in PRESETS["digits"].description.lower()
    assert "toy" in digits_files.provenance["model"]["what"].lower()

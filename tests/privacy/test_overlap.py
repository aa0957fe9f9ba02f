"""Test rows that are training rows too: noticed by what is in them, whatever their file."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fedpeft.config import RunConfig, resolve
from fedpeft.exporting import card
from fedpeft.finished import open_run
from fedpeft.privacy.accounting import Charge
from fedpeft.privacy.overlap import InTheClear, in_the_clear, scored_training_rows
from fedpeft.privacy.statement import state
from fedpeft.rescoring import caution, rescore
from fedpeft.resident import Resident
from fedpeft.simulations.plan import plan_privacy
from fedpeft.simulations.simulate import simulate
from fedpeft.strategies import with_typed_options

Make = Callable[..., RunConfig]


def some_rows(source: Path, path: Path, count: int, *, label: str | None = None) -> Path:
    """Write some rows of a file and ten of which it has none, with other columns in another order."""
    with source.open(newline="") as file:
        rows = list(csv.DictReader(file))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["number", "client", "label", "text"])
        writer.writeheader()
        for number, row in enumerate([*rows[:count], *({"text": f"w{k} w59 w59", "label": "no"} for k in range(10))]):
            writer.writerow({**row, "client": "site-0", "label": label or row["label"], "number": number})
    return path


def test_rows_are_known_by_what_the_task_reads_of_them(text_config: Make, text_csv: Path, tmp_path: Path) -> None:
    copy = shutil.copy(text_csv, tmp_path / "copy.csv")
    for test, expected in (
        (text_csv, 120),
        (copy, 120),
        (some_rows(text_csv, tmp_path / "some.csv", 7), 7),
        (some_rows(text_csv, tmp_path / "flipped.csv", 7, label="no"), 7),
        (some_rows(text_csv, tmp_path / "none.csv", 0), 0),
    ):
        assert scored_training_rows(Resident(text_config(data__test=str(test)))) == expected, test
    assert scored_training_rows(Resident(text_config())) == 0  # held out, which is another reason


def test_images_are_known_by_their_pixels(image_folder: Path, tiny_vit: Path) -> None:
    rows = {"source": str(image_folder), "test": str(image_folder), "image": "image"}
    home = Resident(resolve([{"model": {"name": str(tiny_vit)}, "data": rows, "federation": {"clients": 2}}]))
    assert scored_training_rows(home) == len(home.test) > 0


def test_such_a_run_claims_no_guarantee_and_says_how_many_rows(
    text_config: Make, text_csv: Path, tmp_path: Path
) -> None:
    base = {
        "privacy__level": "record",
        "privacy__noise_multiplier": 1.0,
        "privacy__rng": "secure",
        "federation__rounds": 1,
    }
    config = text_config(data__test=str(some_rows(text_csv, tmp_path / "some.csv", 7)), **base)
    planned = plan_privacy(config, Resident(config))
    assert planned is not None
    assert "7 test rows are training rows too" in planned["reasons"][0]
    run = simulate(config, tmp_path / "run").path
    scores = rescore(run, {})
    assert scores["training_rows"] == 7
    assert "7 of 17 rows are of the source that this private run was to protect" in str(caution(scores))
    clean = some_rows(text_csv, tmp_path / "none.csv", 0)
    assert caution(rescore(run, {"data": {"test": str(clean)}})) is None
    assert caution(rescore(run, {"data": {"test": str(text_csv)}})) is not None
    told = (run / "privacy.json").read_text()
    assert '"guarantee": false' in told
    assert "7 test rows are training rows too" in told
    assert "knows of no other run on these rows" in told


def test_an_adapter_that_begins_at_training_rows_has_no_guarantee(
    text_config: Make, text_csv: Path, tmp_path: Path
) -> None:
    clean = some_rows(text_csv, tmp_path / "none.csv", 0)
    base = {"data__test": str(clean), "privacy__public_init_data": True, "adapter__init": "eva", "adapter__rank": 2}
    base |= {"privacy__level": "record", "privacy__noise_multiplier": 1.0, "privacy__rng": "secure"}
    for rows, expected in ((some_rows(text_csv, tmp_path / "some.csv", 20), 20), (clean, 0)):
        config = text_config(adapter__init_data=str(rows), federation__rounds=1, **base)
        run = simulate(config, tmp_path / f"run-{expected}").path
        told = json.loads((run / "privacy.json").read_text())
        assert told["guarantee"] == (not expected), told["reasons"]
        planned = plan_privacy(config, Resident(config))
        assert planned is not None
        assert told["reasons"] == planned["reasons"]
        assert ("20 rows of adapter.init_data are training rows too" in told["statement"]) == bool(expected)


@pytest.mark.parametrize("level", ["record", "client"])
def test_the_statement_gives_the_reason_at_either_level(level: str, text_config: Make) -> None:
    config = text_config(privacy__level=level, privacy__noise_multiplier=1.0, privacy__rng="secure")
    facts = state(config, {"a": [Charge(1.1, 0.2, 5)]}, {"a": 500}, InTheClear(scored=1))
    assert not facts["guarantee"]
    assert "1 test row is a training row too" in facts["statement"]


def test_an_adapter_of_a_run_on_the_same_rows_is_no_public_start_also_by_a_run_between(
    text_config: Make, text_csv: Path, tmp_path: Path
) -> None:
    other = some_rows(text_csv, tmp_path / "other.csv", 40)
    clean = str(some_rows(text_csv, tmp_path / "none.csv", 0))
    base = {"data__test": clean, "federation__rounds": 1, "train__local_steps": 1}
    first = simulate(text_config(**base), tmp_path / "first").path
    begun = text_config(**base, data__source=str(other), adapter__start=str(first / "adapter"))
    between = simulate(begun, tmp_path / "second").path
    shutil.copytree(first / "adapter", tmp_path / "copy")
    level = {"privacy__level": "record", "privacy__noise_multiplier": 1.0, "privacy__rng": "secure"}
    for folder, known in ((first / "adapter", True), (between / "adapter", True), (tmp_path / "copy", False)):
        config = with_typed_options(text_config(**base, **level, adapter__start=str(folder)))
        facts = plan_privacy(config, Resident(config))
        assert facts is not None
        assert facts["guarantee"] is (not known)
        assert ("adapter.start is of the run" in " ".join(facts["reasons"])) is known
        assert f"adapter.start ('{folder}', sha256 {config.adapter.start_sha256})" in facts["public"]
        assert "had it been trained on rows that are protected here" in facts["warnings"][0]
        assert len(str(config.adapter.start_sha256)) == 64


@pytest.mark.parametrize("level", ["record", "client"])
def test_test_rows_of_the_clients_themselves_leave_no_guarantee_and_no_answers(
    level: str, text_config: Make, text_csv: Path, tmp_path: Path
) -> None:
    (tmp_path / "rows").mkdir()
    shutil.copy(text_csv, tmp_path / "rows" / "train.csv")
    own = some_rows(text_csv, tmp_path / "rows" / "test.csv", 0)  # of site-0, by its column
    base = {"privacy__level": level, "privacy__noise_multiplier": 1.0, "strategy__name": "fedit"}
    rows = {"data__source": str(tmp_path / "rows")}
    for settings, owned in ((rows, 10), ({**rows, "data__test": str(own)}, 0)):
        clear = in_the_clear(Resident(text_config(**base, **settings)))
        assert clear.owned == owned
        assert clear.in_scores is bool(owned)
    config = text_config(**base, **rows, federation__rounds=1, privacy__rng="secure", run__best=True)
    run = simulate(config, tmp_path / "run").path
    told = json.loads((run / "privacy.json").read_text())
    assert not told["guarantee"]
    assert "10 test rows are the clients' own" in told["statement"]
    assert told["scores_tell_of_rows"] is True
    assert rescore(run, {})["training_rows"] == 10
    assert "are not told" in card(open_run(run), None, merged=False)
    stated = [json.loads((run / folder / "privacy.json").read_text()) for folder in ("adapter", "adapter-best")]
    assert stated[0] == stated[1]

"""A site's own rows, of which some cannot be encoded."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, Message, MessageType, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedpeft.adapters.state import Role
from fedpeft.clients.app import ClientFailedError, app
from fedpeft.clients.rows import client_rows
from fedpeft.config import RunConfig, nest, resolve
from fedpeft.errors import DataError
from fedpeft.privacy.ledger import Ledger
from fedpeft.privacy.mechanism import record_mechanism
from fedpeft.resident import Resident, resident
from fedpeft.wire import TrainAnswer, TrainOrder, to_record

Make = Callable[..., RunConfig]
GOOD = ["w1 w2,yes", "w3 w4 w5,no", "w6,yes", "w7 w8,no", "w9,yes", "w10 w11,no"]
# by number from 1: no text, no label, a label that nobody has
BAD = {2: ",no", 4: "w7 w8,", 5: "w9,perhaps"}


@pytest.fixture
def private(text_config: Make) -> RunConfig:
    given = {"data__labels": "no,yes", "privacy__level": "record", "privacy__noise_multiplier": 1.0}
    return text_config(**given, privacy__rng="secure", partition__by=None, train__batch_size=3)


def write(path: Path, wrong: dict[int, str]) -> Path:
    lines = [wrong.get(number, line) for number, line in enumerate(GOOD, start=1)]
    path.write_text("\n".join(["text,label", *lines]) + "\n")
    return path


def answer(config: RunConfig, rows: Path) -> Message:
    """Let a site with these rows train once."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 0, 1
    adapted = resident(config).adapted
    order = TrainOrder(
        to_record({name: adapted.initial[name] for name in adapted.trained}),
        server_round=1,
        num_rounds=2,
        scaling=adapted.scaling,
        held_hash=adapted.frozen_hash,
        trained=frozenset({Role.A, Role.B, Role.HEAD}),
    )
    message = Message(order.to_record(), 1, MessageType.TRAIN, group_id="1")
    ledger = Ledger.create(rows.with_suffix(".jsonl")).path
    node = {"data": str(rows), "client-id": "a", "privacy-ledger": str(ledger)}
    return app(message, Context(7, 1, node, RecordDict(), dict(config.to_flat())))


def test_rows_that_cannot_be_encoded_count_and_only_the_sites_log_knows(
    private: RunConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        whole = answer(private, write(tmp_path / "whole.csv", {}))
        assert not caplog.records
        torn = answer(private, write(tmp_path / "torn.csv", BAD))
    told = [record.getMessage() for record in caplog.records]
    assert [text.split(" of ")[0] for text in told] == ["row 2", "row 4", "row 5"]
    assert all("gradient of zero" in text for text in told)
    assert "row 4 of" in told[1].rpartition("zero: ")[2]
    one, other = (TrainAnswer.from_record(reply.content) for reply in (torn, whole))
    assert (one.num_examples, one.metrics) == (other.num_examples, other.metrics)
    assert one.arrays.keys() == other.arrays.keys()


def test_such_rows_stay_in_the_count_and_the_others_keep_their_order(private: RunConfig, tmp_path: Path) -> None:
    for again in range(2):  # the second time from the cache
        home = Resident(private)
        node = {"data": str(write(tmp_path / "torn.csv", BAD)), "client-id": f"{again}"}
        rows = client_rows(home, node)
        assert (len(rows.split), rows.left_out, rows.num_examples) == (3, 3, 6)
        assert rows.split.labels is not None
        assert rows.split.labels.tolist() == [1, 1, 0]
        assert np.array_equal(rows.indices, [0, 1, 2])
        assert record_mechanism(private, rows.num_examples).sample_rate == 0.5


@pytest.mark.parametrize(
    ("suffix", "torn"),
    [
        (".csv", b"w\xe9 w2,yes\n"),
        (".csv", b"w1,w2,yes\n"),
        (".csv", b"w1\n"),
        (".csv", b'"w1" w2,yes\n'),
        (".csv", b'"w1 w2,yes\n'),
        (".jsonl", b'{"text": "w1", "la\n'),
        (".jsonl", b'{"text": ["w1"], "label": "yes"}\n'),
        (".jsonl", b'{"text": "\\ud83d", "label": "yes"}\n'),
        (".jsonl", b'{"text": "a", "text": "b", "label": "yes"}\n'),
        (".jsonl", b"5\n"),
    ],
)
def test_so_does_a_row_that_cannot_even_be_read(
    suffix: str, torn: bytes, private: RunConfig, text_config: Make, tmp_path: Path
) -> None:
    lines = (
        GOOD
        if suffix == ".csv"
        else [json.dumps(dict(zip(("text", "label"), line.split(","), strict=True))) for line in GOOD]
    )
    path = tmp_path / f"rows{suffix}"
    header = b"text,label\n" if suffix == ".csv" else b""
    path.write_bytes(header + "".join(f"{line}\n" for line in lines).encode() + torn)
    rows = client_rows(Resident(private), {"data": str(path)})
    assert (len(rows.split), rows.num_examples) == (6, 7)
    with pytest.raises(DataError):
        client_rows(Resident(text_config(data__labels="no,yes", partition__by=None)), {"data": str(path)})


def test_an_image_that_cannot_be_opened_is_such_a_row(tiny_vit: Path, image_folder: Path, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = [path.read_bytes() for path in sorted(image_folder.rglob("*.png"))[:6]]
    images[3] = b"no image"
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"image": images, "label": ["dark", "light"] * 3}), path)
    settings = {"model.name": str(tiny_vit), "model.task": "image-classification", "data.labels": "dark,light"}
    private = {"privacy.level": "record", "privacy.noise_multiplier": 1.0, "adapter.rank": 2}
    config = resolve([nest({**settings, **private})])
    home = Resident(config)
    rows = client_rows(home, {"data": str(path)})
    assert (len(rows.split), rows.num_examples) == (5, 6)
    folder = shutil.copytree(image_folder, tmp_path / "images")
    for number, name in enumerate(("loose.png", "dark/photo.heic")):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(next(image_folder.rglob("*.png")), folder / name)
        rows = client_rows(home, {"data": str(folder), "client-id": name})
        assert rows.left_out == number + 1, name
        home = Resident(config)


def test_without_record_level_privacy_the_error_stays(private: RunConfig, text_config: Make, tmp_path: Path) -> None:
    plain = text_config(data__labels="no,yes", partition__by=None)
    torn = write(tmp_path / "torn.csv", BAD)
    with pytest.raises(DataError, match="row 2 of"):
        client_rows(Resident(plain), {"data": str(torn)})
    nothing = write(tmp_path / "nothing.csv", dict.fromkeys(range(1, 7), ",no"))
    with pytest.raises(DataError, match="row 1 of"):  # as where a setting is wrong
        client_rows(Resident(private), {"data": str(nothing)})
    shutil.copy(torn, tmp_path / "other.csv")
    with pytest.raises(ClientFailedError, match="DataError"):
        answer(private.model_copy(update={"privacy": plain.privacy}), tmp_path / "other.csv")

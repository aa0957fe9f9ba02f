from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from fedpeft.adapters.state import fingerprint
from fedpeft.config import RunConfig
from fedpeft.errors import DataError
from fedpeft.resident import Resident, ResidentKey, suppliers
from fedpeft.simulations.grids import freight
from fedpeft.simulations.grids.freight import Bundle, Freight, land

Make = Callable[..., RunConfig]


@pytest.fixture
def disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Return a function that puts this process before another disk."""

    def use(name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        monkeypatch.setenv("HOME", str(folder))
        monkeypatch.setenv("FEDPEFT_CACHE_DIR", str(folder / "cache"))
        return folder

    return use


def written(folder: Path, text: str = "weights") -> Path:
    (folder / "inner").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "inner" / "chat.jinja").write_text("hello")
    (folder / "weights.safetensors").write_text(text)
    (folder / "pickle.bin").write_text("no")
    return folder


def packed(bundle: Bundle) -> list[list[bytes]]:
    return freight._put(bundle, lambda part: part)  # type: ignore[arg-type, return-value]


PATTERNS = ("*.json", "*.safetensors", "inner/*")


def test_files_are_copied_where_they_are_lacking_and_only_there(disks: Callable[[str], Path]) -> None:
    source = written(disks("one") / "model")
    bundle = Bundle.of(source, "~/model", PATTERNS)
    stored = packed(bundle)
    assert land(bundle, (), lambda part: part) == source
    disks("two")
    assert freight.lacking([bundle]) == [bundle.digest]
    landed = land(bundle, stored, lambda part: part)
    assert landed.parent == Path(disks("two") / "cache" / "received")
    names = {path.relative_to(landed).as_posix() for path in landed.rglob("*") if path.is_file()}
    assert names == {"config.json", "weights.safetensors", "inner/chat.jinja"}
    assert (landed / "weights.safetensors").read_text() == "weights"
    assert freight.lacking([bundle]) == []
    # the second time, nothing is fetched
    assert land(bundle, stored, lambda part: pytest.fail("fetched again")) == landed


def test_a_folder_of_the_same_name_with_other_contents_is_not_taken_for_it(disks: Callable[[str], Path]) -> None:
    bundle = Bundle.of(written(disks("one") / "model"), "~/model", PATTERNS)
    stored = packed(bundle)
    other = written(disks("two") / "model", "WEIGHTS")
    assert land(bundle, stored, lambda part: part) != other


def test_a_large_file_travels_in_parts_and_what_arrives_damaged_is_refused(
    disks: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(freight, "CHUNK", 3)
    bundle = Bundle.of(written(disks("one") / "model"), "~/model", PATTERNS)
    stored = packed(bundle)
    assert [len(parts) for parts in stored] == [1, 2, 3]
    disks("two")
    with pytest.raises(DataError, match="arrived damaged"):
        land(bundle, stored, lambda part: b"???"[: len(part)])
    assert not bundle.landing.exists()
    with pytest.raises(DataError, match="nothing was sent in its place"):
        land(bundle, (), lambda part: part)
    assert land(bundle, stored, lambda part: part).is_dir()


def test_a_file_is_read_for_its_hash_again_when_it_has_changed(disks: Callable[[str], Path]) -> None:
    path = disks("one") / "file"
    for text in ("one", "other"):
        path.write_text(text)
        assert freight._hash(path) == freight._hash(path) == hashlib.sha256(text.encode()).hexdigest()


def test_a_process_without_the_paths_of_a_run_holds_the_same_rows(
    text_config: Make, disks: Callable[[str], Path], text_csv: Path, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disks("one")
    config = text_config(data__test=str(text_csv))
    home = Resident(config)
    sent = Freight.of(config.to_flat(), home)
    stored = {bundle.digest: packed(bundle) for bundle in sent.bundles}
    assert home.data.train.fingerprint
    disks("two")
    monkeypatch.setattr(
        Bundle, "_is", lambda bundle, folder, real=Bundle._is: folder != tiny_bert and real(bundle, folder)
    )
    supply = Freight(sent.config, sent.model, sent.train, sent.test, stored)
    monkeypatch.setattr("ray.get", lambda part: part)
    supply.announce()
    try:
        assert list(suppliers) == [ResidentKey.of(config)]
        there = Resident(config)
        monkeypatch.setattr(
            "fedpeft.resident.with_preset_paths", lambda config: pytest.fail("the source was looked for")
        )
        assert there.folder.is_relative_to(disks("two"))
        assert there.data.fingerprint == home.data.fingerprint
        assert there.partition.client_ids == home.partition.client_ids
        assert fingerprint(there.adapted.initial) == fingerprint(home.adapted.initial)
    finally:
        suppliers.clear()

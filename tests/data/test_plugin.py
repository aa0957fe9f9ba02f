"""A format of another package: one file, found by an entry point."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fedpeft import tasks
from fedpeft.config import DataConfig, configure
from fedpeft.data.sources import digest, locate
from fedpeft.errors import DataError
from fedpeft.tasks.encoding import encode
from tests.data.loading import load_rows

# a section is a row; a folder of notes holds the rows of one label in each text file
COLUMNS = tasks.find("sequence-classification").columns
INI = """
import configparser
from pathlib import Path

from fedpeft.data.formats import Format
from fedpeft.places import Place


def read_ini(place, wanted):
    import datasets

    parser = configparser.ConfigParser()
    parser.read(place.path, encoding=wanted.encoding)
    rows = [dict(parser[section]) for section in parser.sections()]
    names = wanted.present(place, list(rows[0]) if rows else [])
    return datasets.Dataset.from_dict({name: [row[name] for row in rows] for name in names})


def read_notes(place, wanted):
    import datasets

    rows = [(line, path.stem) for path in sorted(place.path.glob("*.note")) for line in path.read_text().splitlines()]
    names = wanted.present(place, ["text", "label"])
    columns = dict(zip(("text", "label"), map(list, zip(*rows))))
    return datasets.Dataset.from_dict({name: columns[name] for name in names})


INI = Format("ini", "INI", read_ini, suffixes=(".ini",), packed=False)
NOTES = Format(
    "notes", "a folder of notes", read_notes,
    splits=lambda name, folder: {"": Place(name, "notes", folder)} if any(folder.glob("*.note")) else {},
    implies={"text": "text"},
    notes=lambda place: (f"{place} was read as notes",),
)
"""


@pytest.fixture
def plugged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Install a distribution that names two formats in one file of its own."""
    facts = tmp_path / "site" / "ini_rows-1.0.dist-info"
    facts.mkdir(parents=True)
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: ini-rows\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text("[fedpeft.formats]\nini = ini_rows:INI\nnotes = ini_rows:NOTES\n")
    (facts.parent / "ini_rows.py").write_text(INI)
    monkeypatch.syspath_prepend(str(facts.parent))


@pytest.fixture
def rows_ini(tmp_path: Path) -> Path:
    path = tmp_path / "rows.ini"
    path.write_text("".join(f"[{i}]\ntext = w{i} w{i + 1}\nlabel = {'yes' if i % 2 else 'no'}\n" for i in range(12)))
    return path


def test_a_file_of_another_packages_format_is_read_encoded_and_hashed(
    plugged: None, rows_ini: Path, tiny_bert: Path
) -> None:
    rows = load_rows(DataConfig(source=str(rows_ini)), COLUMNS, client_column=None, seed=0)
    assert rows.labels == ("no", "yes")
    assert len(rows.train) + len(rows.test) == 12
    config = configure({"model.name": str(tiny_bert), "data.source": str(rows_ini)})
    assert len(encode(config, tiny_bert).train) == len(rows.train)
    before = digest(locate(rows_ini).train, config.data, COLUMNS)
    rows_ini.write_text(rows_ini.read_text().replace("w1 w2", "w1 w9"))
    assert digest(locate(rows_ini).train, config.data, COLUMNS) != before


def test_a_folder_of_such_files_is_divided_by_their_names(plugged: None, rows_ini: Path, tmp_path: Path) -> None:
    for part in ("train", "test"):
        (tmp_path / "both").mkdir(exist_ok=True)
        (tmp_path / "both" / f"{part}.ini").write_bytes(rows_ini.read_bytes())
    location = locate(tmp_path / "both")
    assert location.test is not None
    assert (location.train.kind, location.test.kind) == ("ini", "ini")


def test_a_folder_of_its_own_kind_names_its_columns(plugged: None, tmp_path: Path) -> None:
    folder = tmp_path / "notes"
    folder.mkdir()
    for label in ("no", "yes"):
        (folder / f"{label}.note").write_text("\n".join(f"{label} {i}" for i in range(6)))
    assert configure({"data.source": str(folder)}).data.text == "text"
    rows = load_rows(DataConfig(source=str(folder)), COLUMNS, client_column=None, seed=0)
    assert rows.labels == ("no", "yes")


def test_what_is_read_is_told_with_it(plugged: None, rows_ini: Path, tmp_path: Path) -> None:
    other = rows_ini.rename(tmp_path / "rows.xlsx")
    with pytest.raises(DataError, match=r"its suffix is '\.xlsx', allowed are \.csv, .*, \.parquet, \.ini, and \.gz"):
        locate(other)
    with pytest.raises(DataError, match=r"a CSV, JSON lines, Parquet or INI file, .*, or a folder of notes"):
        locate("nothing.csv")


def test_without_the_package_the_file_is_of_no_kind(rows_ini: Path) -> None:
    with pytest.raises(DataError, match=r"its suffix is '\.ini'"):
        locate(rows_ini)


def test_asking_what_a_folder_is_loads_no_library_of_data() -> None:
    asked = (
        "import sys; from fedpeft.data.formats import implied_columns; implied_columns('.')\n"
        "print([m for m in ('torch', 'datasets', 'pyarrow', 'pydantic') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"

"""Rows as tensors: made once, kept in the cache by content, memory-mapped by every process after that.

One entry of the cache is one whole table of rows (a file, or a split): which of its rows are held out is decided
afterwards, so that runs with other seeds share it. An entry is named by the hash of all that its tensors depend on.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow.compute as pc
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedpeft import tasks
from fedpeft.cache import cache_dir, locked, publishing
from fedpeft.config import RunConfig
from fedpeft.data.chat.notes import Cuts, cut_notes, no_cuts
from fedpeft.data.chat.templates import chosen
from fedpeft.data.columns import Column
from fedpeft.data.conversations import Reading
from fedpeft.data.readers import Place, cautions, notes
from fedpeft.data.sources import (
    CLIENT,
    DOMAIN,
    Table,
    digest,
    hold_out,
    locate,
    places,
    read_rows,
    test_place,
    wanted_columns,
)
from fedpeft.data.splits import EncodedData, EncodedSplit, Normalisation, Origin
from fedpeft.errors import DataError, ModelError
from fedpeft.tasks.classes import inputs_of, max_length

FORMAT_VERSION = 5
# what the tensors depend on in a model's folder
MODEL_FILES = (
    *("tokenizer*", "vocab*", "merges*", "special_tokens_map.json", "added_tokens.json", "*.model", "*.tiktoken"),
    *("chat_template*", "additional_chat_templates/*", "preprocessor_config.json", "processor_config.json", "*.py"),
)
MODEL_FIELDS = (
    *("model_type", "architectures", "is_encoder_decoder", "text_config", "vision_config", "num_channels"),
    *("max_position_embeddings", "n_positions", "position_biased_input", "vocab_size", "type_vocab_size"),
    *("pad_token_id", "eos_token_id"),
)
LIBRARIES = ("transformers", "tokenizers", "pillow")
_META, _TENSORS, _PIXELS = "meta.json", "rows.safetensors", "pixels.safetensors"


def encode(config: RunConfig, model_dir: Path) -> EncodedData:
    """Encode the configured rows, or open the cache's copy.

    Parameters
    ----------
    config : RunConfig
        Names the rows and how they are cut.
    model_dir : Path
        Folder of the base model, with its tokenizer or image processor.

    Raises
    ------
    DataError
        The rows cannot be read or encoded, or the cache cannot be written.
    ModelError
        The folder has no tokenizer or image processor that can be loaded.
    ConfigError
        See `fedpeft.tasks.of`.
    """
    place, test_rows = places(config.data)
    by = config.partition.by
    train, labels = _entry(config, model_dir, place, config.data.label_names, by)
    test = None
    if test_rows is not None:
        test, _ = _entry(config, model_dir, test_rows, labels or None, by, CLIENT)
    return _divided(config, train, test, labels)


def entries(config: RunConfig, model_dir: Path) -> tuple[Path, Path | None]:
    """Return the cache's folders of the configured rows, which `encode` has made, and of the test part.

    Parameters
    ----------
    config, model_dir
        As for `encode`.
    """
    place, test_rows = places(config.data)
    by = config.partition.by
    train = _folder(config, model_dir, place, config.data.label_names, by)
    if test_rows is None:
        return train, None
    _, labels = _entry(config, model_dir, place, config.data.label_names, by)
    return train, _folder(config, model_dir, test_rows, labels or None, by, CLIENT)


def encoded(config: RunConfig, train: Path, test: Path | None) -> EncodedData:
    """Open the configured rows where their source is not at hand.

    Parameters
    ----------
    config : RunConfig
        Says which rows are held out.
    train, test : Path
        What `entries` returns, or copies.

    Raises
    ------
    DataError
        There are no rows there.
    """
    task = tasks.named(config)
    opened = [None if folder is None else open_entry(folder, task) for folder in (train, test)]
    if opened[0] is None or (test is not None and opened[1] is None):
        raise DataError(f"the cache entry '{train}' cannot be read. Remove the folder and run again.")
    split, labels, *_ = opened[0]
    return _divided(config, split, None if opened[1] is None else opened[1][0], labels)


def _divided(config: RunConfig, train: EncodedSplit, test: EncodedSplit | None, labels: tuple[str, ...]) -> EncodedData:
    """Put both parts together, of which the second is taken from the first where there is none."""
    if test is None:
        ids = None if train.labels is None else train.labels.numpy()
        kept, held = hold_out(ids, len(train), config.data.test_fraction, config.run.seed)
        train, test = train.take(kept), train.take(held)
    total = hashlib.sha256("\x1f".join([train.fingerprint, test.fingerprint, *labels]).encode())
    for split in (train, test):
        total.update(b"" if split.rows is None else split.rows.astype("<i8").tobytes())
    return EncodedData(train, test, labels, total.hexdigest(), train.task, train.pad_token_id)


def encode_rows(
    config: RunConfig, model_dir: Path, source: str | Path, labels: Sequence[str] = (), *, test: bool = False
) -> EncodedSplit:
    """Encode rows of another source than the configured one: a site's own file, or other test rows.

    Parameters
    ----------
    config : RunConfig
        Names the columns and how rows are cut.
    model_dir : Path
        Folder of the base model.
    source : str or Path
        Where the rows are.
    labels : sequence of str
        Label names in the order of their ids; if empty, those of `data.labels`, else the rows' own.
    test : bool
        Take the source's test split if it has one, insist on `data.domain`, and note the clients where they are named;
        else its training split, in which domains may be missing.

    Raises
    ------
    DataError, ModelError
        As `encode`.
    """
    place = test_place(source) if test else locate(source).train
    names = tuple(labels) or config.data.label_names
    by, optional = (config.partition.by, CLIENT) if test else (None, DOMAIN)
    return _entry(config, model_dir, place, names, by, optional)[0]


def encode_table(
    config: RunConfig, model_dir: Path, rows: datasets.Dataset, labels: Sequence[str] = ()
) -> EncodedSplit:
    """Encode a few rows that lie in memory, and keep them there.

    Parameters
    ----------
    config : RunConfig
        Names task and length.
    model_dir : Path
        Folder of the base model.
    rows : datasets.Dataset
        Normalised as by `fedpeft.data.sources.read_rows`.
    labels : sequence of str
        Label names in the order of their ids.

    Raises
    ------
    DataError, ModelError
        As `encode`.
    """
    with tempfile.TemporaryDirectory() as folder:
        table = Table(rows, tuple(labels), Place("rows in memory", "json", None))
        make_entry(config, model_dir, table, Path(folder) / "rows")
        found = open_entry(Path(folder) / "rows", tasks.named(config))
        assert found is not None
        split = found[0]
        return replace(split, tensors={name: tensor.clone() for name, tensor in split.tensors.items()})


def _entry(
    config: RunConfig,
    model_dir: Path,
    place: Place,
    labels: tuple[str, ...] | None,
    client_column: str | None,
    optional: frozenset[str] = frozenset(),
) -> tuple[EncodedSplit, tuple[str, ...]]:
    """Open the entry of one table of rows, making it where there is none; also return its label names."""
    task = tasks.of(config)
    folder = _folder(config, model_dir, place, labels, client_column, optional)
    if (found := open_entry(folder, task.name)) is not None:
        return _noted(config, model_dir, place, found)
    with locked(folder):
        if (found := open_entry(folder, task.name)) is None:  # another process may have been first
            table = read_rows(
                place, config.data, task.columns, labels=labels, client_column=client_column, optional=optional
            )
            make_entry(config, model_dir, table, folder)
            found = open_entry(folder, task.name)
    if found is None:
        raise DataError(f"the cache entry '{folder}' was written but cannot be read. Remove the folder and run again.")
    return _noted(config, model_dir, place, found)


def _folder(
    config: RunConfig,
    model_dir: Path,
    place: Place,
    labels: tuple[str, ...] | None,
    client_column: str | None,
    optional: frozenset[str] = frozenset(),
) -> Path:
    """Return where the entry of one table of rows is, or would be."""
    task = tasks.of(config)
    wanted = wanted_columns(config.data, task.columns, client_column, optional)
    key = entry_key(
        task=task.name,
        rows=digest(place, config.data, task.columns),
        columns=dict(wanted.columns),
        labels=labels,
        encoding=config.data.encoding,
        max_length=None if task.reads_images else max_length(config, model_dir),
        truncate=config.data.truncate or "longest",
        **chat_terms(config),
        model=model_digest(model_dir),
        versions=[importlib.metadata.version(name) for name in LIBRARIES],
    )
    return cache_dir() / "encoded" / key


def chat_terms(config: RunConfig) -> dict[str, Any]:
    """Return what turns are written and counted by."""
    data, template = config.data, chosen(config.data)
    return {
        "template": None if template is None else [template.text],
        "train_on": data.train_on or "assistant",
        "layout": [getattr(data, name, None) for name in ("layout", "messages")],
        "empty": data.empty or "refuse",
    }


def _noted(
    config: RunConfig, model_dir: Path, place: Place, found: tuple[EncodedSplit, tuple[str, ...], Cuts, Reading]
) -> tuple[EncodedSplit, tuple[str, ...]]:
    split, labels, cuts, reading = found
    count = len(split) + cuts["empty"]
    amiss = cautions(place) + reading.cautions(place, count)
    if any(cuts.values()):
        amiss += cut_notes(config, place, count, cuts, max_length(config, model_dir))
    return replace(split, notes=notes(place) + reading.notes(place), cautions=amiss), labels


def entry_key(**parts: Any) -> str:
    """Return the name of the entry that depends on these parts."""
    text = json.dumps({"format": FORMAT_VERSION, **parts}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:40]


def model_digest(model_dir: Path) -> str:
    """Return the SHA-256 of what in a model's folder turns rows into tensors: tokenizer, processor, sizes."""
    files = {path for pattern in MODEL_FILES for path in model_dir.glob(pattern) if path.is_file()}
    total = hashlib.sha256(json.dumps(_model_fields(model_dir), sort_keys=True).encode())
    for path in sorted(files):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        total.update(f"{path.relative_to(model_dir)}\x1f{digest}\n".encode())
    return total.hexdigest()


def _model_fields(model_dir: Path) -> dict[str, Any]:
    try:
        held = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
        return {name: held[name] for name in MODEL_FIELDS if name in held}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"'{model_dir / 'config.json'}' cannot be read: {error}. Save the model again.") from None


def open_entry(folder: Path, task: str) -> tuple[EncodedSplit, tuple[str, ...], Cuts, Reading] | None:
    """Map an entry into memory; None where there is none, or a damaged one."""
    try:
        meta = json.loads((folder / _META).read_text(encoding="utf-8"))
        tensors = load_file(folder / _TENSORS)
        if meta["pixels"]:
            tensors |= load_file(folder / _PIXELS)
        scaling = meta["normalisation"]
        split = EncodedSplit(
            task,
            tensors,
            {column: tuple(names) for column, names in meta["names"].items()},
            meta["pad_token_id"],
            scaling and Normalisation(scaling["scale"], tuple(scaling["mean"]), tuple(scaling["std"])),
            meta["fingerprint"],
            origin=Origin.from_json(meta["origin"]),
        )
        reading = Reading.from_json(meta["reading"])
        return split, tuple(meta["labels"]), no_cuts() | meta["cuts"], reading
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return None


def make_entry(
    config: RunConfig,
    model_dir: Path,
    table: Table,
    folder: Path,
) -> None:
    """Encode normalised rows and write them as an entry.

    Parameters
    ----------
    config, model_dir
        As for `encode`.
    table : Table
        The rows.
    folder : Path
        The entry.
    """
    task = tasks.of(config)
    encoding = task.encode(config, model_dir, inputs_of(config, model_dir), table.place, table.rows)
    rows, cuts, skipped = table.rows, dict(encoding.cuts), set(table.skipped)
    if skipped:
        cuts["empty"] = cuts.get("empty", 0) + len(skipped)
    if encoding.kept is not None:
        skipped |= set(rows["row"]) - set(rows.select(encoding.kept)["row"])
        rows = rows.select(encoding.kept)
    tensors, names = _columns(rows, task.columns)
    tensors |= encoding.tensors
    scaling, write_pixels = encoding.normalisation, encoding.write_pixels
    meta = {
        "labels": list(table.labels),
        "names": names,
        "pad_token_id": encoding.pad_token_id,
        "cuts": cuts,
        "reading": table.reading.to_json(),
        "pixels": write_pixels is not None,
        "normalisation": scaling and {"scale": scaling.scale, "mean": scaling.mean, "std": scaling.std},
    }
    with publishing(folder) as draft:
        if write_pixels is not None:
            write_pixels(draft / _PIXELS)
        save_file(tensors, draft / _TENSORS)
        contents = hashlib.sha256(json.dumps(meta, sort_keys=True).encode())
        for path in sorted(draft.iterdir()):
            with path.open("rb") as file:
                contents.update(hashlib.file_digest(file, "sha256").digest())
        told = {
            "fingerprint": contents.hexdigest(),
            "origin": Origin(table.place.files, tuple(sorted(skipped))).to_json(),
        }
        (draft / _META).write_text(json.dumps(meta | told), encoding="utf-8")


def _columns(rows: datasets.Dataset, columns: Sequence[Column]) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """Return labels, numbers, and coded domains and clients, and the names that the codes stand for."""
    tensors: dict[str, Tensor] = {}
    names: dict[str, list[str]] = {}
    kept: dict[str, str] = {column.name: column.kind for column in columns if column.kind in ("label", "number")}
    kept |= {"domain": "code", "client": "code"}
    there = [name for name in rows.column_names if name in kept]
    if not there:  # of which the library cannot take a part
        return tensors, names
    table = rows.select_columns(there).with_format("arrow")[:]
    for column, cells in zip(there, table.columns, strict=True):
        if kept[column] != "code":
            values = torch.tensor(cells.to_numpy())
            tensors |= {"labels": values} if kept[column] == "label" else {"targets": values.float()}
            continue
        distinct = pc.unique(cells)
        tensors[f"{column}s"] = torch.tensor(pc.index_in(cells, value_set=distinct).to_numpy())
        names[f"{column}s"] = distinct.to_pylist()
    return tensors, names

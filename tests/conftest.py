"""Tiny base models and data that every test may share."""

from __future__ import annotations

import csv
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from fedpeft.chatter import silence
from fedpeft.config import RunConfig, nest, resolve
from fedpeft.deferred import defer

if TYPE_CHECKING:
    from fedpeft.simulations.grids.ray import RayGrid

silence()
defer()
# how long an example takes says nothing on a machine that does other things too
settings.register_profile("fedpeft", deadline=None)
settings.load_profile("fedpeft")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Run folders on all cores, a file at a time, unless told otherwise; a file is done before workers have started."""
    option = config.option
    by_xdist = hasattr(option, "numprocesses") and not hasattr(config, "workerinput")
    if not by_xdist or option.numprocesses is not None or option.tx or option.usepdb or option.collectonly:
        return
    if not any(Path(word.partition("::")[0]).suffix == ".py" for word in config.args):
        option.numprocesses, option.dist, option.loadscopereorder = "logical", "loadfile", False


# what takes longest, first: what begins last then ends soon after all else
LONGEST = (
    "end_to_end/test_deployment.py",
    "end_to_end/test_kills.py",
    "end_to_end/test_private_deployment.py",
    "simulations/grids/test_nodes.py",
    "simulations/grids/test_ray.py",
    "simulations/grids/test_host.py",
    "end_to_end/test_simulate.py",
    "end_to_end/test_methods.py",
    "simulations/test_batching.py",
    "simulations/test_compare.py",
    "simulations/test_charging.py",
    "test_benchmarks.py",
    "quantization/test_quantization.py",
    "adapters/test_families.py",
)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin with the longest files; workers take them one by one in this order."""
    tests = Path(__file__).parent
    places = {tests / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


WORDS = [f"w{i}" for i in range(60)]


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep the user's cache and what is known of ledgers out of the tests, and the tests out of them."""
    os.environ["FEDPEFT_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))
    os.environ["FEDPEFT_DATA_DIR"] = str(tmp_path_factory.mktemp("data"))


def _tokenizer(folder: Path, **special: str) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[EOS]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", eos_token="[EOS]", **special
    ).save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("tiny-bert")
    torch.manual_seed(1)
    BertModel(
        BertConfig(
            vocab_size=63,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=128,
            hidden_dropout_prob=0.1,
        )
    ).save_pretrained(folder)
    _tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def still_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four blocks that drop nothing."""
    import torch
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("still-bert")
    torch.manual_seed(4)
    shape = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 24}
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    BertModel(BertConfig(vocab_size=63, max_position_embeddings=128, **shape, **still)).save_pretrained(folder)
    _tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny-llama")
    torch.manual_seed(2)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=63,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=24,
            max_position_embeddings=128,
            pad_token_id=0,
            eos_token_id=2,
            bos_token_id=2,
        )
    ).save_pretrained(folder)
    _tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from transformers import ViTConfig, ViTForImageClassification
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    folder = tmp_path_factory.mktemp("tiny-vit")
    torch.manual_seed(3)
    ViTForImageClassification(
        ViTConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            image_size=8,
            patch_size=4,
            num_labels=2,
        )
    ).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_csv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 rows of text that a column `label` follows from, held by three clients."""
    path = tmp_path_factory.mktemp("text") / "rows.csv"
    draw = random.Random(0)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label", "client"])
        for index in range(120):
            label = index % 2
            words = draw.choices(WORDS[:30] if label else WORDS[30:], k=draw.randint(3, 9))
            writer.writerow([" ".join(words), "yes" if label else "no", f"site-{index % 3}"])
    return path


@pytest.fixture(scope="session")
def pairs_jsonl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 prompt and completion pairs."""
    import json

    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    draw = random.Random(1)
    with path.open("w") as file:
        for _ in range(60):
            start = draw.randrange(40)
            row = {"prompt": " ".join(WORDS[start : start + 4]), "completion": " ".join(WORDS[start + 4 : start + 8])}
            file.write(json.dumps(row) + "\n")
    return path


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 images of two kinds, one folder a label."""
    import numpy as np
    from PIL import Image

    folder = tmp_path_factory.mktemp("images")
    draw = np.random.default_rng(0)
    for label, bright in (("dark", 60), ("light", 180)):
        (folder / label).mkdir()
        for index in range(40):
            pixels = np.clip(draw.normal(bright, 30, (8, 8, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{index}.png")
    return folder


class WatchedWorkers(NamedTuple):
    """Ray workers for a file's runs, and the folder by which they are watched and killed: see `watched_clients`."""

    grid: RayGrid
    folder: Path


@pytest.fixture(scope="module")
def watched_workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WatchedWorkers]:
    """Two for all tests of a file: Ray, and what its workers import, take longer to start than any tiny run takes."""
    from fedpeft.simulations.grids.ray import RayGrid

    folder = tmp_path_factory.mktemp("watch")
    apps = Path(__file__).parent / "simulations" / "apps"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(apps), prepend=os.pathsep)
        patch.setenv("FEDPEFT_TEST_WATCH", str(folder))
        with RayGrid("watched_clients:app", workers=2) as grid:
            yield WatchedWorkers(grid, folder)


RunConfigMaker = Callable[..., RunConfig]


@pytest.fixture(scope="session")
def text_config(tiny_bert: Path, text_csv: Path) -> RunConfigMaker:
    """Make a small configuration of text classification; keyword arguments are section__key."""

    def make(**settings: object) -> RunConfig:
        base = {
            "model.name": str(tiny_bert),
            "data.source": str(text_csv),
            "partition.by": "client",
            "adapter.rank": 2,
            "adapter.alpha": 4.0,
            "train.local_steps": 3,
            "train.batch_size": 8,
            "train.learning_rate": 0.01,
            "federation.rounds": 2,
            "simulation.workers": 0,
        }
        own = {name.replace("__", "."): value for name, value in settings.items()}
        return resolve([nest(base), nest(own)])

    return make

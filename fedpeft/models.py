"""Base models: found, checked and loaded once per process, from safetensors only."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedpeft.config import ModelConfig, RunConfig, Task
from fedpeft.data.tokens import load_tokenizer
from fedpeft.errors import ConfigError, ModelError
from fedpeft.presets import PREFIX, is_preset, materialize
from fedpeft.seeds import derive_seed

# what a base may be made of: never pickle, and no code
HUB_PATTERNS = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")


@dataclass(frozen=True)
class BaseModel:
    """A frozen base.

    Parameters
    ----------
    model : torch.nn.Module
        The transformer, in evaluation mode, nothing trainable.
    folder : Path
        Where it was loaded from.
    head : tuple of str
        Names of the modules that turn features into scores, and of those that the checkpoint does not hold: these are
        drawn from the run's seed.
    """

    model: nn.Module
    folder: Path
    head: tuple[str, ...]


def device() -> torch.device:
    """Return the GPU that this process was given, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextlib.contextmanager
def seeded(seed: int, *purpose: str | int) -> Iterator[None]:
    """Let torch draw from the seed of one purpose inside the block, and as before after it."""
    with torch_seed(derive_seed(seed, *purpose)):
        yield


@contextlib.contextmanager
def torch_seed(seed: int) -> Iterator[None]:
    """Let torch draw from a seed inside the block, and as before after it."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def num_threads(threads: int) -> Iterator[None]:
    """Let torch use this many CPU threads inside the block; sums may depend on the number, so runs fix it."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def locate(model: ModelConfig) -> Path:
    """Find the folder of a base model, fetching it where it is a hub id.

    Raises
    ------
    ModelError
        No such folder or hub id, no network, or a folder without safetensors weights.
    """
    if model.name is None:
        raise ConfigError("no base model. Give model.name=FOLDER_OR_HUB_ID, or --preset (see `fedpeft presets`).")
    if is_preset(model.name):
        return materialize(model.name.removeprefix(PREFIX)).model
    folder = Path(model.name).expanduser()
    if not folder.is_dir():
        folder = _fetch(model)
    return _checked(folder)


def _fetch(model: ModelConfig) -> Path:
    assert model.name is not None
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model.name) or model.name.startswith("."):
        raise ModelError(
            f"no model folder '{model.name}'. model.name takes a transformers folder or a hub id (owner/name)."
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = [*HUB_PATTERNS, *(["*.py"] if model.trust_remote_code else [])]
    try:
        return Path(snapshot_download(model.name, revision=model.revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        what = str(error).strip().splitlines()[0][:200]
        raise ModelError(
            f"'{model.name}' is neither a folder here nor a model that could be fetched from the hub "
            f"({type(error).__name__}: {what}). Give a transformers folder's path, or check the id and the network."
        ) from None


def _checked(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        raise ModelError(f"'{folder}' is not a transformers folder: it holds no config.json.")
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
        held = f"only {', '.join(pickles)}, which can run code when loaded" if pickles else "no weights at all"
        raise ModelError(
            f"'{folder}' holds {held}. Only safetensors are read: save the model with "
            "save_pretrained(FOLDER, safe_serialization=True)."
        )
    return folder


def load_base(config: RunConfig, folder: Path, labels: Sequence[str]) -> BaseModel:
    """Load a base for the run's task and freeze it.

    Parameters
    ----------
    config : RunConfig
        Names task, precision and seed.
    folder : Path
        What `locate` returned.
    labels : sequence of str
        Label names in the order of their ids; empty for causal language modelling.

    Raises
    ------
    ModelError
        The folder does not hold a model for this task.
    """
    import transformers
    from safetensors import SafetensorError

    kinds: dict[Task, Any] = {
        "sequence-classification": transformers.AutoModelForSequenceClassification,
        "image-classification": transformers.AutoModelForImageClassification,
        "causal-lm": transformers.AutoModelForCausalLM,
    }
    bf16 = config.train.precision == "bf16"
    on = device()
    options: dict[str, Any] = {
        "dtype": torch.bfloat16 if bf16 else torch.float32,
        "use_safetensors": True,
        "local_files_only": True,
        "trust_remote_code": config.model.trust_remote_code,
        "output_loading_info": True,
    }
    if bf16 and on.type == "cpu":
        options["attn_implementation"] = "eager"  # bf16 attention's fused backward is slower on CPUs than the plain one
    if labels:
        options |= {
            "num_labels": len(labels),
            "id2label": dict(enumerate(labels)),
            "label2id": {name: index for index, name in enumerate(labels)},
            "ignore_mismatched_sizes": True,  # a saved head for other labels is drawn anew
        }
    transformers.utils.logging.disable_progress_bar()  # it would spoil the run's own lines
    try:
        with seeded(config.run.seed, "head"):
            model, info = kinds[config.task].from_pretrained(folder, **options)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        what = str(error).strip().splitlines()[0][:300]
        raise ModelError(f"cannot load '{folder}' for {config.task}: {what}") from None
    if config.task == "sequence-classification" and model.config.get_text_config().pad_token_id is None:
        # Llama-like classifiers read the last token that is not padding
        model.config.pad_token_id = load_tokenizer(config, folder)[1]
    head = _head_modules(model, info, config.task)
    model.requires_grad_(False)
    model.eval()
    return BaseModel(model.to(on), folder, head)


def _head_modules(model: nn.Module, info: dict[str, Any], task: Task) -> tuple[str, ...]:
    """Name the scoring modules, and any that the checkpoint lacks: a random frozen layer would be lost on export."""
    head: list[str] = []
    if task != "causal-lm":
        trunk = getattr(model, "base_model_prefix", "")
        head = [
            name for name, child in model.named_children() if name != trunk and any(True for _ in child.parameters())
        ]
        head += [
            name for name, module in model.named_modules() if name.endswith(".pooler.dense") and _untrained(module)
        ]
    mismatched = [entry[0] if isinstance(entry, tuple) else entry for entry in info.get("mismatched_keys", ())]
    for key in [*info.get("missing_keys", ()), *mismatched]:
        module = key.rpartition(".")[0]
        if not any(module == known or module.startswith(f"{known}.") for known in head):
            head.append(module)
    if task == "causal-lm" and head:
        raise ModelError(
            f"'{model.name_or_path}' lacks weights for {', '.join(head)}; it is no complete causal language model."
        )
    return tuple(head)


def _untrained(module: nn.Module) -> bool:
    """Tell a layer that nobody has trained: its bias is still the zeros that it was made with.

    Sentence encoders such as all-MiniLM average the tokens, and ship BERT's pooler as it was drawn. Frozen, it would
    hide from the classifier what the text is about.
    """
    bias = getattr(module, "bias", None)
    return isinstance(bias, torch.Tensor) and not bias.any()

"""Base models: found, checked and loaded once per process, from safetensors only."""

from __future__ import annotations

import contextlib
import copy
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from fedpeft import tasks
from fedpeft.attention import attention_for
from fedpeft.bases import check_folder, describe_base, first_line
from fedpeft.config import ModelConfig, RunConfig
from fedpeft.data.tokens import load_tokenizer
from fedpeft.deferred import need
from fedpeft.dropout import configure_dropout, set_dropout
from fedpeft.errors import ConfigError, DataError, ModelError
from fedpeft.mapped import mapped_folder
from fedpeft.precision import dtype_on
from fedpeft.presets import PREFIX, is_preset, materialize
from fedpeft.quantised import method_of, quantised_folder
from fedpeft.quantization import Asked, Quantization
from fedpeft.seeds import derive_seed
from fedpeft.tasks.classes import model_class
from fedpeft.tasks.task import Task

log = logging.getLogger(__name__)

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
    notes : tuple of str
        What the folder says of an earlier use that does not count here, in words.
    """

    model: nn.Module
    folder: Path
    head: tuple[str, ...]
    notes: tuple[str, ...] = ()


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


def base_folder(model: ModelConfig) -> Path:
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
    check_folder(folder)
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
        What `base_folder` returned.
    labels : sequence of str
        Label names in the order of their ids; empty where rows have none.

    Raises
    ------
    ModelError
        The folder does not hold a model for this task.
    """
    if config.model.trust_remote_code:
        need()  # whatever it imports
    bf16, on = config.train.precision == "bf16", device()
    dtype = dtype_on(on, config.train.precision)
    options: dict[str, Any] = {
        "dtype": dtype,
        "use_safetensors": True,
        "local_files_only": True,
        "trust_remote_code": config.model.trust_remote_code,
        "output_loading_info": True,
    }
    task = tasks.of(config)
    saved, held = describe_base(config, folder), describe_base(config, folder, **_of_this_run(task, labels))
    architecture = model_class(config, held)
    if attention := attention_for(architecture, held, bf16, on):
        options["attn_implementation"] = attention
    _drop_besides(held)
    if (dropout := config.model.dropout) != "checkpoint":
        configure_dropout(held, dropout)
    if task.has_head:
        options["ignore_mismatched_sizes"] = True  # a saved head for other labels is drawn anew
    load = partial(_load, config, folder, held, options)
    method, said = method_of(config, held, folder, on.type), list[str]()
    if method is None:
        model, info = load(_shared(config, folder, held, dtype) if on.type == "cpu" else folder)
    else:
        model, info, said = _load_quantised(config, folder, held, dtype, method, load)
    model.name_or_path = model.config.name_or_path = str(folder)
    if dropout != "checkpoint":
        set_dropout(model, dropout)  # of what no configuration names
    text = model.config.get_text_config()
    if task.reads_last_token and getattr(text, "pad_token_id", 0) is None:
        # Llama-like classifiers read the last token that is not padding
        text.pad_token_id = load_tokenizer(config, folder)[1]
    head = _head_modules(model, info, task, folder)
    relabelled = _to_labels(model, _scorers(model), saved, labels, config.run.seed) if labels else []
    model.requires_grad_(False)
    model.eval()
    model = model.to(on) if method is None else model  # which is where it computes, and stays there
    return BaseModel(model, folder, head, (*_earlier_use(saved, labels), *relabelled, *said))


def _load(
    config: RunConfig, folder: Path, held: Any, options: Mapping[str, Any], weights: Path, **more: Any
) -> tuple[Any, dict[str, Any]]:
    """Load the weights of a folder into the model that `held` describes; errors speak of `folder`."""
    import transformers

    task = tasks.of(config)
    transformers.utils.logging.disable_progress_bar()  # it would spoil the run's own lines
    try:
        with seeded(config.run.seed, "head"):
            model, info = getattr(transformers, task.auto).from_pretrained(weights, config=held, **options, **more)
    except Exception as error:  # what a folder holds makes a model's own code raise whatever it likes
        raise ModelError(f"cannot load '{folder}' for {task.name}: {first_line(error)}") from error
    return model, info


def _load_quantised(
    config: RunConfig, folder: Path, held: Any, dtype: torch.dtype, method: Quantization, load: Callable[..., Any]
) -> tuple[Any, dict[str, Any], list[str]]:
    """Load a base whose weights are held in fewer bits, from the cache where it is quantised here; and what to say."""
    on = {"device_map": {"": str(device())}} if device().type != "cpu" else {}
    weights, settings, said = folder, {}, list[str]()
    if method.settings is not None and getattr(held, "quantization_config", None) is None:
        plain, said = _kept_plain(config, held, dtype, method)
        double = config.model.double_quantization is not False
        settings = {"quantization_config": method.settings(Asked(dtype, plain, double))}

        def make() -> tuple[Any, set[str]]:
            model, info = load(folder, **on, **settings)
            _head_modules(model, info, tasks.of(config), folder)  # which raises for weights of something else
            lost = [entry[0] if isinstance(entry, tuple) else entry for entry in info.get("mismatched_keys", ())]
            return model, {*info.get("missing_keys", ()), *lost}

        facts = (dtype, plain, double, device().type, held.to_dict())
        kept = None
        if not config.model.trust_remote_code:
            try:
                kept = quantised_folder(folder, method, facts, make)
            except DataError as error:  # such as a full disk: what can run without goes on
                log.warning("every process quantises the base for itself: %s", error)
        if kept is not None:
            weights, held.quantization_config = kept, describe_base(config, kept).quantization_config
            settings = {}
    model, info = load(weights, **on, **settings)
    for module in model.modules():
        if method.holds(module):
            method.settle(module)
    return model, info, said


def _kept_plain(
    config: RunConfig, held: Any, dtype: torch.dtype, method: Quantization
) -> tuple[tuple[str, ...], list[str]]:
    """Name the modules of a model that are not quantised, as transformers reads them; and say which ought to have been.

    These are what gives scores, poolers, the head of a language model, and layers that the method cannot hold.
    """
    from transformers.pytorch_utils import Conv1D

    model = _skeleton(config, held, dtype)
    output = model.get_output_embeddings()
    names = {name for name, module in model.named_modules() if module is output or name.endswith("pooler.dense")}
    if tasks.of(config).has_head:
        names |= set(_scorers(model))
    inputs = {
        name: module.weight.shape[0 if isinstance(module, Conv1D) else 1]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and not _inside(name, tuple(names))
    }
    odd = {name: width for name, width in inputs.items() if width % method.multiple}
    if not odd:
        return tuple(sorted(names)), []
    widths = ", ".join(map(str, sorted(set(odd.values()))))
    theirs = f"{widths} inputs, which {method.library} cannot hold as {method.name} (no multiple of {method.multiple})"
    if len(odd) == len(inputs):
        raise ModelError(
            f"model.quantization = '{method.name}': all layers have {theirs}. Take another method, such as int8, or "
            "leave it unset."
        )
    return tuple(sorted({*names, *odd})), [f"{len(odd)} of {len(inputs)} layers stay as they are: {theirs}"]


def _skeleton(config: RunConfig, held: Any, dtype: torch.dtype) -> Any:
    """Return the model without its weights, as it would be loaded."""
    import transformers

    with torch_seed(0), torch.device("meta"):  # nothing is computed, nor drawn
        return getattr(transformers, tasks.of(config).auto).from_config(copy.deepcopy(held), dtype=dtype)


def _shared(config: RunConfig, folder: Path, held: Any, dtype: torch.dtype) -> Path:
    """Return the folder of the weights that a machine's processes share: in the cache, or the base's own."""
    if config.model.trust_remote_code:
        return folder  # whose code may do anything with its weights
    try:
        return mapped_folder(folder, dtype, partial(_skeleton, config, held, dtype))
    except DataError as error:  # such as a full disk: what can run without goes on
        log.warning("every process holds a copy of the base's weights: %s", error)
    except Exception as error:  # what a model's own code raises is said by the loading, in its context
        log.debug("%s: no shared weights: %s", folder, error)
    return folder


# what a model may do besides its scores: a run neither reads nor trains it
BESIDES = ("use_cache", "output_hidden_states", "output_attentions", "output_router_logits")


def _drop_besides(held: Any) -> None:
    for part in (held, held.get_text_config()):
        for name in BESIDES:
            if getattr(part, name, None):
                setattr(part, name, False)


def _of_this_run(task: Task, labels: Sequence[str]) -> dict[str, Any]:
    """Return what counts in place of a folder's own configuration, which may be of another use."""
    settings: dict[str, Any] = {"return_dict": True, "torchscript": False, "output_attentions": False}
    settings |= {"problem_type": None, **task.settings}
    if labels:
        settings |= {
            "num_labels": len(labels),
            "id2label": dict(enumerate(labels)),
            "label2id": {name: index for index, name in enumerate(labels)},
        }
    if len(labels) > 1:
        settings["problem_type"] = "single_label_classification"
    return settings


def _earlier_use(saved: Any, labels: Sequence[str]) -> Iterator[str]:
    kind = getattr(saved, "problem_type", None)
    if labels and kind not in (None, "single_label_classification"):
        yield (
            f"config.json says problem_type = '{kind}', from an earlier use; this run trains the cross-entropy of "
            f"{len(labels)} labels"
        )


def _to_labels(model: Any, head: Sequence[str], saved: Any, labels: Sequence[str], seed: int) -> list[str]:
    """Bring a saved head to the run's labels: its rows into their order, or all of them drawn anew for other labels.

    Names that are mere numbers, on either side, say nothing: then the head counts as it is.
    """
    before = [str(name) for _, name in sorted((saved.id2label or {}).items())]
    old, new = ([name.strip().casefold() for name in names] for names in (before, labels))
    if len(old) != len(new) or old == new or any(GENERIC.fullmatch(name) for name in [*old, *new]):
        return []
    scoring = list(scoring_layers(model, head, len(labels)).values())
    said = f"the saved head is for the labels {', '.join(before)[:200]}"
    if sorted(old) == sorted(new) and len(set(new)) == len(new):
        order = torch.tensor([old.index(name) for name in new])
        for tensor in (t for module in scoring for t in module.parameters(recurse=False) if len(t) == len(labels)):
            tensor.data = tensor.data[order]
        return [f"{said} in another order; its rows are put into that of the run's"]
    with seeded(seed, "head"):
        for module in scoring:
            marked: list[Any] = [module, *module.parameters(recurse=False)]
            for held in marked:
                held._is_hf_initialized = False
            model._init_weights(module)
    return [f"{said}, others than the run's; its last layer is drawn anew"]


def scoring_layers(model: nn.Module, head: Sequence[str], num_labels: int) -> dict[str, nn.Module]:
    """Return the layers of the head that give one number a label, by name."""
    # of each part of the head the last: inner layers may happen to be as wide
    last = {name.partition(".")[0]: name for name, _ in _scoring(model, num_labels) if _inside(name, head)}
    return {name: model.get_submodule(name) for name in last.values()}


GENERIC = re.compile(r"(label_?)?\d+")


def _scoring(model: nn.Module, num_labels: int) -> list[tuple[str, nn.Module]]:
    """Return the layers that give one number a label, in the model's order."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if any(tensor.ndim and len(tensor) == num_labels for tensor in module.parameters(recurse=False))
    ]


def _inside(name: str, modules: Sequence[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _head_modules(model: nn.Module, info: dict[str, Any], task: Task, folder: Path) -> tuple[str, ...]:
    """Name the scoring modules, and any that the checkpoint lacks: a random frozen layer would be lost on export."""
    head: list[str] = []
    if task.has_head:
        head += _scorers(model)
        head += [
            name for name, module in model.named_modules() if name.endswith(".pooler.dense") and _untrained(module)
        ]
    mismatched = [entry[0] if isinstance(entry, tuple) else entry for entry in info.get("mismatched_keys", ())]
    _check_weights(folder, head, info, mismatched)
    for key in [*info.get("missing_keys", ()), *mismatched]:
        module = key.rpartition(".")[0]
        if not _inside(module, head):
            head.append(module)
    if head and not task.has_head:
        raise ModelError(f"'{folder}' lacks weights for {', '.join(head)}; it is no complete causal language model.")
    return tuple(head)


def _scorers(model: nn.Module) -> list[str]:
    """Name what turns features into scores: the part beside the trunk, where a child is said to be the trunk.

    CLIP's classifiers, and others, say that it is a child which they do not have.
    """
    children = {name: child for name, child in model.named_children() if any(True for _ in child.parameters())}
    trunk = getattr(model, "base_model_prefix", "")
    scoring = [name for name, _ in _scoring(model, cast(Any, model).config.num_labels)][-1:]
    if trunk in children:
        head = [name for name in children if name != trunk]
        return head or scoring  # Perceiver scores inside its trunk
    # a lone child holds all there is
    return [name.partition(".")[0] if len(children) > 1 else name for name in scoring]


def _check_weights(folder: Path, head: Sequence[str], info: dict[str, Any], mismatched: Sequence[str]) -> None:
    """Raise ModelError where the weights are not those of the trunk that config.json describes."""
    extra = [key for key in info.get("unexpected_keys", ()) if ".lora_" in key or ".base_layer." in key]
    if extra:
        raise ModelError(
            f"the weights in '{folder}' hold an adapter's layers, such as {min(extra)}. Merge it into them "
            "(merge_and_unload, save_pretrained) and give the result."
        )
    wrong = [key for key in mismatched if not _inside(key, head)]
    # of a block, such as layer.3; what stands alone may be a pooler that was never saved
    wrong += [key for key in info.get("missing_keys", ()) if re.search(r"\.\d+\.", key) and not _inside(key, head)]
    if wrong:
        raise ModelError(
            f"the weights in '{folder}' are not those that its config.json describes: {len(wrong)} of its tensors are "
            f"missing or of another shape, such as {min(wrong)}. Save model and configuration together, with "
            "save_pretrained."
        )


def _untrained(module: nn.Module) -> bool:
    """Tell a layer that nobody has trained: its bias is still the zeros that it was made with.

    Sentence encoders such as all-MiniLM average the tokens, and ship BERT's pooler as it was drawn. Frozen, it would
    hide from the classifier what the text is about.
    """
    bias = getattr(module, "bias", None)
    return isinstance(bias, torch.Tensor) and not bias.any()

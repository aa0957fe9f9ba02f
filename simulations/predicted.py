"""What memory a worker will take at its peak, predicted from base and configuration: few terms, counted or measured.

The process's resident peak is

    libraries + weights + adapter + the larger of training and scoring,

in bytes. Training keeps of each token and block, beside what the vocabulary takes,

    STATES d + (3 if gated, else 1) m    numbers,

d being the width and m that of the feed-forward part: its gates are what a product of two keeps, the rest was counted
on SmolLM2 and MiniLM, where it agrees within a tenth. A block that runs again keeps AGAIN d, and one block at a time
the rest: d is its input, and the rest what glibc cannot use again between inputs that stay (measured). Attention in
torch's fused kernels keeps nothing of pairs of tokens; the plain one, which bf16 takes on a CPU, keeps its weights.
Logits are those of one block of positions three times (scores, their softmax, its gradient). Scoring holds what one
transformer block computes at a time. See docs/memory.md for what was measured.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedpeft.config import RunConfig, TrainConfig
from fedpeft.errors import FedpeftError
from fedpeft.training.optimizers import OPTIMIZERS

LIBRARIES = 690 * 10**6  # resident bytes of a process that has imported all and read a tokenizer and rows, on Linux
STATES, WORKING = 16, 6  # numbers a token and unit of width: kept for the gradient, and held by one block that scores
AGAIN = 7  # numbers a token and unit of width that a block takes which runs again
COPIES = 3  # of a block of logits at a time
HELD = 2  # numbers of each one trained: itself and its gradient; an optimiser's come on top
CLIPPED = 5  # at record level beside each row's gradient: the clipped sum, and noise and noised sum in float64
LOGITS = 2**25  # bytes of a block of logits, see `fedpeft.tasks.heads`
BITS = {"nf4": 4.5, "fp4": 4.5, "int8": 8.2}  # of a quantised weight, its scales included
# what transformers' configurations call the sizes of a model
WIDTH = ("hidden_size", "n_embd", "d_model", "dim")
INNER = ("intermediate_size", "n_inner", "ffn_dim", "hidden_dim")
DEPTH = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
HEADS = ("num_attention_heads", "n_head", "n_heads")


@dataclass(frozen=True)
class Prediction:
    """Bytes of a worker at its peak.

    Parameters
    ----------
    libraries, weights, adapter : int
        What is there as long as it works.
    training, scoring : int
        What comes and goes, logits included; the larger counts.
    """

    libraries: int
    weights: int
    adapter: int
    training: int
    scoring: int

    @property
    def working(self) -> int:
        """Bytes beside libraries."""
        return self.weights + self.adapter + max(self.training, self.scoring)

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.libraries + self.working

    def to_dict(self) -> dict[str, int]:
        """Return plain data."""
        return {"total": self.total, **asdict(self)}


@dataclass(frozen=True)
class _Sizes:
    """What a base's files say of it."""

    parameters: int
    gated: bool
    width: int
    inner: int
    depth: int
    heads: int
    vocabulary: int
    image_tokens: int


def predict(
    config: RunConfig, length: int | None = None, trained: int = 0, *, whole: bool = False
) -> Prediction | None:
    """Predict the peak of a worker of a run, from the base's files alone.

    Parameters
    ----------
    config : RunConfig
        Names base, precision and batches.
    length : int, optional
        Tokens of the longest row; ``data.max_length`` if not given.
    trained : int
        Numbers that a client trains.
    whole : bool
        Whether logits are computed of all positions at once, see `fedpeft.tasks.heads.runs_whole`.

    Returns
    -------
    Prediction or None
        None where the base is not at hand.
    """
    from fedpeft.models import base_folder
    from fedpeft.privacy.levels import level_of
    from fedpeft.tasks.classes import max_length

    try:
        folder = base_folder(config.model)
        sizes = _sizes(folder)
        tokens = sizes.image_tokens or length or config.data.max_length or max_length(config, folder)
    except (FedpeftError, OSError, ValueError):
        return None
    private = level_of(config.privacy).clients_add_noise
    train, run = config.train, config.run
    rows = (config.privacy.physical_batch_size or 2 * train.batch_size) if private else train.batch_size
    scored = max(tokens, min(run.evaluate_batch_size * tokens, run.evaluate_tokens))
    number = 2 if train.precision != "fp32" else 4
    return Prediction(
        libraries=LIBRARIES,
        weights=_weights(config, sizes, number),
        adapter=round(4 * trained * _of_each_trained(train, rows if private else 0)),
        training=_training(config, sizes, rows * tokens, tokens, number) + _logits(sizes, rows * tokens, whole=whole),
        scoring=number * scored * (WORKING * sizes.width + (3 if sizes.gated else 2) * sizes.inner)
        + _logits(sizes, scored, whole=whole),
    )


def _of_each_trained(train: TrainConfig, rows: int) -> float:
    """Return the numbers that are held of each one trained, where so many rows have gradients of their own."""
    anchor = 1 if train.proximal_mu else 0
    return HELD + OPTIMIZERS.find(train.optimizer).state_floats + anchor + (rows + CLIPPED if rows else 0)


def _weights(config: RunConfig, sizes: _Sizes, number: int) -> int:
    """Return the bytes of the base, of which a quantised one keeps its vocabulary as it is."""
    method = getattr(config.model, "quantization", None)
    if method is None:
        return sizes.parameters * number
    aside = sizes.vocabulary * sizes.width
    return round((sizes.parameters - aside) * BITS.get(method, 8.0) / 8) + aside * number


def _training(config: RunConfig, sizes: _Sizes, all_tokens: int, tokens: int, number: int) -> int:
    attention = 2 * sizes.heads * tokens if config.train.precision == "bf16" else 0
    of_block = STATES * sizes.width + (3 if sizes.gated else 1) * sizes.inner + attention
    kept = sizes.depth * of_block
    if config.train.gradient_checkpointing:
        kept = AGAIN * sizes.depth * sizes.width + of_block
    return number * all_tokens * kept


def _logits(sizes: _Sizes, positions: int, *, whole: bool) -> int:
    every = 4 * positions * sizes.vocabulary
    return COPIES * (every if whole else min(every, LOGITS))


def _sizes(folder: Path) -> _Sizes:
    """Read what a folder's configuration and weights say, without reading a weight.

    Raises
    ------
    ValueError
        A file is damaged.
    """
    from safetensors import SafetensorError

    described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    try:
        shapes = {name: shape for path in folder.glob("*.safetensors") for name, shape in _shapes(path)}
    except SafetensorError as error:
        raise ValueError(str(error)) from None
    parts = list(_parts(described))

    def largest(*names: str) -> int:
        return max((_size(each, names) for each in parts), default=0)

    image, patch = largest("image_size"), largest("patch_size")
    generates = any("CausalLM" in str(name) or "LMHead" in str(name) for name in described.get("architectures") or ())
    return _Sizes(
        parameters=sum(map(_count, shapes.values())),
        gated=any("gate_proj" in name or "gate_up_proj" in name for name in shapes),
        width=largest(*WIDTH),
        inner=largest(*INNER) or 4 * largest(*WIDTH),
        depth=largest(*DEPTH),
        heads=largest(*HEADS),
        vocabulary=largest("vocab_size") if generates else 0,
        image_tokens=(image // patch) ** 2 + 1 if image and patch else 0,
    )


def _shapes(path: Path) -> Iterator[tuple[str, Sequence[int]]]:
    """Yield the name and shape of each array in a file of safetensors, without reading any."""
    from safetensors import safe_open

    with safe_open(path, "np") as held:
        for name in held.keys():  # noqa: SIM118 - no mapping
            yield name, held.get_slice(name).get_shape()


def _count(shape: Sequence[int]) -> int:
    count = 1
    for length in shape:
        count *= length
    return count


def _parts(described: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield a configuration and those of its parts, such as ``vision_config``."""
    yield described
    for name, value in described.items():
        if name.endswith("_config") and isinstance(value, Mapping):
            yield from _parts(value)


def _size(described: Mapping[str, Any], names: Sequence[str]) -> int:
    found = (described.get(name) for name in names)
    return next((value for value in found if isinstance(value, int)), 0)

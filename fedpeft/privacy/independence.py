"""The proof that rows are independent, on the model at hand, before anything is released.

DP-SGD bounds what one row does to the sum by clipping that row's own gradient. This holds only if the gradient booked
on a row is its own: where it also depends on the other rows of the batch, a row moves THEIR gradients too, and no
clipping bounds that. What mixes rows may be anything: a layer that is shared with another input, attention or a norm
over the batch, experts of limited capacity, padding that is read, a mask or a position that follows from the longest
row. So nothing is concluded from what a model is made of. It is tried, on rows that are made up, words drawn from the
tokenizer and random pixels, encoded and padded as the run's own rows are; no client's row is looked at. The adapter is
moved away from where it starts, since a B of zeros would hide the gradient of A.

A model passes if

1. the gradients of single rows add up to autograd's own gradient of the summed loss;
2. each row's gradient in a batch is the one that it has alone;
3. each row's gradient stays the same when ANOTHER row is replaced: by one that pads the batch no differently, and by
   one as long as the run allows;
4. and so it does in a batch as large as a step ever holds, and in one that has no padding.

Every trained tensor is held against its own size, so that a head's large gradient hides no small one.

**Tolerances.** In step 3, where shapes stay, the very same kernels work on the very same numbers: the difference is
zero (measured so on 16 architectures, in both precisions), and `EXACT` only leaves room for kernels that add up in any
order, as some do on GPUs. Where shapes change, sums are cut into other pieces. In float32 that is a few 1e-6 of a
tensor's gradient (measured: 4e-6 at most), and rows that are mixed change it by percents; `ROUNDING` lies between. In
bf16, which has 8 bits, it is up to two percents: there `ROUNDING` only shows what is gross, such as a classifier that
reads padding, and the comparison at equal shapes decides. A tensor whose
gradient cancels out, to a share of `FLOOR` of the row's whole gradient, has no size to be held against; at that share
it could not move the clipped sum of thousands of rows by a thousandth of the bound.

What is shown is shown for the rows tried. A model that mixes rows under rarer conditions than these would pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import PIL.Image
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fedpeft import tasks
from fedpeft.adapters.adapted import AdaptedModel
from fedpeft.config import TrainConfig
from fedpeft.data.conversations import made_up
from fedpeft.data.splits import EncodedSplit
from fedpeft.data.tokens import load_tokenizer
from fedpeft.errors import PrivacyError
from fedpeft.models import torch_seed
from fedpeft.privacy.dp_sgd import RowEngine, advice, layer_of
from fedpeft.resident import Resident
from fedpeft.seeds import derive_seed, generator
from fedpeft.tasks.classes import max_length
from fedpeft.tasks.encoding import encode_table
from fedpeft.training.batched.layers import drop_rates
from fedpeft.training.local import training_mode
from fedpeft.training.neftune import EmbeddingNoise

# relative to the norm of a row's gradient of one tensor, by train.precision
EXACT = {"fp32": 1e-5, "bf16": 1e-2}
ROUNDING = {"fp32": 1e-3, "bf16": 0.1}
FLOOR = {"fp32": 1e-7, "bf16": 1e-5}  # of the row's gradient over all tensors
MOVED = 0.05  # how far a tensor of zeros is moved, and others by half of their own size

LENGTHS = (3, 5, 14, 9)  # of the probe's rows, in words; the last one replaces a shorter and pads no differently
Gradients = dict[str, Tensor]  # (b, *shape) of each trained tensor


def row_engine(home: Resident) -> RowEngine:
    """Return what gives the resident model's gradients row by row; made once rows are shown independent, and kept.

    Raises
    ------
    PrivacyError
        The model mixes rows, or gives no gradient of each.
    """
    return home.once(_proven)


def _proven(home: Resident) -> RowEngine:
    engine = RowEngine(home.adapted)
    try:
        prove_independence(home, engine)
    except BaseException:
        engine.close()  # who asks again is told again
        raise
    return engine


def prove_independence(home: Resident, engine: RowEngine) -> None:
    """Show that no row's gradient depends on another row, or refuse the model.

    The model is left as it was, its weights, modes and random numbers included.

    Parameters
    ----------
    home : Resident
        Model, tokenizer or processor, and settings; its rows are not looked at, only how large an image is.
    engine : RowEngine
        What gives gradients of single rows in training.

    Raises
    ------
    PrivacyError
        Rows are mixed, or have no gradients of their own; names the tensor, and what to do.
    """
    adapted = engine.adapted
    with probing(adapted, home.config.run.seed):
        trial = _Trial(engine, public_rows(home), home.config.train)
        whole = trial.gradients([0, 1, 2])
        trial.compare(whole, trial.gradients([0, 1, 2], seed=1), [0, 1, 2], [0, 1, 2], EXACT, RANDOM)
        for batch in ([3, 1, 2], [0, 3, 2], [4, 1, 2], [0, 1, 4]):
            kept = [place for place in range(3) if batch[place] == place]
            same_width = trial.width(batch) == trial.width([0, 1, 2])
            trial.compare(whole, trial.gradients(batch), kept, kept, EXACT if same_width else ROUNDING, MIXED)
        for row in range(3):
            trial.compare(whole, trial.gradients([row]), [row], [0], ROUNDING, ALONE)
        if (more := home.physical_rows - 3) > 0:
            many = trial.gradients([0, 1, 2, *[3] * more])
            trial.compare(whole, many, [0, 1, 2], [0, 1, 2], ROUNDING, MIXED)
            others = trial.gradients([0, 1, 2, *[1] * more])
            trial.compare(many, others, [0, 1, 2], [0, 1, 2], EXACT, MIXED)
        trial.compare(trial.gradients([4, 5]), trial.gradients([4]), [0], [0], ROUNDING, ALONE)


ALONE = "gives a row another gradient beside other rows than alone"
MIXED = "gives a row another gradient when ANOTHER row of its batch is replaced"
RANDOM = "draws random numbers in training besides dropout, so that the independence of rows cannot be shown"
ELSEWHERE = "uses what is trained in another way than its layer is called, and rows' gradients do not show it"


class _Trial:
    """Gradients of the probe's rows, and their comparison."""

    def __init__(self, engine: RowEngine, rows: EncodedSplit, train: TrainConfig) -> None:
        self.engine, self.rows, self.precision = engine, rows, train.precision
        self.noise = EmbeddingNoise(engine.adapted.model, train.neftune_alpha, by_place)

    def width(self, batch: Sequence[int]) -> int:
        """Return to how many tokens a batch is padded."""
        return int(self.rows.lengths[list(batch)].max())

    def gradients(self, batch: Sequence[int], seed: int = 0) -> Gradients:
        """Return the gradients of these rows, which must add up to the batch's."""
        engine, adapted = self.engine, self.engine.adapted
        engine.reset()
        parameters = [adapted.parameter(name) for name in adapted.trained]
        with torch_seed(seed):
            try:
                engine.backward(self.rows.batch(batch), self.precision, self.noise)
            except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
                what = (str(error).strip().splitlines() or [""])[0][:200]
                raise PrivacyError(
                    f"privacy.level = 'record': '{adapted.base.folder}' cannot be trained row by row: a step on rows "
                    f"that were made up ended in {type(error).__name__}: {what}. {advice(adapted, ())}"
                ) from error
        engine.check(parameters, len(batch))
        found: Gradients = {}
        sums: Gradients = {}
        for name, parameter in zip(adapted.trained, parameters, strict=True):
            held: Any = parameter
            found[name] = held.grad_sample.detach().float()
            sums[name] = (torch.zeros_like(parameter) if held.grad is None else held.grad.detach().float())[None]
            held.grad = held.grad_sample = None
        added = {name: gradient.sum(0, keepdim=True) for name, gradient in found.items()}
        sizes = {name: _norms(gradient).sum()[None] for name, gradient in found.items()}  # rows may cancel out
        self.compare(sums, added, [0], [0], ROUNDING, ELSEWHERE, sizes)
        return found

    def compare(
        self,
        one: Gradients,
        other: Gradients,
        rows: Sequence[int],
        places: Sequence[int],
        tolerance: Mapping[str, float],
        what: str,
        sizes: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Raise PrivacyError where gradients of the same rows differ.

        Parameters
        ----------
        one, other : mapping of str to Tensor
            Gradients of two batches.
        rows, places : sequence of int
            Where the rows to compare are in the first batch, and in the second.
        tolerance : mapping of str to float
            By precision.
        what : str
            What the model does if they differ.
        sizes : mapping of str to Tensor, optional
            What differences are held against, ``(rows,)`` each; the norms of the first gradients if not given.
        """
        if sizes is None:
            sizes = {name: _norms(one[name][rows]) for name in one}
        total = torch.stack(list(sizes.values())).pow(2).sum(0).sqrt()  # (rows,)
        worst, found = 1.0, ""
        for name in one:
            allowed = tolerance[self.precision] * sizes[name] + FLOOR[self.precision] * total
            excess = float((_norms(one[name][rows] - other[name][places]) / allowed.clamp(min=1e-30)).max())
            if not excess <= worst:  # NaN is no proof either
                worst, found = excess, name
        if found:
            adapted = self.engine.adapted
            raise PrivacyError(
                f"privacy.level = 'record': '{adapted.base.folder}' {what} (seen at '{layer_of(found)}'), so that "
                f"clipping does not bound what one row does to the sum. {advice(adapted, ())}"
            )


def by_place(like: Tensor) -> Tensor:
    """Return numbers in [-1, 1] for embeddings ``(b, t, d)``, drawn by nobody: the same for a row in any batch."""
    tokens, width = (torch.arange(size, device=like.device, dtype=torch.float32) for size in like.shape[1:])
    return torch.sin((1 + tokens[:, None]) * (1 + width)).expand(like.shape)


def _norms(gradients: Tensor) -> Tensor:
    norms: Tensor = gradients.flatten(1).double().norm(dim=1)
    return norms


# --- rows that belong to nobody ----------------------------------------------------------------------------------


def public_rows(home: Resident) -> EncodedSplit:
    """Make up rows, and encode them as the run's own: three of different lengths, one between, two as long as allowed.

    Parameters
    ----------
    home : Resident
        Gives tokenizer or image processor, and labels.
    """
    config = home.config
    rng = generator(0, "public rows")
    columns: dict[str, list[Any]] = {"row": list(range(1, 7))}
    for column in tasks.of(config).columns:
        if column.kind == "image":
            pixels = rng.integers(0, 256, (6, 64, 64, 3), dtype=np.uint8)
            columns[column.name] = [PIL.Image.fromarray(image) for image in pixels]
        elif column.kind == "text" and column.named(config.data) is not None:
            columns[column.name] = _made_up_texts(home, rng)
        elif column.kind == "conversation":
            asked, told = _made_up_texts(home, rng), _made_up_texts(home, rng)
            columns |= made_up(asked, told, layout=config.data.layout)
        elif column.kind == "label":
            columns[column.name] = [index % len(home.labels) for index in range(6)]
        elif column.kind == "number":
            columns[column.name] = rng.normal(size=6).tolist()
    return encode_table(config, home.folder, datasets.Dataset.from_dict(columns), home.labels)


def _made_up_texts(home: Resident, rng: np.random.Generator) -> list[str]:
    tokenizer, _ = load_tokenizer(home.config, home.folder)
    special = set(tokenizer.all_special_ids)
    ids = np.array([index for index in range(len(tokenizer)) if index not in special])
    lengths = (*LENGTHS, *[2 * max_length(home.config, home.folder)] * 2)
    return [str(tokenizer.decode(rng.choice(ids, count).tolist())).strip() or "a" for count in lengths]


# --- a model as it is in training, but still ---------------------------------------------------------------------


@contextlib.contextmanager
def probing(adapted: AdaptedModel, seed: int) -> Iterator[None]:
    """Let a model train on made-up rows inside the block: adapter moved, no dropout; leave it as it was.

    Parameters
    ----------
    adapted : AdaptedModel
        The model.
    seed : int
        Draws where the adapter is moved to.
    """
    model = adapted.model
    flags = {name: adapted.parameter(name).requires_grad for name in adapted.trained}
    gradients = {name: adapted.parameter(name).grad for name in adapted.trained}
    tensors = {name: adapted.parameter(name).detach().clone() for name in adapted.trained}
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    modes = {module: module.training for module in model.modules()}
    rates = [(module, name, rate) for module in model.modules() for name, rate in drop_rates(module)]
    try:
        with torch_seed(derive_seed(seed, "probe")), torch.no_grad():
            for name, tensor in tensors.items():
                size = tensor.pow(2).mean().sqrt() if tensor.numel() else tensor.new_zeros(())
                adapted.parameter(name).add_(torch.randn_like(tensor) * (0.5 * size if size > 0 else MOVED))
        adapted.begin_training(adapted.trained)
        training_mode(model)
        for module, name, _ in rates:
            vars(module)[name] = 0.0
        with _NoDropout(), torch.enable_grad():
            yield
    finally:
        for module, name, rate in rates:
            vars(module)[name] = rate
        for module, training in modes.items():
            module.training = training
        with torch.no_grad():
            for buffer, held in buffers:
                buffer.copy_(held)
            for name, tensor in tensors.items():
                adapted.parameter(name).copy_(tensor)
        adapted.begin_training([name for name, flag in flags.items() if flag])
        for name, gradient in gradients.items():
            adapted.parameter(name).grad = gradient


class _NoDropout(TorchFunctionMode):
    """Leave out dropout that a model asks torch for, wherever it has the rate from."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if "dropout" in name:
            return args[0] if args else kwargs["input"]
        if name == "scaled_dot_product_attention":
            kwargs = {**kwargs, "dropout_p": 0.0}
            args = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args
            if len(args) > 4:
                del kwargs["dropout_p"]
        return func(*args, **kwargs)

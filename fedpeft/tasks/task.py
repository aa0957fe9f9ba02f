"""What a task is: all that the rest of the code needs to know of what a model is trained for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpeft.data.columns import Column

if TYPE_CHECKING:
    import datasets
    from torch import Tensor

    from fedpeft.bases import Inputs
    from fedpeft.config import RunConfig
    from fedpeft.data.readers import Place
    from fedpeft.data.splits import Encoding

Encode = Callable[["RunConfig", Path, "Inputs", "Place", "datasets.Dataset"], "Encoding"]
Losses = Callable[["Tensor", "Tensor"], "tuple[Tensor, Tensor]"]


@dataclass(frozen=True)
class Task:
    """What a model is trained for.

    Parameters
    ----------
    name : str
        What ``model.task`` takes.
    auto : str
        The class of transformers that loads a base for it.
    peft : str or None
        Name of PEFT's task type; None where PEFT has none for it.
    columns : tuple of Column
        What it reads of each row.
    encode : callable
        Makes tensors of rows: ``(config, model_dir, inputs, place, rows)`` to `fedpeft.data.splits.Encoding`. Columns
        of labels and numbers are not its own to encode.
    losses : callable
        Makes losses of a model's scores: ``(logits, targets)`` to the sum of each row's losses, ``(b,)``, float64, and
        what that sum counts, ``(b,)``, int64. `targets` are ``batch["labels"]`` of `EncodedSplit`, and no row's loss
        may depend on another row. Training, scoring and private training all use this one.
    metrics : tuple of str
        What is reported besides the loss, see `fedpeft.tasks.metrics`; the first one judges a run.
    predict : callable, optional
        Makes of logits what metrics hold against the targets, one entry a row; none where metrics need the loss only.
    spoken_by : tuple of str
        Keys of the section `data` that say, where one is set, that this is the task. For tasks of this package.
    settings : mapping
        Fields of the base's configuration, besides those that follow from labels.
    has_head : bool
        Whether scores come from a head of the run's own, which is drawn where the checkpoint has none that fits; else
        a base lacking a weight is refused.
    per_token : bool
        Whether each token has scores of its own, rather than each row.
    continues : bool
        Whether a token is predicted by those before it, so that a model must not see what comes after.
    reads_last_token : bool
        Whether models may take their scores from a row's last token, for which they must know what pads.
    max_grad_norm : float
        What whole gradients are clipped to where ``train.max_grad_norm`` is unset; 0 is off.
    """

    name: str
    auto: str
    peft: str | None
    columns: tuple[Column, ...]
    encode: Encode
    losses: Losses
    metrics: tuple[str, ...]
    predict: Callable[[Tensor], Tensor] | None = None
    spoken_by: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    has_head: bool = True
    per_token: bool = False
    continues: bool = False
    reads_last_token: bool = False
    max_grad_norm: float = 0.0

    @property
    def main_metric(self) -> str:
        """The metric by which runs are judged."""
        return self.metrics[0] if self.metrics else "loss"

    @property
    def has_labels(self) -> bool:
        """Whether rows have labels, whose names a run must know."""
        return any(column.kind == "label" for column in self.columns)

    @property
    def reads_images(self) -> bool:
        """Whether rows hold images, rather than texts."""
        return any(column.kind == "image" for column in self.columns)

    @property
    def reads_conversations(self) -> bool:
        """Whether rows are conversations, completions of prompts or raw texts, in one of several layouts."""
        return any(column.kind == "conversation" for column in self.columns)

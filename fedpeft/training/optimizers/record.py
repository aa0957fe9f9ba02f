"""What is known of a client's optimiser."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class OptimizerOptions(BaseModel):
    """The options of one optimiser, which stand under ``[train]``; closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True)
class Optimizer:
    """An optimiser that clients train with; it begins afresh each round.

    Parameters
    ----------
    name : str
        What ``train.optimizer`` takes.
    description : str
        One line.
    options : type of OptimizerOptions
        Its own keys under ``[train]``, with types, defaults and descriptions.
    build : callable
        Makes torch's optimiser of the live parameters by name, the learning rate and the options. The rate of each
        parameter group is set anew before every step.
    first_step : callable
        Of a gradient and a learning rate: the change that the first step makes to a weight, with default options.
    state_floats : float
        Floats that it keeps for each trained one, with default options; of large tensors, where that depends on size.
    needs_pairs : bool
        Whether its rule is of factors A and B together, so that it must find both of each.
    elementwise : bool
        Whether it steps each number by what is known of that number alone, so that stacked tensors of many clients
        make the steps that each would make.
    plain : callable
        Tells of options whether each step is the learning rate times the gradient (which weight decay is a part of).
    not_private : str
        Why it must not be used at record level: something besides the clipped and noised gradient would enter its
        steps. Empty where a step is post-processing of that gradient and of what is public.
    needs : str
        A package that it imports and that does not come with fedpeft.
    extra : str
        The extra of fedpeft that brings this package.
    """

    name: str
    description: str
    options: type[OptimizerOptions]
    build: Callable[[Mapping[str, torch.nn.Parameter], float, Any], torch.optim.Optimizer]
    first_step: Callable[[Tensor, float], Tensor]
    state_floats: float
    needs_pairs: bool = False
    elementwise: bool = False
    plain: Callable[[Any], bool] = lambda options: False
    not_private: str = ""
    needs: str = ""
    extra: str = ""

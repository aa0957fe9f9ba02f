"""What a way of holding a frozen base in fewer bits is: a record, whose fields are all that other code knows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedpeft.deferred import installed
from fedpeft.errors import ModelError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Saved = Mapping[str, Any]  # quantization_config of a base's config.json


@dataclass(frozen=True)
class Asked:
    """What a base is quantised for.

    Parameters
    ----------
    dtype : torch.dtype
        What layers compute in.
    plain : tuple of str
        Names of the modules that stay as they are: what gives scores, and the head of a language model.
    double : bool
        Whether the scales are quantised too.
    """

    dtype: torch.dtype
    plain: tuple[str, ...]
    double: bool


def nothing(layer: nn.Module) -> None:
    """Leave a layer as it was loaded."""


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """A way of holding a frozen base in fewer bits.

    Parameters
    ----------
    name : str
        ``model.quantization``; of what only saved bases have, what errors call it.
    bits : float
        Of a weight, its scales included.
    library : str
        The module that has the layers.
    pip : str
        What installs it.
    saved : str
        ``quant_method`` of a base's config.json.
    recognises : callable
        Tells whether a ``quantization_config`` of that method is this one.
    holds : callable
        Tells whether a layer is held so.
    dequantise : callable
        Returns such a layer's weight in float32, ``(d_out, d_in)``.
    settings : callable, optional
        Returns transformers' configuration of it; None where a base must have been saved so.
    doubles : bool
        Whether its scales can be quantised too.
    devices : tuple of str
        Where it computes.
    settle : callable
        Called with each of its layers after loading; may raise ModelError where one cannot be computed with.
    multiple : int
        Of which a layer's number of inputs has to be a multiple; others stay as they are.
    steady : bool
        Whether a layer computes in scoring what it computes in training.
    """

    name: str
    bits: float
    library: str
    pip: str
    saved: str
    recognises: Callable[[Saved], bool]
    holds: Callable[[nn.Module], bool]
    dequantise: Callable[[nn.Module], Tensor]
    settings: Callable[[Asked], Any] | None = None
    doubles: bool = False
    devices: tuple[str, ...] = ("cpu", "cuda")
    settle: Callable[[nn.Module], None] = nothing
    multiple: int = 1
    steady: bool = True

    def check(self, device: str, by: str) -> None:
        """Raise ModelError where this machine cannot hold a base so.

        Parameters
        ----------
        device : str
            Type of the device that the model is to be on.
        by : str
            What asks for it, for the error.
        """
        if not installed(self.library):
            raise ModelError(f"{by} needs the package {self.library}, which is not installed: pip install {self.pip}")
        if device not in self.devices:
            raise ModelError(
                f"{by} computes on {', '.join(self.devices)} alone, and this process has {device}; "
                "leave model.quantization unset or take another."
            )


def of_class(library: str, name: str) -> Callable[[nn.Module], bool]:
    """Return what tells layers of a class, or derived from it, without importing its library."""

    def holds(module: nn.Module) -> bool:
        return any(
            each.__name__ == name and each.__module__.partition(".")[0] == library for each in type(module).mro()
        )

    return holds


def by_asking(module: nn.Module) -> Tensor:
    """Return a linear layer's weight in float32 ``(d_out, d_in)``, as what it answers to unit vectors."""
    import torch

    layer: Any = module
    on = next(tensor for tensor in (*layer.buffers(), *layer.parameters())).device
    units = torch.eye(layer.in_features, device=on, dtype=torch.float16 if on.type == "cuda" else torch.float32)
    with torch.no_grad():
        answers = layer(units).float() - layer(torch.zeros_like(units[:1])).float()  # less the bias
    weight: Tensor = answers.T.contiguous()
    return weight

"""Dropout of a base: found by its name in a configuration and by its kind in a model, whatever the architecture."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

# whole layers or branches that are left out: no masks over activations, and no probability for them is asked for
PATHS = ("path", "layerdrop")


def configure_dropout(config: Any, probability: float) -> None:
    """Set every dropout that a model's configuration names, before the model is made of it.

    Parameters
    ----------
    config : transformers.PretrainedConfig
        Changed in place, with all that it holds of parts.
    probability : float
        Of each element of an activation to be zeroed in training; 0 also keeps every layer and branch.
    """
    for name, value in list(vars(config).items()):
        if hasattr(value, "get_text_config"):  # the configuration of a part, such as an encoder's
            configure_dropout(value, probability)
        elif _is_probability(name, value):
            chosen = 0.0 if _skips(name) else probability
            # some configurations are strict about types, and hold a whole number where none is dropped
            setattr(config, name, int(chosen) if isinstance(value, int) and chosen == int(chosen) else chosen)


def set_dropout(model: nn.Module, probability: float) -> None:
    """Set every dropout that a model holds itself: its modules', and the probabilities that attention keeps.

    Parameters
    ----------
    model : torch.nn.Module
        Changed in place; it has no adapter yet, whose dropout is its own.
    probability : float
        As in `configure_dropout`.
    """
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = probability
            continue
        for name, value in list(vars(module).items()):
            if _is_probability(name, value):
                setattr(module, name, 0.0 if _skips(name) else probability)


def has_dropout(model: nn.Module) -> bool:
    """Tell whether a model in training mode draws anything: some module or configuration holds a probability."""
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            if module.p > 0:
                return True
        elif any(value > 0 for name, value in vars(module).items() if _is_probability(name, value)):
            return True
    return False


def _is_probability(name: str, value: object) -> bool:
    # a classifier's dropout may be None: then the model takes another one's, which is set as well
    return "drop" in name and isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _skips(name: str) -> bool:
    return any(part in name for part in PATHS)

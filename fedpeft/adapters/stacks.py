"""The blocks that a model runs its hidden states through, found by the model's structure, and a choice of them.

A stack is an outermost `torch.nn.ModuleList` of two or more modules of one class, such as ``encoder.layer`` of BERT. Of
several the longest counts. An encoder-decoder has one for each half; its blocks are counted through, those of the
encoder first.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Any

from torch import nn

from fedpeft.errors import AdapterError

ENDS = re.compile(r"(first|last)\s*:\s*(\d+)")
NUMBERS = re.compile(r"\d+(\s*,\s*\d+)*")


def blocks_of(model: nn.Module, head: Collection[str] = ()) -> dict[str, nn.Module]:
    """Return the blocks by name, in the order in which they are counted; empty where there is no stack.

    Parameters
    ----------
    model : torch.nn.Module
        A transformers model, with or without adapted layers.
    head : collection of str
        Names of modules to leave out.
    """
    found: list[tuple[str, nn.ModuleList]] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer, _ in found)
        of_head = any(name == each or name.startswith(f"{each}.") for each in head)
        if isinstance(module, nn.ModuleList) and not inside and not of_head and _alike(module):
            found.append((name, module))
    if not found:
        return {}
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        found = [max(found, key=lambda each: len(each[1]))]  # the first of equally long ones
    return {f"{name}.{number}": block for name, stack in found for number, block in enumerate(stack)}


def _alike(stack: nn.ModuleList) -> bool:
    return len(stack) > 1 and len({type(block) for block in stack}) == 1 and any(True for _ in stack[0].children())


def chosen_blocks(blocks: Collection[str], layers: str) -> list[str]:
    """Return the names of the blocks that ``adapter.layers`` asks for.

    Parameters
    ----------
    blocks : collection of str
        All there are, in order.
    layers : str
        ``last:2``, ``first:3``, or numbers from 0 such as ``0,1,5``.

    Raises
    ------
    AdapterError
        Anything else, or more than there are.
    """
    names, asked = list(blocks), layers.strip()
    if found := ENDS.fullmatch(asked):
        count = int(found[2])
        if 1 <= count <= len(names):
            return names[:count] if found[1] == "first" else names[-count:]
    elif NUMBERS.fullmatch(asked):
        numbers = sorted({int(number) for number in asked.split(",")})
        if numbers[-1] < len(names):
            return [names[number] for number in numbers]
    if not names:
        raise AdapterError(
            f"adapter.layers = '{layers}': this model has no stack of equal blocks to count; drop it, and name modules "
            "by adapter.targets."
        )
    raise AdapterError(
        f"adapter.layers = '{layers}': this model has {len(names)} blocks, {names[0]} to {names[-1]}. Allowed: "
        f"first:1 to first:{len(names)}, last:1 to last:{len(names)}, or numbers of 0 to {len(names) - 1} such as "
        f"0,{len(names) - 1}."
    )


def within(model: Any, head: Collection[str], names: Iterable[str], layers: str | None) -> list[str]:
    """Return those of some modules that lie in the chosen blocks, or in no block at all, such as a pooler.

    Parameters
    ----------
    model : torch.nn.Module
        The base.
    head : collection of str
        Names of its head's modules.
    names : iterable of str
        Names of the modules.
    layers : str or None
        ``adapter.layers``; None takes all.
    """
    if layers is None:
        return list(names)
    blocks = blocks_of(model, head)
    others = blocks.keys() - chosen_blocks(blocks, layers)
    return [name for name in names if not any(name == other or name.startswith(f"{other}.") for other in others)]

"""Factors of embeddings: what PEFT keeps as ``lora_embedding_A`` and ``lora_embedding_B``.

An embedding looks up a row of its weight W ``(vocabulary, d)``, which is W' times a vector with a single 1: a linear
layer of d_in = vocabulary and d_out = d. Its update there is s B A, with A ``(r, vocabulary)`` and B ``(d, r)``, as of
any other layer, and methods see no difference; what is added to W is the transpose. A mark in the layer's name says how
PEFT calls the two.

As PEFT draws them, A is zero and B random, where of a linear layer B is zero: a token that no row has stays as it is.
"""

from __future__ import annotations

from fedpeft.adapters.state import A_SUFFIX, B_SUFFIX

TOKENS = "#tokens"  # after the name of an embedding
PEFT_A, PEFT_B = ".lora_embedding_A", ".lora_embedding_B"
NAMES = {PEFT_A: TOKENS + A_SUFFIX, PEFT_B: TOKENS + B_SUFFIX}


def is_embedding(layer: str) -> bool:
    """Tell whether a layer, by its name here, is an embedding."""
    return layer.endswith(TOKENS)


def named(name: str) -> str:
    """Return the name that a tensor of PEFT's has here."""
    for theirs, ours in NAMES.items():
        if name.endswith(theirs):
            return name.removesuffix(theirs) + ours
    return name


def saved_name(name: str) -> str:
    """Return the name that PEFT saves a tensor by; what `named` reads."""
    for theirs, ours in NAMES.items():
        if name.endswith(ours):
            return name.removesuffix(ours) + theirs
    return name

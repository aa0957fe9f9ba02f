"""What the kinds need besides a rank on layers of 8 to 24 inputs and outputs."""

from __future__ import annotations

from typing import Any

import pytest

PROMPT = {"num_virtual_tokens": 3, "targets": None, "data__max_length": 40}
SMALL: dict[str, dict[str, Any]] = {
    "vblora": {"vector_length": 8, "num_vectors": 12},
    "unilora": {"theta_d_length": 64},
    "tinylora": {"u": 3},
    "adamss": {"num_subspaces": 2},
    **dict.fromkeys(("prompt-tuning", "prefix-tuning", "p-tuning"), PROMPT),
    "c3a": {"block_size": 8},
    "fourierft": {"n_frequency": 30},
    "waveft": {"n_frequency": 30},
    "oft": {"oft_block_size": 4},
    "road": {"group_size": 8},
    "supertuning": {"sparsity": 0.8},
}


@pytest.fixture(scope="session")
def small() -> dict[str, dict[str, Any]]:
    """Options of the kinds whose defaults are for larger layers, as keyword arguments of a configuration."""
    return {
        kind: {name if "__" in name else f"adapter__{name}": value for name, value in options.items()}
        for kind, options in SMALL.items()
    }

"""What the kinds need besides a rank on layers of 8 to 24 inputs and outputs."""

from __future__ import annotations

from typing import Any

import pytest

SMALL: dict[str, dict[str, Any]] = {
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
    return {kind: {f"adapter__{option}": value for option, value in options.items()} for kind, options in SMALL.items()}

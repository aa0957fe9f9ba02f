"""What a run was made with: software, hardware and the commit that it is run from."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

PACKAGES = (
    *("fedpeft", "torch", "transformers", "peft", "opacus", "flwr", "ray"),
    *("datasets", "flwr-datasets", "numpy", "safetensors"),
)


def versions() -> dict[str, str]:
    """Return the installed versions of the packages that results depend on."""
    installed = {}
    for package in PACKAGES:
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            installed[package] = "not installed"
    return installed


def source_revision() -> str | None:
    """Return the git commit that this package is run from, with ``+`` if files differ; None outside a checkout."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return None
    ask = ["git", "-C", str(folder)]
    try:
        commit = subprocess.run(
            [*ask, "rev-parse", "HEAD"], capture_output=True, encoding="utf-8", check=True, timeout=10
        ).stdout.strip()
        dirty = subprocess.run(
            [*ask, "status", "--porcelain"], capture_output=True, encoding="utf-8", check=True, timeout=10
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+" if dirty else "")


def environment() -> dict[str, Any]:
    """Describe software and hardware."""
    import torch

    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "packages": versions(),
        "source_revision": source_revision(),
    }

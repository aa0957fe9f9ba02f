"""Silence for the libraries below, so that what is printed is what a user asked about; ``-v`` lets them speak."""

from __future__ import annotations

import logging
import os
import sys
import warnings

QUIET_ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}
LOUD = (
    *("flwr", "transformers", "datasets", "peft", "ray", "filelock", "huggingface_hub", "matplotlib"),
    *("bitsandbytes", "torchao", "torch.utils._pytree"),  # what they say as they are imported
    "lm_eval",
)


def silence() -> None:
    """Quieten libraries by environment variables and log levels; call it before they are imported."""
    for name, value in QUIET_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if sys.stderr is None or not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # bars that nobody sees move
    for name in LOUD:
        logging.getLogger(name).setLevel(logging.CRITICAL if name == "ray" else logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)

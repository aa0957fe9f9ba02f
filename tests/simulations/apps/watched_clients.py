"""fedpeft's own ClientApp in workers that tests watch, and kill, by files in a folder."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from torch.optim.optimizer import register_optimizer_step_post_hook

from fedpeft.clients.app import app as app

FOLDER = Path(os.environ["FEDPEFT_TEST_WATCH"])
WATCHED = ("config.json", "tokenizer.json")


def _die_if_asked(*_: Any) -> None:
    """Be killed after a step of training where the file ``death`` is, which only one worker can take away."""
    try:
        (FOLDER / "death").unlink()
    except FileNotFoundError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


def _note_opened(event: str, arguments: tuple[Any, ...]) -> None:
    """Write down which of a model's files this process opens."""
    if event == "open" and str(arguments[0]).endswith(WATCHED):
        with (FOLDER / f"opened-{os.getpid()}").open("a", encoding="utf-8") as file:
            file.write(f"{arguments[0]}\n")


register_optimizer_step_post_hook(_die_if_asked)
sys.addaudithook(_note_opened)

"""A completion for each prompt, token by token; the loss counts the completion alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fedpeft.data.columns import Column
from fedpeft.tasks.losses import next_token_losses
from fedpeft.tasks.task import Task

if TYPE_CHECKING:
    import datasets

    from fedpeft.bases import Inputs
    from fedpeft.config import RunConfig
    from fedpeft.data.readers import Place
    from fedpeft.data.splits import Encoding


def encode(config: RunConfig, model_dir: Path, inputs: Inputs, place: Place, rows: datasets.Dataset) -> Encoding:
    """Tokenise prompt and completion, as one exchange where the tokenizer has a chat template."""
    from fedpeft.data.tokens import encode_texts

    return encode_texts(config, model_dir, inputs, place, rows)


TASK = Task(
    name="causal-lm",
    auto="AutoModelForCausalLM",
    peft="CAUSAL_LM",
    columns=(Column("prompt", "text"), Column("completion", "text")),
    encode=encode,
    losses=next_token_losses,
    metrics=("perplexity",),
    spoken_by="completion",
    has_head=False,
    per_token=True,
    continues=True,
)

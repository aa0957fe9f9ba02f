"""A completion for each prompt, token by token; the loss counts the completion alone."""

from __future__ import annotations

from fedpeft.data.columns import Column
from fedpeft.tasks.inputs import conversations
from fedpeft.tasks.losses import next_token_losses
from fedpeft.tasks.task import Task

TASK = Task(
    name="causal-lm",
    auto="AutoModelForCausalLM",
    peft="CAUSAL_LM",
    columns=(Column("prompt", "text"), Column("completion", "text")),
    encode=conversations,
    losses=next_token_losses,
    metrics=("perplexity",),
    spoken_by="completion",
    has_head=False,
    per_token=True,
    continues=True,
)

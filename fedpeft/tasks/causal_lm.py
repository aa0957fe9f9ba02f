"""Answers in conversations, completions of prompts, or raw texts, token by token; the loss counts these alone."""

from __future__ import annotations

from fedpeft.data.columns import Column
from fedpeft.tasks.inputs import conversations
from fedpeft.tasks.losses import next_token_losses
from fedpeft.tasks.task import Task

TASK = Task(
    name="causal-lm",
    auto="AutoModelForCausalLM",
    peft="CAUSAL_LM",
    columns=(Column("messages", "conversation"),),
    encode=conversations,
    losses=next_token_losses,
    metrics=("perplexity",),
    spoken_by=("messages", "prompt", "completion", "layout"),
    has_head=False,
    per_token=True,
    continues=True,
    max_grad_norm=1.0,  # that of transformers' trainer, which FlowerTune and OpenFedLLM inherit
)

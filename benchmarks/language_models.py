"""What language models take of memory and time: logits in blocks, blocks that run again, and rows behind each other.

    python -m benchmarks.language_models [--turns 3] [--length 1024] [--vocabulary 49152] [--quick] [--json FILE]

A Llama of random weights, in one process and on one thread. Memory is the kernel's high water over what was resident
before, after freed memory was given back; time is the processor's, of pairs that take turns. Scoring: 8 rows of full
length, all tokens counting, by the whole model's logits and by blocks of them. Training: a step of 4 such rows, plainly
and with ``train.gradient_checkpointing``; 16 rows of uneven lengths, padded and packed (``data.packing``), in tokens of
the rows a second.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from benchmarks.record import Figure, high_water, machine, parser, publish, reset_high_water
from fedpeft.resident import give_back
from fedpeft.tasks import TASKS
from fedpeft.tasks.heads import pack_rows
from fedpeft.tasks.losses import batch_losses, logits_of, mean_loss
from fedpeft.training.checkpointing import checkpoint_blocks

TASK = TASKS.find("causal-lm")
SCORED, TRAINED, PACKED = 8, 4, 16  # rows
SHORTEST = 1 / 16  # of the lengths of the rows that are packed, as a share of the longest


def model_of(vocabulary: int, length: int, width: int, depth: int) -> nn.Module:
    """Return a Llama with LoRA at query and value, its update not zero."""
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=depth,
            num_attention_heads=width // 64 or 1,
            num_key_value_heads=width // 64 or 1,
            max_position_embeddings=length,
            use_cache=False,
        )
    )
    settings = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    made: nn.Module = get_peft_model(base, settings)
    return made


def batch_of(lengths: Sequence[int], vocabulary: int) -> dict[str, Tensor]:
    """Return rows of random tokens, all of which count."""
    draw = torch.Generator().manual_seed(1)
    held = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ids = torch.randint(0, vocabulary, held.shape, generator=draw)
    return {"input_ids": ids, "attention_mask": held.long(), "labels": ids.masked_fill(~held, -100)}


def peak_of(work: Callable[[], object]) -> int:
    """Return how many bytes more than before were resident at most while something was done."""
    give_back()
    reset_high_water()
    before = high_water(os.getpid())
    work()
    return high_water(os.getpid()) - before


def in_turns(pair: Mapping[str, Callable[[], object]], turns: int) -> dict[str, list[float]]:
    """Return the processor's seconds of each, which take turns, the order reversed each time."""
    taken: dict[str, list[float]] = {name: [] for name in pair}
    for turn in range(turns):
        for name in list(pair)[:: 1 if turn % 2 else -1]:
            started = time.process_time()
            pair[name]()
            taken[name].append(time.process_time() - started)
    return taken


def compared(pair: Mapping[str, Callable[[], object]], turns: int) -> tuple[dict[str, int], dict[str, float], float]:
    """Return the peaks of two, their median seconds, and the median over turns of the first's over the second's."""
    peaks = {name: peak_of(work) for name, work in pair.items()}
    taken = in_turns(pair, turns)
    first, second = taken.values()
    seconds = {name: statistics.median(each) for name, each in taken.items()}
    return peaks, seconds, statistics.median(a / b for a, b in zip(first, second, strict=True))


def figures(vocabulary: int, length: int, width: int, depth: int, turns: int) -> list[Figure]:
    """Measure all three pairs."""
    model = model_of(vocabulary, length, width, depth)
    scored, trained = (batch_of([length] * count, vocabulary) for count in (SCORED, TRAINED))
    uneven = [max(2, round(length * (SHORTEST ** (row / (PACKED - 1))))) for row in range(PACKED)]
    rows = batch_of(uneven, vocabulary)

    @torch.no_grad()
    def whole() -> None:
        TASK.losses(logits_of(model, scored), scored["labels"])

    @torch.no_grad()
    def blocks() -> None:
        batch_losses(TASK, model, scored)

    def step(of: nn.Module, batch: Mapping[str, Tensor]) -> Callable[[], object]:
        return lambda: mean_loss(TASK, of, batch).backward()  # type: ignore[no-untyped-call]

    model.eval()
    blocks()  # in which the model is taken apart
    found = [*_pair("scoring", "whole logits", "blocks", compared({"whole logits": whole, "blocks": blocks}, turns))]
    model.train()
    again = model_of(vocabulary, length, width, depth).train()
    checkpoint_blocks(again)
    pair = {"plain": step(model, trained), "checkpointing": step(again, trained)}
    step(again, rows)()
    found += _pair("a training step", "plain", "checkpointing", compared(pair, turns))
    del again
    behind = model_of(vocabulary, length, width, depth).train()
    pack_rows(behind, length)
    _, seconds, speedup = compared({"padded": step(model, rows), "packed": step(behind, rows)}, turns)
    rates = {name: sum(uneven) / each for name, each in seconds.items()}
    share = 1 - sum(uneven) / (PACKED * max(uneven))
    found.append(Figure(f"packed rows against padded ones, {share:.0%} of them padding: tokens a second", speedup))
    return [*found, *(Figure(f"{name} rows: tokens a second", rate, "/s") for name, rate in rates.items())]


def _pair(
    what: str, one: str, other: str, measured: tuple[dict[str, int], dict[str, float], float]
) -> tuple[Figure, Figure]:
    peaks, seconds, ratio = measured
    gigabytes = {name: peak / 1e9 for name, peak in peaks.items()}
    memory = max(1, peaks[one]) / max(1, peaks[other])
    return (
        Figure(f"{what}: memory of {one} against {other}", memory, detail=gigabytes),
        Figure(f"{what}: time of {one} against {other}", ratio, detail=seconds),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write."""
    options = parser(__doc__)
    options.add_argument("--turns", type=int, default=3)
    options.add_argument("--length", type=int, default=1024)
    options.add_argument("--vocabulary", type=int, default=49152)
    given = options.parse_args(arguments)
    before = machine()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        sizes = (997, 64, 64, 2, 1) if given.quick else (given.vocabulary, given.length, 192, 12, given.turns)
        found = figures(*sizes)
    finally:
        torch.set_num_threads(threads)
    publish("language_models", found, given, before)


if __name__ == "__main__":
    main()

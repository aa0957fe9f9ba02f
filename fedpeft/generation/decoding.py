"""Greedy generation with transformers' own ``generate``: batches of like lengths, padded on the left."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from fedpeft.precision import arithmetic

BATCH_TOKENS = 8192  # of prompts and answers together, for each of which a layer keeps keys and values
BATCH_ROWS = 64


@dataclass(frozen=True)
class Limits:
    """How long prompts and answers may be.

    Parameters
    ----------
    max_new_tokens : int
        Tokens of an answer, at most.
    max_length : int, optional
        What the model reads, answer included; None where there is no such number. An answer takes half of it at most,
        and a prompt loses its beginning where it does not fit into the rest.
    batch_tokens : int
        Tokens of a batch, prompts and answers together. A row that is longer is a batch of its own.
    batch_rows : int
        Rows of a batch.
    """

    max_new_tokens: int = 256
    max_length: int | None = None
    batch_tokens: int = BATCH_TOKENS
    batch_rows: int = BATCH_ROWS

    @property
    def new_tokens(self) -> int:
        """Tokens of an answer, at most, as far as the model reads them."""
        if self.max_length is None:
            return self.max_new_tokens
        return max(1, min(self.max_new_tokens, self.max_length // 2))

    @property
    def prompt_tokens(self) -> int | None:
        """Tokens that are kept of a prompt; None for all."""
        return None if self.max_length is None else max(1, self.max_length - self.new_tokens)


def generate(
    model: nn.Module, tokenizer: Any, prompts: Sequence[Tensor], limits: Limits | None = None, precision: str = "fp32"
) -> list[str]:
    """Return what a model answers to prompts, each token the most likely one, up to the end of its turn.

    Which answer a prompt is given depends on the others by the rounding of sums alone.

    Parameters
    ----------
    model : torch.nn.Module
        A causal language model of transformers, or PEFT's around one, with whatever adapter is active. What its folder
        says of sampling counts for nothing.
    tokenizer : transformers.PreTrainedTokenizerBase
        The base's, see `fedpeft.data.tokens.load_tokenizer`.
    prompts : sequence of Tensor
        Token ids, ``(t,)`` each, the opening of the answer's turn included. An empty one becomes the start token, or
        the end token where there is none.
    limits : Limits, optional
        How long.
    precision : str
        ``train.precision``.

    Returns
    -------
    list of str
        In the order of the prompts, without special tokens and without white space around them.
    """
    from fedpeft.data.tokens import end_tokens

    limits = limits_of(model, limits or Limits())
    ends = end_tokens(tokenizer)
    padding = next((each for each in (tokenizer.pad_token_id, tokenizer.eos_token_id, *ends) if each is not None), 0)
    starts = (tokenizer.bos_token_id, tokenizer.eos_token_id, padding)
    start = next(each for each in starts if each is not None)
    kept = [kept_tokens(prompt if len(prompt) else torch.tensor([start]), limits) for prompt in prompts]
    settings = _settings(limits, ends, padding)
    answers: list[list[int]] = [[] for _ in kept]
    with own_settings_aside(model), torch.no_grad():
        for rows in batches(list(map(len, kept)), limits, even=_parts_by_padding(model)):
            batch = [kept[row] for row in rows]
            for row, tokens in zip(rows, _answered(model, batch, padding, settings, precision), strict=True):
                answers[row] = _turn(tokens, ends)
    return [words_of(tokenizer, tokens, skip_special_tokens=True) for tokens in answers]


def words_of(tokenizer: Any, tokens: Sequence[int] | Tensor, **how: Any) -> str:
    """Return tokens as text, as they stand: some tokenizers' settings take blanks out, before stops and in code too."""
    return str(tokenizer.decode(tokens, clean_up_tokenization_spaces=False, **how)).strip()


def shortened(model: nn.Module, prompts: Sequence[Tensor], limits: Limits) -> int:
    """Return how many prompts lose their beginning, since the model does not read so many tokens."""
    most = limits_of(model, limits).prompt_tokens
    return sum(most is not None and len(prompt) > most for prompt in prompts)


def batches(lengths: Sequence[int], limits: Limits, *, even: bool = False) -> Iterator[list[int]]:
    """Yield the rows of each batch, the longest first: what does not fit in memory fails at once.

    Parameters
    ----------
    lengths : sequence of int
        Tokens of each row.
    limits : Limits
        Of a batch.
    even : bool
        Whether only rows of the same length make a batch, so that none is padded.
    """
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    start = 0
    while start < len(order):
        longest = lengths[order[start]]
        count = max(1, min(limits.batch_rows, limits.batch_tokens // (longest + limits.new_tokens)))
        batch = [row for row in order[start : start + count] if not even or lengths[row] == longest]
        yield batch
        start += len(batch)


def _parts_by_padding(model: nn.Module) -> bool:
    """Tell whether padding would part virtual tokens from a prompt: as keys and values, under a window of attention."""
    from peft import PeftType

    held: Any = model
    if not num_virtual_tokens(held) or held.active_peft_config.peft_type not in (
        PeftType.PREFIX_TUNING,
        PeftType.CARTRIDGE,
    ):
        return False
    return getattr(held.get_base_model().config.get_text_config(), "sliding_window", None) is not None


def limits_of(model: nn.Module, limits: Limits) -> Limits:
    """Return the limits with what the model reads, as far as its configuration says so; virtual tokens count."""
    from dataclasses import replace

    from fedpeft.bases import positions

    held: Any = model
    base = held.get_base_model() if hasattr(held, "get_base_model") else held
    told = positions(base.config.get_text_config(), type(base))
    known = [limits.max_length, None if told is None else told - num_virtual_tokens(model)]
    return replace(limits, max_length=min((each for each in known if each is not None), default=None))


def kept_tokens(prompt: Tensor, limits: Limits) -> Tensor:
    """Return what of a prompt is read: its end, where it is too long."""
    most = limits.prompt_tokens
    return prompt.long() if most is None else prompt[-most:].long()


def _settings(limits: Limits, ends: Sequence[int], padding: int) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig(
        max_new_tokens=limits.new_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        eos_token_id=list(ends) or None,
        pad_token_id=padding,
    )


@contextlib.contextmanager
def own_settings_aside(model: nn.Module) -> Iterator[None]:
    """Let a model generate inside the block: not in training, and with nothing that its folder says of it.

    transformers takes from there whatever the settings at hand leave open.
    """
    from transformers import GenerationConfig

    holders = [module for module in model.modules() if "generation_config" in vars(module)]
    before = [module.generation_config for module in holders]
    trained = model.training
    model.eval()
    for module in holders:
        module.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for module, held in zip(holders, before, strict=True):
            module.generation_config = held
        model.train(trained)


def _answered(
    model: nn.Module, prompts: Sequence[Tensor], padding: int, settings: Any, precision: str
) -> list[list[int]]:
    """Return the tokens that follow each prompt of a batch."""
    on = next(model.parameters()).device
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), padding, dtype=torch.int64)  # (b, t)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :], mask[row, longest - len(prompt) :] = prompt, 1
    inputs = {"input_ids": ids.to(on), "attention_mask": mask.to(on)}
    with arithmetic(on, precision):
        if num_virtual_tokens(model):
            return behind_virtual_tokens(model, inputs, settings)
        generating: Any = model
        found = generating.generate(**inputs, generation_config=settings)
    return cast(list[list[int]], found[:, longest:].tolist())


def num_virtual_tokens(model: nn.Module) -> int:
    """Return how many virtual tokens the adapter in use puts before a prompt."""
    adapter = getattr(model, "active_peft_config", None)
    if adapter is None or not adapter.is_prompt_learning or cast(Any, model)._adapters_disabled:
        return 0
    return int(adapter.num_virtual_tokens)


def behind_virtual_tokens(model: Any, inputs: Mapping[str, Tensor], settings: Any) -> list[list[int]]:
    """Generate with an adapter that puts virtual tokens before a prompt.

    PEFT's own way, by a hook of transformers that says less than it did, leaves a prefix out and miscounts positions
    (peft 0.21 with transformers 5.24).

    Parameters
    ----------
    model : peft.PeftModelForCausalLM
        With such an adapter in use.
    inputs : mapping of str to Tensor
        ``input_ids`` and ``attention_mask``, ``(b, t)``, padded on the left.
    settings : transformers.GenerationConfig
        How, with a padding token.

    Returns
    -------
    list of list of int
        The tokens that follow each prompt.
    """
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    virtual, count = model.get_prompt(batch_size=len(ids)), num_virtual_tokens(model)
    seen = torch.cat([mask.new_ones(len(mask), count), mask], dim=1)  # (b, v + t)
    base = model.get_base_model()
    if isinstance(virtual, Tensor):  # embeddings, (b, v, d)
        words = model.word_embeddings(ids)
        embedded = torch.cat([virtual.to(words.dtype), words], dim=1)
        # padding goes to the front: between both, it would part them where a layer's window is short
        order = torch.argsort(seen, dim=1, stable=True)  # (b, v + t)
        embedded = embedded.gather(1, order[..., None].expand_as(embedded))
        seen = seen.gather(1, order)
        found = base.generate(inputs_embeds=embedded, attention_mask=seen, generation_config=settings)
        return cast(list[list[int]], found.tolist())
    # keys and values of tokens that need ids, which nobody reads
    held = torch.cat([ids.new_full((len(ids), count), settings.pad_token_id), ids], dim=1)
    found = base.generate(input_ids=held, attention_mask=seen, past_key_values=virtual, generation_config=settings)
    return cast(list[list[int]], found[:, held.shape[1] :].tolist())


def _turn(tokens: Sequence[int], ends: Sequence[int]) -> list[int]:
    """Return the tokens before the first that ends the turn."""
    return list(tokens[: next((at for at, token in enumerate(tokens) if token in ends), len(tokens))])

"""Chat templates in the style of well-known models, and by hand what each writes: who is taught which part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

Turn = dict[str, str]
Parts = list[tuple[str, bool]]  # what is written, and whether an assistant's answer should be taught it
SPECIAL = (
    *("<s>", "</s>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "<bos>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
    *("<|begin_of_text|>", "[INST]", "[/INST]"),
)


def letters(template: str | None, eos: str = "</s>", bos: str = "<s>") -> PreTrainedTokenizerFast:
    """Make a tokenizer of bytes: what it makes of a text is what it makes of its parts."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: at for at, letter in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token=eos, bos_token=bos, additional_special_tokens=list(SPECIAL)
    )
    tokenizer.chat_template = template
    return tokenizer


@dataclass(frozen=True)
class Style:
    """A template, and what it should make of turns."""

    name: str
    template: str
    parts: Callable[[Sequence[Turn]], Parts]
    eos: str = "</s>"
    systems: bool = True  # else it has no place for a system's turn


def _each(write: Callable[[Turn], Parts], first: str = "", last: str = "") -> Callable[[Sequence[Turn]], Parts]:
    def parts(turns: Sequence[Turn]) -> Parts:
        found = [(first, False)] if first else []
        for turn in turns:
            found += write(turn)
        return found

    return parts


def _headed(before: str, after: str, end: str, rest: str = "\n") -> Callable[[Turn], Parts]:
    def write(turn: Turn) -> Parts:
        told = turn["role"] == "assistant"
        return [(before.format(turn["role"]) + after, False), (turn["content"] + end, told), (rest, False)]

    return write


def _instructed(turns: Sequence[Turn], open_system: str, close_system: str) -> Parts:
    found: Parts = []
    said = ""
    for turn in turns:
        if turn["role"] == "system":
            said = open_system + turn["content"] + close_system
        elif turn["role"] == "user":
            found.append((f"<s>[INST] {said}{turn['content']} [/INST]", False))
            said = ""
        else:
            found.append((f" {turn['content']} </s>", True))
    return found


def _mistral(turns: Sequence[Turn]) -> Parts:
    found: Parts = [("<s>", False)]
    for turn in turns:
        told = turn["role"] == "assistant"
        found.append((f" {turn['content']}</s>" if told else f"[INST] {turn['content']} [/INST]", told))
    return found


def _qwen3(turns: Sequence[Turn]) -> Parts:
    found: Parts = []
    for at, turn in enumerate(turns):
        told = turn["role"] == "assistant"
        words = turn["content"].split("</think>\n\n")[-1]
        if told and at == len(turns) - 1:
            thought = (
                turn["content"].split("<think>\n")[-1].split("\n</think>")[0] if "<think>" in turn["content"] else ""
            )
            words = f"<think>\n{thought}\n</think>\n\n{words}"
        found += [(f"<|im_start|>{turn['role']}\n", False), (f"{words}<|im_end|>", told), ("\n", False)]
    return found


def _phi3(turns: Sequence[Turn]) -> Parts:
    return _each(_headed("<|{}|>", "\n", "<|end|>"))(turns)


_TURNS = "{% for m in messages %}"
STYLES = (
    Style(
        "chatml",
        _TURNS + "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        _each(_headed("<|im_start|>{}", "\n", "<|im_end|>")),
        eos="<|endoftext|>",  # another than the end of turn
    ),
    Style(
        "llama-3",
        "{{ bos_token }}" + _TURNS + "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim "
        "+ '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        _each(_headed("<|start_header_id|>{}", "<|end_header_id|>\n\n", "<|eot_id|>", ""), first="<s>"),
        eos="<|eot_id|>",
    ),
    Style(
        "llama-2",
        "{% if messages[0].role == 'system' %}{% set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
        "{% set rest = messages[1:] %}{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
        "{% for m in rest %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + (system if loop.first else '') "
        "+ m.content + ' [/INST]' }}{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}",
        lambda turns: _instructed(turns, "<<SYS>>\n", "\n<</SYS>>\n\n"),
    ),
    Style(
        "mistral",
        "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
        "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}"
        "{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}",
        _mistral,
        systems=False,
    ),
    Style(
        "gemma",
        "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}" + _TURNS + "{% set role = 'model' if m.role == 'assistant' else m.role %}"
        "{{ '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        lambda turns: [
            (text.replace("<start_of_turn>assistant", "<start_of_turn>model"), told)
            for text, told in _each(_headed("<start_of_turn>{}", "\n", "<end_of_turn>"), first="<s>")(turns)
        ],
        eos="<|endoftext|>",
        systems=False,
    ),
    Style(
        "phi-3",
        _TURNS + "{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
        _phi3,
        eos="<|endoftext|>",
    ),
    Style(
        "zephyr",
        _TURNS + "{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}"
        "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}",
        _each(_headed("<|{}|>", "\n", "</s>")),
    ),
    Style(
        "qwen3",
        _TURNS
        + "{% set words = m.content.split('</think>')[-1].lstrip('\n') if m.role == 'assistant' else m.content %}"
        "{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' and loop.last %}"
        "{{ '<think>\n' + (m.content.split('</think>')[0].split('<think>')[-1].strip('\n') "
        "if '</think>' in m.content else '') + '\n</think>\n\n' }}{% endif %}"
        "{{ words + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        _qwen3,
        eos="<|im_end|>",
    ),
)


def talk(answers: int, *, system: bool = False) -> list[Turn]:
    """Make a conversation of so many answers, no two alike; a word of an answer stands in other turns too."""
    turns = [{"role": "system", "content": "Be brief, assistant."}] if system else []
    for at in range(answers):
        turns.append({"role": "user", "content": f"What is {at} and yes {at}?"})
        turns.append({"role": "assistant", "content": f"yes {at}, naïve" if at % 2 else f"It is {at}.\nSo it is."})
    return turns

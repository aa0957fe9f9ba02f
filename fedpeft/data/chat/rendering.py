"""Conversations as one text by a chat template, and where in it each answer stands."""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedpeft.bases import first_line
from fedpeft.errors import DataError, FedpeftError, ModelError

Message = Mapping[str, Any]

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_ASSISTANT, _SYSTEM, _USER = "assistant", "system", "user"
_PROBE = "\ue000\ue001"  # of Unicode's private use: no template and hardly a row writes it
# some templates write today's date: the same rows would become other tokens tomorrow, so they get Llama 3's own default
_THEN = datetime.datetime(2024, 7, 26)
_DATE = _THEN.strftime("%d %b %Y")
_MARKS = "".join(f" | replace('%{mark}', '{_THEN.strftime('%' + mark)}')" for mark in "YymdBbAaHMSIpjfe")
# the line break belongs to the macro: the template begins on a line of its own, as it does without one
_STILL = "{% macro strftime_now(format) %}{{ format" + _MARKS + " }}{% endmacro %}\n"


@dataclass(frozen=True)
class Span:
    """Where an answer stands in a text: characters `start` to `end`, its end of turn included, of turn `turn`."""

    turn: int
    start: int
    end: int


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, and its answers, in order."""

    text: str
    spans: tuple[Span, ...]


def words_of(message: Message) -> str:
    """Return what a turn says; of parts, the texts."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(str(part.get("text") or "") for part in content if isinstance(part, Mapping))
    return ""


def calls_of(message: Message) -> list[str]:
    """Return the names of what an answer calls."""
    calls = message.get("tool_calls") or message.get("function_call")
    found = []
    for call in calls if isinstance(calls, list) else [calls]:
        called = call.get("function", call) if isinstance(call, Mapping) else None
        if isinstance(called, Mapping) and isinstance(called.get("name"), str):
            found.append(called["name"])
    return found


class Renderer:
    """Writes conversations by a tokenizer's chat template.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
        With a chat template.

    Raises
    ------
    ModelError
        The template refuses a user's and an assistant's turn.
    """

    def __init__(self, tokenizer: Any) -> None:
        try:
            template = tokenizer.get_chat_template()
        except ValueError:  # it has several, of which none is the default
            raise ModelError(
                "the tokenizer has several chat templates, of which none is called default. Save it with one, or set "
                "data.template."
            ) from None
        self._template = _STILL + template
        self._names = {**tokenizer.special_tokens_map, "date_string": _DATE}
        self.marked = bool(_GENERATION.search(template))
        exchange = [{"role": _USER, "content": "a"}, {"role": _ASSISTANT, "content": _PROBE}]
        try:
            (written,) = self.texts([exchange])
        except _Refused as error:
            raise ModelError(
                f"the chat template refuses a user's and an assistant's turn: {error}. Save another one with the "
                "tokenizer, or set data.template."
            ) from None
        _, found, after = written.rpartition(_PROBE)
        self.ending: str = after.rstrip() if found else ""
        self._opens = self._opening_of(exchange[:1])
        added = set(tokenizer.get_added_vocab().values()) | {tokenizer.eos_token_id}
        ids = tokenizer(self.ending, add_special_tokens=False)["input_ids"] if self.ending else []
        self.stops: tuple[int, ...] = tuple(token for token in ids if token in added)
        self.folds = not self._writes_systems(exchange)

    def _writes_systems(self, exchange: list[dict[str, str]]) -> bool:
        """Tell whether the template has a place for a system's turn, rather than refusing or leaving it out."""
        try:
            (text,) = self.texts([[{"role": _SYSTEM, "content": _PROBE}, {"role": _USER, "content": "a"}, exchange[1]]])
        except _Refused:
            return False
        return text.count(_PROBE) == 2

    def texts(self, conversations: Sequence[Sequence[Message]], *, opened: bool = False) -> list[str]:
        """Write conversations; with `opened`, and what invites an answer behind each."""
        return self._written(conversations, opened=opened)[0]

    def _written(
        self, conversations: Sequence[Sequence[Message]], *, opened: bool = False, marks: bool = False
    ) -> tuple[list[str], list[list[tuple[int, int]]]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, marked = render_jinja_template(
                conversations=[list(turns) for turns in conversations],
                chat_template=self._template,
                add_generation_prompt=opened,
                return_assistant_tokens_mask=marks,
                **self._names,
            )
        except Exception as error:  # a template is code of others, which raises whatever it likes
            raise _Refused(first_line(error).rstrip(".")) from None
        return texts, marked

    def folded(self, messages: Sequence[Message]) -> list[Message]:
        """Return the turns as the template takes them: a system's turns stand at the head of the first user's."""
        first = next((at for at, turn in enumerate(messages) if turn.get("role") != _SYSTEM), len(messages))
        if not self.folds or first == 0 or first == len(messages) or messages[first].get("role") != _USER:
            return list(messages)
        user = messages[first]
        said = "\n\n".join(words_of(turn) for turn in messages[:first])
        merged = {**user, "content": f"{said}\n\n{words_of(user)}"}
        if isinstance(user.get("instruction"), str):
            merged["instruction"] = f"{said}\n\n{user['instruction']}"
        return [merged, *messages[first + 1 :]]

    def render(self, messages: Sequence[Message], where: str) -> Rendered:
        """Write one conversation and find its answers.

        Parameters
        ----------
        messages : sequence of mapping
            The turns.
        where : str
            Names the row, for messages.

        Returns
        -------
        Rendered
            Of which turns are counted as given, whether or not a system's was folded.

        Raises
        ------
        DataError
            The template refuses the turns, or writes them so that an answer cannot be found.
        """
        turns = self.folded(messages)
        gone = len(messages) - len(turns)
        try:
            if self.marked:
                (text,), (marks,) = self._written([turns], marks=True)
                spans = self._marked(turns, text, marks)
            else:
                (text,) = self.texts([turns])
                spans = self._sought(turns, text, where)
            self._refuse_uncalled(turns, text, spans, where)
        except _Refused as error:
            raise DataError(
                f"{where} is a conversation that the chat template refuses: {error}. Change the row, or data.template."
            ) from None
        if not self.marked and spans and spans[-1].turn == len(turns) - 1:
            text = text[: spans[-1].end]  # nobody reads what is written after the last answer's end
        return Rendered(text, tuple(Span(span.turn + gone, span.start, span.end) for span in spans))

    def _ended(self, text: str, end: int) -> int:
        """Return where the end of a turn ends whose words end at `end`."""
        mark = self.ending.lstrip()
        at = end + len(text[end:]) - len(text[end:].lstrip())
        return at + len(mark) if mark and text.startswith(mark, at) else end

    def _marked(self, turns: Sequence[Message], text: str, marks: Sequence[tuple[int, int]]) -> list[Span]:
        """Return the answers that the template marks, each with its end of turn."""
        answers = [at for at, turn in enumerate(turns) if turn.get("role") == _ASSISTANT]
        owners = answers
        if len(marks) != len(answers):  # several in a turn, or none: those up to each turn tell whose they are
            owners = []
            for at in answers:
                upto = len(self._written([turns[: at + 1]], marks=True)[1][0])
                owners += [at] * (min(upto, len(marks)) - len(owners))
            owners += [answers[-1] if answers else 0] * (len(marks) - len(owners))
        return [Span(turn, start, self._ended(text, end)) for turn, (start, end) in zip(owners, marks, strict=True)]

    def _sought(self, turns: Sequence[Message], text: str, where: str) -> list[Span]:
        """Find the answers in a text whose template does not mark them, by what it writes without each."""
        spans: list[Span] = []
        for at, turn in enumerate(turns):
            if turn.get("role") != _ASSISTANT:
                continue
            head = self._head(turns[:at])
            words = words_of(turn).strip()
            start = len(head) if head is not None and text.startswith(head) else -1
            if start < 0 and head is not None and at == len(turns) - 1 and len(turns) == 2:
                start = _shared(head, text)
            after = -1
            if start >= 0 and words:
                begin = start + len(text[start:]) - len(text[start:].lstrip())
                after = begin + len(words) if text.startswith(words, begin) else -1
            if calls_of(turn):  # which stand before or behind the words
                after = self._called(turns[: at + 1], text, after)
            if after < 0:
                first, after = self._replaced(turns, at, text, where)
                if not (0 <= start <= first):
                    start = self._opening(turns[:at], head, text, first)
            end = len(text.rstrip()) if at == len(turns) - 1 else self._ended(text, after)
            if start > end or (spans and start < spans[-1].end):
                raise self._lost(turns, at, where)
            spans.append(Span(at, start, max(start, end)))
        return spans

    def _head(self, before: Sequence[Message]) -> str | None:
        """Return what is written before an answer, and to open it; None where the template does not write it so."""
        return self._tried(before, opened=True) if before else None  # many templates look at a first turn

    def _tried(self, turns: Sequence[Message], *, opened: bool = False) -> str | None:
        """Return what is written of some turns; None where the template writes no such ones."""
        try:
            return self.texts([turns], opened=opened)[0]
        except _Refused:
            return None

    def _opening_of(self, before: Sequence[Message]) -> str:
        """Return what opens an answer behind some turns; empty where nothing does."""
        head, closed = self._head(before), self._tried(before)
        return head[len(closed) :] if head and closed is not None and head.startswith(closed) else ""

    def _opening(self, before: Sequence[Message], head: str | None, text: str, first: int) -> int:
        """Return where an answer starts whose words start at `first`, by what the template opens answers with."""
        opening = self._opens if head is None else self._opening_of(before)
        at = text.rfind(opening, 0, first) if opening else -1
        return at + len(opening) if at >= 0 else first

    def _called(self, upto: Sequence[Message], text: str, after: int) -> int:
        """Return where the calls of the last of some turns end, if the template writes these turns alone alike."""
        ended = (self._tried(upto) or "").rstrip()
        if not ended or not text.startswith(ended):
            return after
        return len(ended.removesuffix(self.ending.lstrip()))

    def _refuse_uncalled(self, turns: Sequence[Message], text: str, spans: Sequence[Span], where: str) -> None:
        """Raise for an answer that calls something of which the template writes nothing: it would be taught silence."""
        for span in spans:
            said = text[span.start : span.end].removesuffix(self.ending.lstrip())
            for name in calls_of(turns[span.turn]):
                if name not in said:
                    raise DataError(
                        f"{where} calls '{name[:40]}' in an answer, and the chat template has no words for calls. Set "
                        "data.template to a file that writes tool_calls, or write the call as the answer's content."
                    )

    def _replaced(self, turns: Sequence[Message], at: int, text: str, where: str) -> tuple[int, int]:
        """Return where the words of a turn begin and end in the text: what differs if it says something else."""
        other = {**turns[at], "content": _PROBE}
        try:
            (probe,) = self.texts([[*turns[:at], other, *turns[at + 1 :]]])
        except _Refused:
            raise self._lost(turns, at, where) from None
        if _PROBE not in probe:
            raise self._lost(turns, at, where)
        first = _shared(text, probe)
        rest = _shared(text[first:][::-1], probe[first:][::-1])
        return first, len(text) - rest

    def _lost(self, turns: Sequence[Message], at: int, where: str) -> FedpeftError:
        answer = sum(turn.get("role") == _ASSISTANT for turn in turns[: at + 1])
        return DataError(
            f"{where}: the chat template writes answer {answer} ('{words_of(turns[at])[:40]}') so that it cannot be "
            "found among what else it writes. Give data.template a file in which answers stand between "
            "{% generation %} and {% endgeneration %}."
        )


def _shared(one: str, other: str) -> int:
    """Return how many characters two texts begin with alike."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


class _Refused(Exception):
    """A template does not take the turns; says why in one line."""

"""``[data]``: the rows, and which columns hold what."""

from __future__ import annotations

import codecs
import csv
import io
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from fedpeft.config.section import Section

Truncate = Literal["longest", "prompt", "completion"]
TrainOn = Literal["assistant", "completion", "all", "last"]
Empty = Literal["refuse", "skip"]
TEMPLATE_SUFFIXES = (".jinja", ".jinja2", ".j2")


class DataConfig(Section):
    """The rows, and which columns hold what."""

    source: str | None = Field(
        None, description="CSV, JSON lines, Parquet, image folder, saved dataset, hub id, preset:NAME"
    )
    test: str | None = Field(None, description="test rows, same kinds; else the source's test split, else held out")
    test_fraction: float = Field(0.2, gt=0, lt=1, description="share of rows held out where no test rows are given")
    text: str | None = Field(None, description="column of the text to classify")
    text_pair: str | None = Field(None, description="column of a second text, for pairs")
    image: str | None = Field(None, description="column of images to classify")
    layout: str | None = Field(
        None,
        description="how rows for language models are written, where the columns do not say: messages, sharegpt, "
        "alpaca, completion or text",
    )
    messages: str | None = Field(
        None, description="column of conversations: lists of {role, content} or {from, value}, or such lists as JSON"
    )
    prompt: str | None = Field(
        None, description="column of prompts, for causal language modelling: texts, or lists of turns"
    )
    completion: str | None = Field(None, description="column of completions: the loss counts these tokens only")
    label: str | None = Field(None, description="column of the label; 'label' if unset")
    labels: str | None = Field(
        None, description="all label names, comma-separated, where a site sees only some of them"
    )
    domain: str | None = Field(None, description="column by which test scores are also reported")
    template: str | None = Field(
        None,
        description="how turns are written as one text: alpaca, vicuna, chatml, a FILE.jinja, whose text a run then "
        "holds in place of its name, or none: prompt, line break, completion; the tokenizer's own chat template if "
        "unset",
    )
    train_on: TrainOn | None = Field(
        None,
        description="what the loss counts of turns: assistant (if unset), all answers; last, the last one; completion, "
        "what a row names so; all, every token",
    )
    empty: Empty | None = Field(
        None,
        description="what becomes of a row without a token that counts: refuse (if unset), an error that names it; "
        "skip, it is left out",
    )
    max_length: int | None = Field(
        None,
        ge=1,
        description="tokens kept of each row; if unset 128, for language models 1024 or what the model reads",
    )
    truncate: Truncate | None = Field(
        None,
        description="what is cut of prompt and completion that are too long together: longest (if unset), the longer "
        "of both; prompt, at its beginning and wholly if need be; completion, at its end",
    )
    packing: bool = Field(
        False,
        description="training of language models: rows of a batch behind each other in sequences of max_length tokens "
        "at most, in place of padding; no row sees another. Never at record level",
    )
    metric: str | None = Field(
        None,
        description="how answers that the model writes are judged, beside the loss: some of exact_match, f1, rouge, "
        "bleu, choice_accuracy, choice_likelihood, pass, comma-separated",
    )
    max_new_tokens: int = Field(256, ge=1, description="tokens of an answer that the model writes, at most")
    encoding: str = Field("utf-8", description="of CSV and JSON files, such as cp1252, latin-1, utf-16")

    @property
    def label_names(self) -> tuple[str, ...] | None:
        """The names in ``labels``, or None where it is not set; quotes protect a comma in a name."""
        if self.labels is None:
            return None
        return tuple(name.strip() for name in next(csv.reader([self.labels], skipinitialspace=True)))

    @property
    def metric_names(self) -> tuple[str, ...]:
        """The names in ``metric``, each once; none where it is not set."""
        return tuple(dict.fromkeys(name.strip() for name in (self.metric or "").split(",") if name.strip()))

    @field_validator("encoding")
    @classmethod
    def _is_of_text(cls, name: str) -> str:
        try:
            codec = codecs.lookup(name)
            io.TextIOWrapper(io.BytesIO(), name)  # which refuses codecs that make no text
        except (LookupError, ValueError):
            raise ValueError(
                f"data.encoding = '{name}' is no encoding of text. Give utf-8, utf-16, cp1252, latin-1, gb18030, "
                "shift_jis or any other that Python knows"
            ) from None
        return codec.name

    @model_validator(mode="after")
    def _labels_differ(self) -> Self:
        if (names := self.label_names) is not None and (len(names) < 2 or len(set(names)) < len(names)):
            raise ValueError(f"data.labels = '{self.labels}' must name two or more different labels")
        return self


def is_template(text: str) -> bool:
    """Tell the text of a chat template from the name of one, or of a file."""
    return "{{" in text or "{%" in text

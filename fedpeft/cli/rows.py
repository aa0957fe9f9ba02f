"""``fedpeft rows``: what rows become before a model reads them."""

from __future__ import annotations

import itertools
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedpeft.cli.options import Asked, Json, Verbose, quiet, spread
from fedpeft.errors import ConfigError

if TYPE_CHECKING:
    from rich.text import Text

    from fedpeft.data.splits import EncodedSplit

BEGIN, END = "«", "»"  # around what counts, where no colour can say so


@spread(without={"strategy", "adapter", "rounds", "workers"})
def rows(
    asked: Asked,
    number: Annotated[int, typer.Option("--show", min=1, help="How many training rows.")] = 3,
    json_lines: Json = False,
    verbose: Verbose = False,
) -> None:
    """Show what rows become: their tokens, which of them the loss counts, and how many were cut."""
    config = asked.config()
    quiet(verbose)
    from fedpeft.data.tokens import load_tokenizer
    from fedpeft.resident import resident

    home = resident(config)
    train = home.data.train
    if "tokens" not in train.tensors:
        raise ConfigError(f"the rows are images ({train.task}), which have no tokens to show.")
    tokenizer, _ = load_tokenizer(home.config, home.folder)
    facts = [row_facts(train, index, tokenizer) for index in range(min(number, len(train)))]
    for note in home.data.notes:
        print(f"note: {note}", file=sys.stderr)
    for caution in home.data.cautions:
        print(f"warning: {caution}", file=sys.stderr)
    if json_lines:
        from fedpeft.jsons import to_json

        print(to_json({"rows": facts}))
        return
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False)
    for row in facts:
        console.print(_shown(row, tokenizer, coloured=console.is_terminal))


def row_facts(split: EncodedSplit, index: int, tokenizer: Any) -> dict[str, Any]:
    """Return what a row became.

    Parameters
    ----------
    split : EncodedSplit
        The rows.
    index : int
        Which of them.
    tokenizer : transformers.PreTrainedTokenizerBase
        Which made their tokens.

    Returns
    -------
    dict
        ``row``, its number in the source, from 1, or in its ``file`` where there are several; ``tokens``, as the
        tokenizer calls them, and their ``ids``;
        ``counted``, a truth value each, all false where the loss is of a label; ``cut``, how many tokens were cut; and
        ``domain`` and ``client`` where rows have such.
    """
    batch, stored = split.batch([index]), int(split.indices_stored[index])
    ids = batch["input_ids"][0].tolist()
    number, file = split.origin.of(stored)
    facts: dict[str, Any] = {
        "row": number,
        **({} if file is None else {"file": file}),
        "tokens": tokenizer.convert_ids_to_tokens(ids),
        "ids": ids,
        "counted": [False] * len(ids),
        "cut": int(split.tensors["cut"][stored]) if "cut" in split.tensors else 0,
    }
    if "counted" in split.tensors:
        facts["counted"] = (batch["labels"][0] >= 0).tolist()
    for name, values in (("domain", split.domains), ("client", split.clients)):
        if values is not None:
            facts[name] = values[index]
    return facts


def _shown(row: dict[str, Any], tokenizer: Any, *, coloured: bool) -> Text:
    """Write a row as text, what counts underlined and in colour, or between marks where there is no colour."""
    from rich.text import Text

    told = sum(row["counted"])
    of_file = f" of {row['file']}" if "file" in row else ""
    head = f"row {row['row']}{of_file}: {len(row['ids'])} tokens, {told} count, {row['cut']} cut"
    head += "".join(f", {name} {row[name]}" for name in ("domain", "client") if name in row)
    text = Text(f"{head}\n", style="bold")
    for counts, run in itertools.groupby(zip(row["ids"], row["counted"], strict=True), key=lambda each: each[1]):
        words = tokenizer.decode([token for token, _ in run], clean_up_tokenization_spaces=False)
        marked = words if coloured or not counts else f"{BEGIN}{words}{END}"
        text.append(marked, style="not bold underline green" if counts else "not bold")
    return text.append("\n")

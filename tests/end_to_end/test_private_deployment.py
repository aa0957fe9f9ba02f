"""Real SuperNodes whose sites keep their own ledgers; apart, so that it can run beside the other deployments."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from fedpeft.cli import app as command_line
from fedpeft.config import RunConfig
from fedpeft.privacy.ledger import Ledger
from fedpeft.runs import read_config

Make = Callable[..., RunConfig]


def test_sites_keep_their_own_books_and_the_server_states_what_they_tell(
    text_config: Make, text_csv: Path, tmp_path: Path, loopback: Callable[..., Any]
) -> None:
    # rows for scores are none of the sites' own
    public = tmp_path / "public.csv"
    public.write_text("text,label,client\n" + "".join(f"w{k} w{59 - k},yes,site-0\n" for k in range(10)))
    settings = {"privacy__level": "record", "privacy__epsilon": 3.0, "data__test": str(public)}
    config = text_config(partition__scheme="iid", federation__clients=2, federation__rounds=1, **settings)
    words = [f"{name}={value}" for name, value in config.to_flat().items()]
    written = CliRunner().invoke(
        command_line, ["deploy", "init", str(tmp_path / "app"), *words, "--out", str(tmp_path / "deployed")]
    )
    assert written.exit_code == 0, (written.output, written.exception)
    assert "record level, epsilon 3 over 1 round, randomness secure" in written.output
    assert "fedpeft privacy ledger --create" in written.output
    books = [tmp_path / f"books-{index}.jsonl" for index in range(2)]
    for book in books:
        made = CliRunner().invoke(command_line, ["privacy", "ledger", "--create", str(book)])
        assert made.exit_code == 0, (made.output, made.exception)
        assert "privacy-ledger=" in made.output
    nodes = [
        f'partition-id={index} num-partitions=2 privacy-ledger="{book}" privacy-epsilon=3.0'
        for index, book in enumerate(books)
    ]
    with loopback(nodes) as federation:
        run = federation.run(tmp_path / "app")
        assert run.status == "finished:completed", f"{run}\n{federation.logs()}"
    facts = json.loads((tmp_path / "deployed" / "privacy.json").read_text())
    assert facts["guarantee"] is True, facts
    assert not facts["reasons"]
    assert 2.9 < facts["epsilon_max"] <= 3.0
    assert {found["steps"] for found in facts["clients"].values()} == {3}
    assert read_config(tmp_path / "deployed").privacy.rng == "secure"
    assert read_config(tmp_path / "deployed").data.label_names == ("no", "yes")
    assert [len(Ledger(book).entries()) for book in books] == [1, 1]
    assert {entry.run for book in books for entry in Ledger(book).entries()} == {run.run_id}

"""All methods on the embedded digits, three seeds each, under two kinds of skew: the tables of docs/methods.md.

Run it with ``python -m benchmarks.methods``; it takes a quarter of an hour on two cores, and goes on where it was
stopped. The tables are written into the document between their marks.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from fedpeft.chatter import silence
from fedpeft.config import configure
from fedpeft.simulations.compare import split_words, write_comparison
from fedpeft.simulations.jobs import CENTRALIZED, plan_jobs
from fedpeft.simulations.running import run_jobs
from fedpeft.strategies import STRATEGIES

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "methods.md"
METHODS = [CENTRALIZED, "local", "fedit", "fedit:adapter.kind=ffa-lora"]
METHODS += [name for name in STRATEGIES if name not in METHODS]
SKEWS: dict[str, dict[str, object]] = {
    "feature skew": {},  # the preset's own: six clients, one visual domain each
    "feature and label skew": {"federation.clients": 18, "partition.alpha": 0.5},
}


def main() -> None:
    """Run both comparisons, and write their tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--out", type=Path, default=Path("runs/methods"))
    arguments = parser.parse_args()
    silence()
    text = DOCUMENT.read_text(encoding="utf-8")
    for name, settings in SKEWS.items():
        rows, _ = split_words(METHODS)
        config = configure(
            {"simulation.workers": 0, "federation.rounds": arguments.rounds, **settings}, preset="digits"
        )
        folder = arguments.out / name.replace(" ", "-")
        jobs = plan_jobs(rows, config, arguments.seeds, folder)
        write_comparison(jobs, run_jobs(jobs, config), folder)
        text = between(text, name, (folder / "comparison.md").read_text(encoding="utf-8"))
    DOCUMENT.write_text(text, encoding="utf-8")


def between(text: str, mark: str, table: str) -> str:
    """Put a table between the marks of its name."""
    start, end = f"<!-- {mark} -->", f"<!-- end of {mark} -->"
    found = re.compile(f"{re.escape(start)}.*?{re.escape(end)}", re.DOTALL)
    if not found.search(text):
        raise SystemExit(f"the document has no marks for '{mark}'")
    return found.sub(lambda _: f"{start}\n\n{table.strip()}\n\n{end}", text)


if __name__ == "__main__":
    main()

"""Looking at the machine before a run does."""

from __future__ import annotations

from typing import Annotated

import typer

from fedpeft.cli.options import Json, quiet, show


def doctor(
    ray: Annotated[bool, typer.Option("--ray", help="Also start Ray, which takes seconds.")] = False,
    json_lines: Json = False,
) -> None:
    """Show what is slow or short on this machine, and the setting to change.

    Exits with 1 where something is broken such that runs will fail.
    """
    quiet(False)
    from fedpeft.report.examined import findings_table, worst
    from fedpeft.runs.checks import examine

    findings = [finding.to_dict() for finding in examine()]
    if ray:
        from fedpeft.simulations.grids.cluster import ray_starts

        findings.append(ray_starts().to_dict())
    show(findings, findings_table, json_lines)
    if worst(findings) == "broken":
        raise typer.Exit(1)

"""The rows of a run that may be private, before it begins: found and counted."""

from __future__ import annotations

from fedpeft.privacy.canaries import canaries_of
from fedpeft.privacy.levels import find_level
from fedpeft.privacy.overlap import initial_training_rows, run_begun_with
from fedpeft.resident import Resident


def check_rows(home: Resident) -> None:
    """Find a run's model and rows, divide them and plant its canaries, which raises what is wrong with them."""
    home.check()
    canaries_of(home)
    if find_level(home.key.level).unit:
        for find in (initial_training_rows, run_begun_with):
            home.once(find)  # the statement needs it in the end, when the file may be gone


def public_counts(home: Resident) -> dict[str, int]:
    """Return each client's public number of rows: canaries count, those that a coin left out as well."""
    partition, canaries = home.partition, canaries_of(home)
    counts = {client: len(rows) for client, rows in zip(partition.client_ids, partition.indices, strict=True)}
    if canaries is not None:
        for index, client in enumerate(partition.client_ids):
            planted, left_out = canaries.of(index)
            counts[client] += len(planted) + left_out
    return counts

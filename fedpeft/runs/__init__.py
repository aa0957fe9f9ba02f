"""Run directories: how they are written, what became of a run, and which runs there are."""

from __future__ import annotations

from fedpeft.runs.directory import (
    ADAPTER,
    CANARIES,
    CONFIG_FILE,
    ENVIRONMENT_FILE,
    EVENTS_FILE,
    Event,
    Listener,
    RunDirectory,
    check_vacant,
    default_directory,
    folder_name,
    read_config,
    read_events,
    read_object,
)
from fedpeft.runs.machine import environment

__all__ = [
    "ADAPTER",
    "CANARIES",
    "CONFIG_FILE",
    "ENVIRONMENT_FILE",
    "EVENTS_FILE",
    "Event",
    "Listener",
    "RunDirectory",
    "check_vacant",
    "default_directory",
    "environment",
    "folder_name",
    "read_config",
    "read_events",
    "read_object",
]

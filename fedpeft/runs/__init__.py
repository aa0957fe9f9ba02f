"""Run directories: how they are written, what became of a run, and which runs there are."""

from __future__ import annotations

from fedpeft.runs.checkpoints import EVENTS as EVENTS
from fedpeft.runs.checkpoints import Checkpoint as Checkpoint
from fedpeft.runs.checkpoints import checkpoint_rounds as checkpoint_rounds
from fedpeft.runs.checkpoints import read_checkpoint as read_checkpoint
from fedpeft.runs.checkpoints import read_facts as read_facts
from fedpeft.runs.checkpoints import remove_checkpoint as remove_checkpoint
from fedpeft.runs.checkpoints import resumable_round as resumable_round
from fedpeft.runs.directory import ADAPTER as ADAPTER
from fedpeft.runs.directory import ADAPTER_BEST as ADAPTER_BEST
from fedpeft.runs.directory import CANARIES as CANARIES
from fedpeft.runs.directory import CLIENTS as CLIENTS
from fedpeft.runs.directory import CONFIG_FILE as CONFIG_FILE
from fedpeft.runs.directory import ENVIRONMENT_FILE as ENVIRONMENT_FILE
from fedpeft.runs.directory import EVENTS_FILE as EVENTS_FILE
from fedpeft.runs.directory import PAGE as PAGE
from fedpeft.runs.directory import SIMULATED as SIMULATED
from fedpeft.runs.directory import Event as Event
from fedpeft.runs.directory import Listener as Listener
from fedpeft.runs.directory import RunDirectory as RunDirectory
from fedpeft.runs.directory import check_vacant as check_vacant
from fedpeft.runs.directory import default_directory as default_directory
from fedpeft.runs.directory import folder_name as folder_name
from fedpeft.runs.directory import read_config as read_config
from fedpeft.runs.directory import read_events as read_events
from fedpeft.runs.directory import read_object as read_object
from fedpeft.runs.lock import RunLock as RunLock
from fedpeft.runs.machine import environment as environment

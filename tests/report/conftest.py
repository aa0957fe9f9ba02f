from tests.runs.events import config, events, run_directory

__all__ = ["config", "events", "run_directory"]

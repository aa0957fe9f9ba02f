"""The command line, a file for each group of commands. Heavy imports wait inside the commands.

``fedpeft --help`` answers at once, therefore: nothing here imports more than typer before a command runs.
"""

from fedpeft.cli.app import app, main

__all__ = ["app", "main"]

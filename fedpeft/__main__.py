"""The command line, as ``python -m fedpeft``."""

from fedpeft.cli import main

main()

"""Figures that the documentation quotes.

A package, and no mere folder, because Opacus installs one of this name, which would be found in its place: hence
``python -m benchmarks.NAME``, from the checkout.
"""

from fedpeft.chatter import silence

silence()  # before a benchmark imports the libraries that would speak

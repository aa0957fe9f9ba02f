"""A configuration file to begin one's own from."""

from __future__ import annotations

from fedpeft.cli.options import Asked, quiet, spread


@spread()
def config(asked: Asked) -> None:
    """Print a configuration file with every key, its default and what it means, to begin your own from.

    For example `fedpeft config --preset digits > my.toml`, then `fedpeft simulate my.toml`.
    """
    quiet(False)
    from fedpeft.config.template import commented
    from fedpeft.strategies import find

    chosen = asked.config(default=None)
    options = find(chosen.strategy.name).parse_options(chosen.strategy.options)
    print(commented(chosen, options), end="")

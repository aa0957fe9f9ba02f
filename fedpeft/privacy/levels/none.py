"""No protection: what a run is without privacy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from fedpeft.privacy.levels.level import Level, Words

if TYPE_CHECKING:
    from fedpeft.config import RunConfig
    from fedpeft.config.privacy import PrivacyConfig
    from fedpeft.privacy.accounting import Charge


class NoLevel(Level):
    """Nothing is protected from anybody."""

    name = "none"
    adversary = "nobody: the server sees single updates, and the adapter may give away any row"

    def charge(self, config: RunConfig, num_examples: int) -> Charge:
        """Return steps without noise, whose epsilon is infinite."""
        from fedpeft.privacy.accounting import Charge
        from fedpeft.training.local import num_steps

        return Charge(0.0, 1.0, num_steps(config.train, num_examples))

    def tells_metrics(self, privacy: PrivacyConfig) -> bool:
        """Tell all."""
        return True

    def weighs_rows(self, privacy: PrivacyConfig) -> bool:
        """Take row counts for weights."""
        return True

    def lists_clients(self, privacy: PrivacyConfig) -> bool:
        """Tell all."""
        return True

    def words(self, config: RunConfig) -> Words:
        """Say that there is nothing."""
        return Words(
            adjacency="none: any two runs may be told apart",
            mechanism="no noise",
            sampling="all rows",
            declared=(),
            drawn="batches",
            sums="{steps} steps without noise",
            whose="of every client",
        )

    def protected(
        self, config: RunConfig, clients: int, examples: Mapping[str, int], largest: int | None
    ) -> tuple[int, str]:
        """Protect nobody."""
        return 0, "nobody"

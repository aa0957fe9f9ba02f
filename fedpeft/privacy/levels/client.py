"""Protection of whole clients: clipped updates and noise on their sum; see `fedpeft.strategies.averaging.private_mean`.

The server is trusted: it sees single updates, and who took part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from fedpeft.privacy.levels.level import Level, Words

if TYPE_CHECKING:
    from fedpeft.config import RunConfig
    from fedpeft.config.privacy import PrivacyConfig
    from fedpeft.privacy.accounting import Charge
    from fedpeft.privacy.client_mechanism import ClientPrivacy

ADJACENCY = {
    "poisson": "add or remove one client with all its rows; the number of clients is public",
    "fixed": "replace one client with all its rows by another; the number of clients is public",
}
ADAPTIVE = "adaptive: the norm follows a noised quantile of the updates' norms, whose cost is included"


class ClientLevel(Level):
    """Each client with all its rows, against everybody but the server.

    It refuses nothing itself: whether a method can work on a noised sum is known where methods are, the server charges
    each round before it begins, and an update is clipped whole, whatever it is of.
    """

    name = "client"
    adversary = (
        "the other clients and whoever sees any adapter or record of the run; the SERVER IS TRUSTED: it sees single "
        "updates, and who took part"
    )
    server_adds_noise = True
    hides_cohort = True

    def charge(self, config: RunConfig, num_examples: int) -> Charge:
        """Return what a round costs every client, whatever its rows."""
        return self.server_mechanism(config).charge(config.federation.fraction)

    def lists_clients(self, privacy: PrivacyConfig) -> bool:
        """All clients have spent the same."""
        return True

    def server_mechanism(self, config: RunConfig) -> ClientPrivacy:
        """Return the mechanism, its noise calibrated where none is given."""
        from fedpeft.privacy.client_mechanism import client_privacy

        return client_privacy(config)

    def words(self, config: RunConfig) -> Words:
        """Describe clipped updates and their noised sum."""
        privacy = config.privacy
        moving = ", moved along by a noised quantile whose cost is included" if privacy.adaptive_clipping else ""
        sampling = f"Poisson sampling of clients with chance {config.federation.fraction:g}, kept secret"
        sums = "{steps} noised sums; each client is in each of them with chance {chance}"
        if privacy.cohort == "fixed":
            sampling = (
                "fixed cohorts: no amplification, every client is taken to be in every round, at twice the sensitivity"
            )
            sums = (
                "{steps} noised sums, accounted as if every client were in each (fixed cohort: no amplification, twice "
                "the sensitivity)"
            )
        return Words(
            adjacency=ADJACENCY[privacy.cohort],
            mechanism=f"each client's whole update clipped to {privacy.max_update_norm:g}{moving}; uniform weights; "
            "Gaussian noise on the sum, in every round, also where nobody answers; divided by the public size of a "
            "cohort",
            sampling=sampling,
            declared=("number of clients",),
            drawn="cohorts",
            sums=sums,
            whose="for every client, whoever took part",
            clipping=ADAPTIVE if privacy.adaptive_clipping else "",
        )

    def protected(
        self, config: RunConfig, clients: int, examples: Mapping[str, int], largest: int | None
    ) -> tuple[int, str]:
        """Count the clients."""
        return clients, f"the {clients} clients"

    def uncovered(self, kept: Sequence[str]) -> list[str]:
        """Say what noise on a sum does not reach: DP-SGD does, since it covers all that a client trains."""
        if not kept:
            return []
        return [
            f"{' and '.join(kept)} stays with each client and is covered by no noise: neither it, nor scores of models "
            "that hold it, may be shown to anybody else; and who has any has taken part. Of this run's directory that "
            "is clients/, checkpoints/ and the test scores in metrics.jsonl and its report"
        ]

    def secret_cohort(self, privacy: PrivacyConfig) -> bool:
        """Tell whether cohorts are Poisson samples."""
        return privacy.cohort == "poisson"

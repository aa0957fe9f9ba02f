"""Whether a next charge would pass a budget."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fedpeft.config.privacy import Accountant, PrivacyConfig
from fedpeft.privacy.accounting import Charge, merged, spent, upper_bound
from fedpeft.privacy.ledger import Entry, Ledger


@dataclass(frozen=True)
class Budget:
    """What may be spent in all.

    Parameters
    ----------
    epsilon : float
        At `delta`.
    delta : float
        See there.
    accountant : str
        Who computes it.
    """

    epsilon: float
    delta: float
    accountant: Accountant = "prv"

    @classmethod
    def of(cls, privacy: PrivacyConfig) -> Budget | None:
        """Return a run's own budget; None where it has none."""
        return None if privacy.epsilon is None else cls(privacy.epsilon, privacy.delta, privacy.accountant)

    def allows(self, before: Iterable[Charge], charge: Charge, planned: Charge | None = None) -> bool:
        """Tell whether a charge may be made after those before it.

        Parameters
        ----------
        before : iterable of Charge
            What was spent.
        charge : Charge
            What is asked for.
        planned : Charge, optional
            All that is to come, as far as it is known: where the budget allows the whole, it allows every part. The
            accountant is then asked once for a client, and not for every message.
        """
        whole = merged([*before, charge])
        if planned is not None and _is_part(whole, planned) and self._covers([planned]):
            return True
        return upper_bound(whole, self.delta) <= self.epsilon or self._covers(whole)

    def _covers(self, charges: Iterable[Charge]) -> bool:
        return spent(charges, self.delta, self.accountant).epsilon <= self.epsilon


def _is_part(charges: Iterable[Charge], planned: Charge) -> bool:
    return all(
        (one.noise_multiplier, one.sample_rate) == (planned.noise_multiplier, planned.sample_rate)
        and one.steps <= planned.steps
        for one in charges
    )


@dataclass(frozen=True)
class Limit:
    """A budget, and what counts against it.

    Parameters
    ----------
    budget : Budget
        What may be spent.
    client : str, optional
        Whose entries count; all clients' if not given.
    run : str, optional
        Of which run; of all if not given.
    planned : Charge, optional
        See `Budget.allows`.
    """

    budget: Budget
    client: str | None = None
    run: str | None = None
    planned: Charge | None = None


def charged(ledger: Ledger, entry: Entry, limits: Iterable[Limit] = ()) -> bool:
    """Put an entry on the books where every limit allows it; once this returns True, its training may begin.

    Parameters
    ----------
    ledger : Ledger
        The books.
    entry : Entry
        What is about to be trained.
    limits : iterable of Limit
        None allow everything.

    Raises
    ------
    LedgerError
        The books cannot be kept.
    """
    with ledger.held():  # nobody else may spend between the look and the charge
        if ledger.is_charged(entry):
            return True
        for limit in limits:
            before = [one.charge for one in ledger.entries(limit.client, limit.run)]
            if not limit.budget.allows(before, entry.charge, limit.planned):
                return False
        ledger.charge(entry)
    return True

"""Whether a next charge would pass a budget."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fedpeft.privacy.accounting import Charge, spent
from fedpeft.privacy.ledger import Entry, Ledger
from fedpeft.privacy.settings import Accountant, PrivacyConfig


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

    def allows(self, before: Iterable[Charge], charge: Charge) -> bool:
        """Tell whether a charge may be made after those before it."""
        return spent([*before, charge], self.delta, self.accountant).epsilon <= self.epsilon


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
    """

    budget: Budget
    client: str | None = None
    run: str | None = None


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
            if not limit.budget.allows(before, entry.charge):
                return False
        ledger.charge(entry)
    return True

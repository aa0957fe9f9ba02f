"""A run's own books: what it charged or was told of, what that costs so far, and the statement at its end.

Record level: a simulation's driver charges every message as it is given to a worker (`fedpeft.simulations.charging`);
in a deployment each site charges itself, and tells its total. Client level: the server charges every round before it
begins, for all clients alike, since it must not be known who was in it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from fedpeft.adapters.state import ClientUpdate, PrivacyClaim
from fedpeft.config import RunConfig
from fedpeft.errors import BudgetSpentError, LedgerError
from fedpeft.jsons import strict_json
from fedpeft.privacy.accounting import Charge, merged, spent, upper_bound
from fedpeft.privacy.budget import Budget, Limit, charged
from fedpeft.privacy.ledger import EVERYBODY, LEDGER, Entry, Ledger
from fedpeft.privacy.levels import level_of
from fedpeft.privacy.overlap import InTheClear
from fedpeft.privacy.statement import NOTHING, PRIVACY, Facts, state, void
from fedpeft.rounding import as_given
from fedpeft.runs import RunDirectory

ONE_RUN = (
    "this simulation knows of no other run on these rows: what all of them cost adds up, tries and sweeps included, "
    "and so does choosing among them"
)
LOOKED_AT = 8  # different clients a round, before a bound is taken for the rest


class Books:
    """The books of one run.

    Parameters
    ----------
    config : RunConfig
        With ``privacy.level`` other than ``none``.
    directory : RunDirectory
        Where ledger and statement go.
    clients : mapping of str to int
        Row counts of all clients, as far as they are known from the start.
    told : bool
        Whether sites keep their own ledgers and tell of them: a deployment.
    largest : int, optional
        Rows of the client that has most, where somebody knows and it may not be told.
    resumes : bool
        Whether the run goes on, and its ledger with it.
    """

    def __init__(
        self,
        config: RunConfig,
        directory: RunDirectory,
        clients: Mapping[str, int],
        *,
        told: bool = False,
        largest: int | None = None,
        resumes: bool = False,
    ) -> None:
        self.config, self.directory, self.told = config, directory, told
        path = directory.path / LEDGER
        self.ledger = Ledger(path, "run") if resumes else Ledger.create(path, "run")
        held = self.ledger.entries()  # whatever is wrong with it comes out before anybody trains
        # a folder that was moved, or is looked at from within, holds the run that it held
        self.run = held[0].run if held else directory.path.resolve().name
        self._level = level_of(config.privacy)
        self._examples, self._largest = dict(clients), largest
        self._known: dict[str, Charge] = {}  # one round's charge of each site, as it last told
        self._silent: set[str] = set()
        self._settled = 0

    def memory(self) -> dict[str, Any]:
        """Return what is known beside the ledger, as plain JSON, and how many charges the ledger holds."""
        return {
            "charges": len(self.ledger.entries()),
            "examples": self._examples if self.told else {},
            "known": {client: vars(charge) for client, charge in self._known.items()},
            "silent": sorted(self._silent),
            "settled": self._settled,
        }

    def recall(self, memory: Mapping[str, Any]) -> None:
        """Take up what `memory` returned; the ledger may hold more since, and never less.

        Raises
        ------
        LedgerError
            It holds less: charges are missing.
        """
        if (held := len(self.ledger.entries())) < memory["charges"]:
            raise LedgerError(
                f"the privacy ledger '{self.ledger.path}' holds {held} charges, and held {memory['charges']} when the "
                "checkpoint was written. Nobody trains on it. Put back the copy that holds all charges."
            )
        self._examples |= memory["examples"]
        self._known = {client: Charge(**charge) for client, charge in memory["known"].items()}
        self._silent, self._settled = set(memory["silent"]), memory["settled"]

    def begin_round(self, server_round: int, charge: Charge) -> None:
        """Charge everybody for a round, before anybody is drawn.

        Raises
        ------
        BudgetSpentError
            The budget does not allow another round.
        """
        entry = Entry(self.run, EVERYBODY, server_round, charge.noise_multiplier, charge.sample_rate, charge.steps)
        budget = Budget.of(self.config.privacy)
        if not charged(self.ledger, entry, [] if budget is None else [Limit(budget)]):
            assert budget is not None, "nothing else could refuse it"
            raise BudgetSpentError(
                f"round {server_round} would pass privacy.epsilon = {as_given(budget.epsilon)}. What was done "
                "before this round is saved."
            )

    def settle(self, server_round: int, messages: Mapping[str, int], updates: Iterable[ClientUpdate]) -> None:
        """Take in what the sites of a deployment say that they spent, and assume the worst of those that say nothing.

        Parameters
        ----------
        server_round : int
            Which round is over; a second call for it changes nothing.
        messages : mapping of str to int
            How often each client was asked to train.
        updates : iterable of ClientUpdate
            Of those whose answers count; what they say of their privacy is looked at.
        """
        if not (self.told and self._level.clients_add_noise) or server_round <= self._settled:
            return
        self._settled = server_round
        answered = {update.client_id: update for update in updates}
        for client, asked in messages.items():
            if asked <= 0:  # it was asked, and said that its budget is spent
                continue
            update = answered.get(client)
            total = None if update is None else _credible(update.metrics.spent)
            if update is not None and total is not None:
                self._examples[client] = update.num_examples
                per_round = update.metrics.steps or 0
                self._known[client] = replace(total, steps=per_round) if 0 < per_round < 2**53 else total
                self._silent.discard(client)
                steps = total.steps - sum(entry.steps for entry in self.ledger.entries(client))
            elif (known := self._assumed(client)) is not None:
                total, steps = known, known.steps * asked
            else:
                self._silent.add(client)
                continue
            if steps > 0:
                noise, rate = total.noise_multiplier, total.sample_rate
                self.ledger.charge(Entry(self.run, client, server_round, noise, rate, steps))

    def _assumed(self, client: str) -> Charge | None:
        if not self.config.privacy.public_counts:
            return self._level.charge(self.config, 0)
        return self._known.get(client)

    def charges(self, clients: Iterable[str] = ()) -> dict[str, list[Charge]]:
        """Return what was spent on each client; on those named, at least nothing."""
        held: dict[str, list[Charge]] = {client: [] for client in [*self._examples, *clients]}
        everybody: list[Charge] = []
        for entry in self.ledger.entries():
            if entry.client == EVERYBODY:
                everybody.append(entry.charge)
            else:
                held.setdefault(entry.client, []).append(entry.charge)
        if everybody and not held:  # nobody is known by name yet
            held[EVERYBODY] = []
        return {client: own + everybody for client, own in held.items()}

    def epsilon_max(self) -> float | None:
        """Return an upper bound of what the clients have spent so far; None where nothing can be stated.

        Exact for a few different clients. The accountant takes a good part of a second for each, so of many it looks at
        those that a cheap bound puts first, and takes the bound's word for the others.
        """
        privacy = self.config.privacy
        if void(privacy):
            return None
        # here every charge was held against the budget; a site may have one of its own
        most = math.inf if privacy.epsilon is None or self.told else privacy.epsilon
        mechanisms = {merged(charges) for charges in self.charges().values()}
        bounds = sorted(((upper_bound(held, privacy.delta), held) for held in mechanisms), key=lambda pair: -pair[0])
        largest = 0.0
        for looked, (bound, held) in enumerate(bounds):
            if bound <= largest:
                break
            if looked == LOOKED_AT:
                largest = bound
                break
            largest = max(largest, spent(held, privacy.delta, privacy.accountant).epsilon)
        return min(most, largest)

    def close(
        self,
        clients: Iterable[str] = (),
        kept: Iterable[str] = (),
        clear: InTheClear = NOTHING,
    ) -> Facts:
        """Write the statement; return it.

        Parameters
        ----------
        clients : iterable of str
            All that the server came to know.
        kept : iterable of str
            What stays with each client, by role.
        clear : InTheClear
            What of the training rows no noise covers.

        Raises
        ------
        OSError
            It cannot be written.
        """
        notes = []
        if self.told:
            which = "test rows" if self.config.adapter.init_data is None else "test rows or those of adapter.init_data"
            notes.append(f"whether {which} are among the sites' own rows is known to the sites alone")
        else:
            notes.append(ONE_RUN)
        if self.told and self._level.clients_add_noise:
            notes.append("this is one run: a site's own ledger adds up all runs on its rows")
        charges, silent = self.charges(clients), sorted(self._silent)
        facts = state(
            self.config,
            charges,
            self._examples,
            clear,
            notes=notes,
            kept=tuple(kept),
            silent=silent,
            largest=self._largest,
        )
        text = json.dumps(strict_json(facts), indent=2, allow_nan=False) + "\n"
        path = self.directory.path / PRIVACY
        partial = path.with_name(f".{PRIVACY}")
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
        return facts


def _credible(claim: PrivacyClaim | None) -> Charge | None:
    """Return what a site says that it spent in this run; None where it says nothing that makes sense."""
    if claim is None or not (0 <= claim.noise_multiplier < math.inf and 0 < claim.sample_rate <= 1):
        return None
    return Charge(claim.noise_multiplier, claim.sample_rate, claim.steps) if 0 <= claim.steps < 2**53 else None

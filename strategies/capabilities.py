"""What a method does, in one record: tables, refusals and byte counts derive from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fedpeft.adapters.kinds import KINDS, Head, Kind, Update
from fedpeft.adapters.state import Role


def _names(is_such: Callable[[Kind], bool]) -> str:
    return ", ".join(name for name, kind in KINDS.ours.items() if is_such(kind))


# names of our kinds, for texts
LINEAR_KINDS = _names(lambda kind: kind.linear)
FROZEN_A_KINDS = _names(lambda kind: kind.update == "product" and Role.A in kind.fixed)


@dataclass(frozen=True)
class Merging:
    """What a method does with adapters on disk, which come from no federation: see `fedpeft.strategies.merging.merge`.

    Parameters
    ----------
    refused : str
        Why it says nothing about them, after its name, such as ``merges nothing``; empty if it does.
    any_rank : bool
        Whether it can write any rank; if not, it keeps the adapters' own.
    rank_option : str
        Name of the option that sets the rank of what it writes, if there is one.
    rank_by : str
        The option that decides on the ranks where the method finds them itself, such as ``threshold=T``.
    shares_a : str
        What it averages over adapters that must share A, such as ``B``; empty if they need not.
    as_round : int
        Which round of a federation the merge is like; the second, since a first one may be held otherwise.
    """

    refused: str = ""
    any_rank: bool = False
    rank_option: str = ""
    rank_by: str = ""
    shares_a: str = ""
    as_round: int = 2


@dataclass(frozen=True)
class Capabilities:
    """What a method does, from which tables, refusals and byte counts derive.

    Parameters
    ----------
    paper : str
        arXiv number or venue.
    sends : str
        What the server sends down, in the paper's symbols.
    exact : str
        When the sent product equals the weighted mean of the clients' products.
    needs_single_factors : bool
        Whether the server must see single clients' factors; if not, sums suffice.
    trains : str
        What clients train, besides the head.
    personal : frozenset of Role
        What stays with each client; where there is such, scores are means over the clients' own models.
    changes_rank : bool
        Whether what is sent may have another rank than the clients' adapters had at first.
    mixed_ranks : bool
        Whether clients may have different ranks.
    changes_base : bool
        Whether the frozen base moves too; clients are then sent its change.
    controls : bool
        Whether clients keep control variates and are sent the server's, as large as what they send up.
    plain_steps : bool
        Whether clients must step along the gradient itself, see `fedpeft.training.optimizers.record.Optimizer`.
    init : str
        The ``adapter.init`` that the method is defined with; any if empty.
    updates : frozenset of str, optional
        The forms of update that the method can merge, see `fedpeft.adapters.kinds.Kind`; any if None.
    fixed_factors : bool
        Whether it merges kinds of which a factor is fixed.
    kind : str
        The one of `kinds` that a run has where it names none; if empty ``lora``, or the only one that there is.
    head : {"shared", "local", "frozen"}
        The ``adapter.head`` of a run that says nothing of it.
    merging : Merging
        How it merges adapters on disk.
    bound : str
        What a comparison says of it after its name, where it is no method but a bound that methods lie above or below;
        empty if it is a method.
    """

    paper: str
    sends: str
    exact: str
    needs_single_factors: bool
    trains: str = "A, B"
    personal: frozenset[Role] = frozenset()
    changes_rank: bool = False
    mixed_ranks: bool = False
    changes_base: bool = False
    controls: bool = False
    plain_steps: bool = False
    init: str = ""
    updates: frozenset[Update] | None = frozenset({"product"})
    fixed_factors: bool = True
    kind: str = ""
    head: Head = "shared"
    merging: Merging = Merging()
    bound: str = ""

    @property
    def kinds(self) -> frozenset[str]:
        """The ``adapter.kind`` that the method can merge, of all that are registered."""
        return frozenset(name for name, kind in KINDS.all().items() if self.takes(kind))

    def takes(self, kind: Kind) -> bool:
        """Tell whether the method can merge adapters of a kind."""
        return (self.updates is None or kind.update in self.updates) and (self.fixed_factors or not kind.fixed)

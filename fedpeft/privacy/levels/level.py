"""What a level of protection has to say and to do; see `Level`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fedpeft.config.privacy import LEVELS, LevelSettings
from fedpeft.errors import PrivacyError

if TYPE_CHECKING:
    import torch

    from fedpeft.config import RunConfig
    from fedpeft.config.privacy import Level as LevelName
    from fedpeft.config.privacy import PrivacyConfig
    from fedpeft.data.splits import EncodedSplit
    from fedpeft.privacy.accounting import Charge
    from fedpeft.privacy.client_mechanism import ClientPrivacy
    from fedpeft.privacy.dp_sgd import Rows
    from fedpeft.privacy.mechanism import RecordMechanism
    from fedpeft.privacy.randomness import Randomness
    from fedpeft.resident import Resident
    from fedpeft.training.batched.together import JointGradients
    from fedpeft.training.local import Gradients


@dataclass(frozen=True)
class Words:
    """How a level's run is described, in its statement and before it begins.

    Parameters
    ----------
    adjacency : str
        What neighbours differ in.
    mechanism : str
        What is clipped and where the noise is.
    sampling : str
        How units come to be in what noise is added to.
    declared : tuple of str
        What is public beside what always is.
    drawn : str
        What whoever knows the seed can replay, beside the noise.
    sums : str
        How often noise is added, with ``{steps}`` and the ``{chance}`` of a unit to be in a sum.
    whose : str
        On whom, and when, the planned epsilon is spent.
    clipping : str
        What there is to say of it beforehand; mostly nothing.
    """

    adjacency: str
    mechanism: str
    sampling: str
    declared: tuple[str, ...]
    drawn: str
    sums: str
    whose: str
    clipping: str = ""


class Level(ABC):
    """A level of protection: its unit, its adversary, what a round costs, and who does what for it.

    One file a level. Its settings are a row of `fedpeft.config.privacy.LEVELS`; everything else that differs between
    levels is asked of this object, and no other code knows a level by its name.

    Attributes
    ----------
    name : str
        As in ``privacy.level``.
    adversary : str
        Against whom it protects, and who is trusted with what.
    server_adds_noise : bool
        Whether the server, which is trusted with single updates, noises their sum and charges every round.
    hides_cohort : bool
        Whether it must not be known who took part; all clients then have one account.
    assumed : str
        What a statement rests on beside what all rest on, as the beginning of a sentence; see `paragraph`.
    """

    name: ClassVar[LevelName]
    adversary: ClassVar[str]
    server_adds_noise: ClassVar[bool] = False
    hides_cohort: ClassVar[bool] = False
    assumed: ClassVar[str] = ""

    @property
    def settings(self) -> LevelSettings:
        """What the configuration knows of it."""
        return LEVELS[self.name]

    @property
    def unit(self) -> str:
        """What neighbours differ in: ``row``, ``client``; empty where nothing is protected."""
        return self.settings.unit

    @property
    def clients_add_noise(self) -> bool:
        """Whether each client noises its gradients, keeps the account of it, and trusts no server with its rows."""
        return self.settings.clients_add_noise

    # --- what it costs, and what it refuses --------------------------------------------------------------------------

    @abstractmethod
    def charge(self, config: RunConfig, num_examples: int) -> Charge:
        """Return what one round costs a client with so many rows; its noise is calibrated where it is not given.

        Raises
        ------
        PrivacyError
            No noise meets the budget.
        """

    def check(self, config: RunConfig) -> None:  # noqa: B027
        """Raise ConfigError for what the mechanism would not cover, or could not do."""

    def check_counts(self, config: RunConfig, counts: Iterable[int]) -> None:  # noqa: B027
        """Raise PrivacyError where the budget allows no client of so many rows a single round."""

    def check_model(self, home: Resident) -> None:  # noqa: B027
        """Raise PrivacyError unless the model can be trained so; before anything is charged or released."""

    # --- what may be told ----------------------------------------------------------------------------------------

    def tells_metrics(self, privacy: PrivacyConfig) -> bool:
        """Tell whether losses, times and errors of single clients may be told; no noise covers them."""
        return privacy.release_metrics

    def weighs_rows(self, privacy: PrivacyConfig) -> bool:
        """Tell whether clients' row counts are public, and weigh; else all clients weigh alike."""
        return False

    @abstractmethod
    def lists_clients(self, privacy: PrivacyConfig) -> bool:
        """Tell whether a statement may list what each client spent."""

    # --- who makes the noise -------------------------------------------------------------------------------------

    def client_mechanism(
        self, config: RunConfig, num_examples: int, noise_multiplier: float | None = None
    ) -> RecordMechanism:
        """Return what a client with so many rows does to its gradients, where clients add noise.

        Parameters
        ----------
        config : RunConfig
            The run's.
        num_examples : int
            The client's rows.
        noise_multiplier : float, optional
            What calibration gave, where somebody has done it before.

        Raises
        ------
        PrivacyError
            Clients add none, or no noise meets the budget.
        """
        raise PrivacyError(f"privacy.level = '{self.name}' adds no noise at clients.")

    def gradients(
        self,
        home: Resident,
        split: EncodedSplit,
        rows: Rows,
        mechanism: RecordMechanism,
        randomness: Randomness,
    ) -> Callable[[torch.optim.Optimizer], Gradients]:
        """Return how a client makes private gradients of its rows; see `client_mechanism`."""
        raise PrivacyError(f"privacy.level = '{self.name}' adds no noise at clients.")

    def joint_gradients(
        self,
        home: Resident,
        split: EncodedSplit,
        rows: Sequence[Rows],
        mechanisms: Sequence[RecordMechanism],
        randomness: Sequence[Randomness],
    ) -> JointGradients:
        """Return how many clients trained together make private gradients, each of its own rows; see `gradients`."""
        raise PrivacyError(f"privacy.level = '{self.name}' adds no noise at clients.")

    def server_mechanism(self, config: RunConfig) -> ClientPrivacy | None:
        """Return what the server does to the clients' updates; None where it is sent what is private already."""
        return None

    # --- words ---------------------------------------------------------------------------------------------------

    @abstractmethod
    def words(self, config: RunConfig) -> Words:
        """Describe a run."""

    @abstractmethod
    def protected(
        self, config: RunConfig, clients: int, examples: Mapping[str, int], largest: int | None
    ) -> tuple[int, str]:
        """Return the number of units that delta is held against, 0 where nothing is known of it, and say who they are.

        Parameters
        ----------
        config : RunConfig
            The run's.
        clients : int
            How many clients there are.
        examples : mapping of str to int
            Row counts, where they are public.
        largest : int, optional
            Rows of the client that has most, where they are known and not public.
        """

    def warnings(self, config: RunConfig) -> list[str]:
        """Return what an expert would ask about."""
        return []

    def uncovered(self, kept: Sequence[str]) -> list[str]:
        """Return why there is no guarantee where these parts stay with the clients; mostly nothing."""
        return []

    def secret_cohort(self, privacy: PrivacyConfig) -> bool:
        """Tell whether each client joins a round by its own coin."""
        return False

    def deployed(self, privacy: PrivacyConfig) -> list[str]:
        """Return what the sites of a deployment have to do, as lines."""
        return []

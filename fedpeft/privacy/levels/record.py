"""Protection of single rows: DP-SGD at every client, whose server need not be trusted; see `fedpeft.privacy.dp_sgd`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from fedpeft.adapters.kinds import KINDS
from fedpeft.errors import ConfigError
from fedpeft.privacy.levels.level import Level, Words
from fedpeft.rounding import as_given
from fedpeft.training.optimizers import OPTIMIZERS

if TYPE_CHECKING:
    import torch

    from fedpeft.config import RunConfig
    from fedpeft.config.privacy import PrivacyConfig
    from fedpeft.data.splits import EncodedSplit
    from fedpeft.privacy.accounting import Charge
    from fedpeft.privacy.dp_sgd import Rows
    from fedpeft.privacy.mechanism import RecordMechanism
    from fedpeft.privacy.randomness import Randomness
    from fedpeft.resident import Resident
    from fedpeft.training.batched.together import JointGradients
    from fedpeft.training.local import Gradients

COUNTS = {
    True: "row counts are public and held fixed, so that a removed row is one that contributes nothing",
    False: "sample rate, noise and divisor are fixed publicly, so that row counts show in nothing",
}


class RecordLevel(Level):
    """Each row of each client, against the server too."""

    name = "record"
    adversary = (
        "a server that keeps to the protocol, the other clients, and whoever sees any adapter of the run; not "
        "whoever reads a client's own disk, or learns how long its training takes"
    )
    # what the proof of independence cannot exclude; see `fedpeft.privacy.independence`
    assumed = "the model keeps a batch's rows apart as it did for rows that were made up, "

    def charge(self, config: RunConfig, num_examples: int) -> Charge:
        """Return the steps of a round."""
        return self.client_mechanism(config, num_examples).charge

    def check(self, config: RunConfig) -> None:
        """Refuse kinds without gradients of single rows, clipping of whole gradients, and steps that tell counts."""
        privacy, adapter, train = config.privacy, config.adapter, config.train
        if not adapter.facts.row_by_row:
            able = sorted(name for name, kind in KINDS.all().items() if kind.row_by_row)
            raise ConfigError(
                f"adapter.kind = '{adapter.kind}' is not for privacy.level = 'record': the gradient of each single "
                f"row cannot be had for what it trains. Allowed: {', '.join(able)}; or "
                "privacy.level=client."
            )
        if why := OPTIMIZERS.find(train.optimizer).not_private:
            raise ConfigError(f"train.optimizer = '{train.optimizer}' is not for privacy.level = 'record': {why}")
        if train.precision == "fp16":
            raise ConfigError(
                "train.precision = 'fp16' is not for privacy.level = 'record': one row that overflows would scale all "
                "the others' losses anew. Allowed: fp32, bf16."
            )
        if train.max_grad_norm:
            raise ConfigError(
                f"train.max_grad_norm = {train.max_grad_norm:g} clips whole gradients; under privacy.level = 'record' "
                "each row's is clipped: set privacy.max_grad_norm, and leave this unset."
            )
        if not privacy.public_counts and train.local_steps is None:
            raise ConfigError(
                "privacy.public_counts = false needs train.local_steps: the length of an epoch would tell how many "
                "rows a client has."
            )

    def check_counts(self, config: RunConfig, counts: Iterable[int]) -> None:
        """Refuse a given noise of which the budget allows nobody a round."""
        from fedpeft.privacy.mechanism import require_a_round

        require_a_round(config, counts)

    def check_model(self, home: Resident) -> None:
        """Show that rows are independent, once for a resident model."""
        from fedpeft.privacy.independence import row_engine  # which loads Opacus

        row_engine(home)

    def weighs_rows(self, privacy: PrivacyConfig) -> bool:
        """Row counts show in everything, or in nothing."""
        return privacy.public_counts

    def lists_clients(self, privacy: PrivacyConfig) -> bool:
        """Where counts are private, what a client spent is in its own ledger only."""
        return privacy.public_counts

    def client_mechanism(
        self, config: RunConfig, num_examples: int, noise_multiplier: float | None = None
    ) -> RecordMechanism:
        """Return the mechanism of DP-SGD; see `fedpeft.privacy.mechanism`."""
        from fedpeft.privacy.mechanism import record_mechanism

        return record_mechanism(config, num_examples, noise_multiplier)

    def gradients(
        self,
        home: Resident,
        split: EncodedSplit,
        rows: Rows,
        mechanism: RecordMechanism,
        randomness: Randomness,
    ) -> Callable[[torch.optim.Optimizer], Gradients]:
        """Return clipped and noised sums of rows' gradients, on hooks that the resident model keeps."""
        from fedpeft.privacy.dp_sgd import PrivateGradients
        from fedpeft.privacy.independence import row_engine

        return lambda optimizer: PrivateGradients(
            row_engine(home),
            split,
            rows,
            mechanism,
            randomness,
            optimizer,
            physical=home.physical_rows,
            train=home.config.train,
        )

    def joint_gradients(
        self,
        home: Resident,
        split: EncodedSplit,
        rows: Sequence[Rows],
        mechanisms: Sequence[RecordMechanism],
        randomness: Sequence[Randomness],
    ) -> JointGradients:
        """Return the same of many clients, each row through a copy of its client's tensors."""
        from fedpeft.privacy.joint import JointPrivateGradients

        return JointPrivateGradients(
            home.adapted,
            home.own_layers,
            split,
            home.config.train.precision,
            rows,
            mechanisms,
            randomness,
            home.physical_rows,
        )

    def words(self, config: RunConfig) -> Words:
        """Describe DP-SGD."""
        privacy = config.privacy
        drawn = "Poisson sampling of rows" if privacy.sampling == "poisson" else "shuffled rows"
        return Words(
            adjacency="add or remove one row of one client (a row of its data, not a person, who may have several); "
            + COUNTS[privacy.public_counts],
            mechanism=f"DP-SGD at every client: each row's gradient over all trained tensors together clipped to "
            f"{privacy.max_grad_norm:g}, Gaussian noise on the sum, at every step, also where its batch is empty",
            sampling=f"{drawn}; every round that a client was asked in is charged in full",
            declared=("row counts of the clients",) if privacy.public_counts else (),
            drawn="batches",
            sums="{steps} noised steps a client in all; each row is in each of them with chance {chance}",
            whose="if every client takes part in every round",
        )

    def protected(
        self, config: RunConfig, clients: int, examples: Mapping[str, int], largest: int | None
    ) -> tuple[int, str]:
        """Count the rows of the largest client; where counts are private, their number is not told."""
        privacy, known = config.privacy, [*examples.values(), *([] if largest is None else [largest])]
        if not known and privacy.sample_rate:
            # what is public says how many rows a client is thought to have
            known.append(round(config.train.rows_a_step / privacy.sample_rate))
        most = max(known, default=0)
        if privacy.public_counts:
            return most, f"the {most} rows of the largest client"
        return most, "the rows of the largest client, whose number is not told"

    def warnings(self, config: RunConfig) -> list[str]:
        """Speak of rounding."""
        if config.train.precision != "bf16":
            return []
        return [
            "train.precision = 'bf16': a long row widens the padding of its batch, which may change how the others are "
            "rounded"
        ]

    def deployed(self, privacy: PrivacyConfig) -> list[str]:
        """Tell each site to make its ledger."""
        from fedpeft.privacy.ledger import LEDGER

        epsilon = "EPSILON" if privacy.epsilon is None else as_given(privacy.epsilon)
        return [
            "each site keeps its own ledger, one for all runs on its rows, and trains with one only. Make it there: "
            f"fedpeft privacy ledger --create /path/{LEDGER}; then --node-config '... "
            f'privacy-ledger="/path/{LEDGER}"\'. It may hold runs to a budget of its own: privacy-epsilon={epsilon}'
        ]

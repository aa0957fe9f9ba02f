"""``[strategy]``, ``[federation]``, ``[simulation]`` and ``[run]``: how a run goes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from fedpeft.config.section import Section
from fedpeft.config.values import count_auto_or_off, number_or_auto


class StrategyConfig(BaseModel):
    """The server's method and its own options, which the method itself checks."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)

    name: str = Field("lora-fair", description="see `fedpeft strategies`")

    @property
    def options(self) -> dict[str, Any]:
        """Everything in the section but the name."""
        return dict(self.__pydantic_extra__ or {})


class FederationConfig(Section):
    """How many clients, for how long."""

    clients: int | None = Field(None, ge=1, description="number of clients; a natural partition's own number")
    rounds: int = Field(10, ge=1, description="rounds of training")
    fraction: float = Field(1.0, gt=0, le=1, description="share of the clients drawn each round")
    min_clients: int = Field(1, ge=1, description="fewest good updates that make a round")
    round_timeout: float = Field(3600.0, gt=0, description="seconds a deployment waits for a round's replies")


def cohort_size(clients: int, fraction: float, min_clients: int) -> int:
    """Return how many of the clients are drawn each round."""
    return min(clients, max(1, min_clients, round(fraction * clients)))


# keys of [simulation] on which no result depends: a run that goes on may have others
MACHINE_KEYS = ("workers", "gpus_per_worker", "address", "prefix_cache_limit")


class SimulationConfig(Section):
    """The machine. No result depends on `MACHINE_KEYS`; last digits depend on the others, and on a GPU."""

    workers: Annotated[int | None, BeforeValidator(number_or_auto)] = Field(
        None, ge=0, description="Ray workers; auto: what cores, memory and GPUs bear; 0 trains in this process"
    )
    threads_per_worker: int = Field(1, ge=1, description="CPU threads of a worker")
    batch_clients: Annotated[
        Literal["auto", "off"] | Annotated[int, Field(ge=1)], BeforeValidator(count_auto_or_off)
    ] = Field(
        "off", description="clients that a worker trains in one forward: a number, or auto by a timing at the start"
    )
    gpus_per_worker: Annotated[float | None, BeforeValidator(number_or_auto)] = Field(
        None, ge=0, description="share of a GPU per worker; auto: as many on each as its memory bears; 0 uses none"
    )
    address: str | None = Field(
        None, min_length=1, description="Ray cluster to run on, auto for the one here; RAY_ADDRESS, or an own, if unset"
    )
    prefix_cache: Literal["auto", "on", "off"] = Field(
        "auto",
        description="keep each row's hidden states below the lowest adapted block on disk; auto is decided as the run "
        "begins, and config.toml says how",
    )
    prefix_cache_limit: float | None = Field(
        None, gt=0, description="gigabytes that all such states take at most; 10 or a fifth of the free disk if unset"
    )


def _true_or_false(value: object) -> object:
    """Read what a command line says for true and false; any other text is a name."""
    return {"true": True, "false": False}.get(value.lower(), value) if isinstance(value, str) else value


class RunSection(Section):
    """Name, seed and what is recorded."""

    seed: int = Field(0, ge=0, lt=2**63, description="everything random follows from it")
    name: str | None = Field(None, description="folder under runs/ if --out is not given")
    evaluate_every: int = Field(1, ge=1, description="rounds between evaluations; the last is always evaluated")
    evaluate_clients: bool = Field(False, description="also score each client's share of the test rows")
    evaluate_batch_size: int = Field(64, ge=1, description="rows a batch in evaluation, at most")
    evaluate_tokens: int = Field(
        16384, ge=1, description="tokens a batch in evaluation, padding included, at most, but for a single longer row"
    )
    aggregation_error: bool = Field(True, description="measure how far the sent adapter is from the mean of updates")
    checkpoint_every: int = Field(1, ge=1, description="rounds between checkpoints, from which a run can be resumed")
    monitor: str | None = Field(
        None, description="metric of the test rows that run.patience and run.best go by; the task's first one if unset"
    )
    patience: int | None = Field(
        None, ge=1, description="end the run after so many evaluated rounds without a better run.monitor"
    )
    best: Annotated[bool | str | None, BeforeValidator(_true_or_false)] = Field(
        None, description="true, or a metric: also write the adapter of the best evaluated round, to adapter-best/"
    )
    max_megabytes: float | None = Field(
        None, gt=0, description="end the run before the round that would move more than this, up and down, all clients"
    )
    keep_checkpoints: int = Field(2, ge=1, description="how many of the newest checkpoints are kept")
    generate: int = Field(0, ge=0, description="test rows whose answers, before and after, are shown after the run")
    generate_every: int | None = Field(
        None,
        ge=1,
        description="rounds between judgements by data.metric; before the first round and at the end if unset",
    )
    generate_rows: int | None = Field(
        None, ge=1, description="test rows that are answered for data.metric, drawn once; all if unset"
    )
    execute_code: bool = Field(
        False, description="let data.metric = pass run what the model writes, on this machine and without a sandbox"
    )

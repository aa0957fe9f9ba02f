"""What merging one layer costs, beside forming the dense mean of products, a dense SVD and scikit-learn's k-means.

    python -m benchmarks.aggregation [--clients 100 --size 4096 --rank 16] [--quick] [--json FILE]

Other work on a machine slows whatever runs at that moment. So contenders take turns, each counts with its best time,
and figures are ratios within one run. OpenMP's threads wait passively: spinning for one that has no core takes seconds.
Targets are for the whole size; a quarter of it shows the trend. Nothing fails when one is missed: the table says so.

Memory is that of the whole process, as the kernel counts it (VmHWM): unlike a count of tensors it holds the work space
of LAPACK and what numpy takes. Each method gets a process of its own, in which it has merged a small cohort already, so
that libraries are loaded, and the peak is reset just before. malloc gives back what is freed (MALLOC_MMAP_THRESHOLD_),
as memory that it kept would be used again without being seen.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from sklearn.cluster import KMeans
from torch import Tensor

from fedpeft.adapters.state import AdapterState, ClientUpdate, LoraFactors
from fedpeft.strategies.algebra.factors import client_weights, inner, norm, stack
from fedpeft.strategies.algebra.means import weighted_mean
from fedpeft.strategies.algebra.units import pool
from fedpeft.strategies.base import AdapterStrategy
from fedpeft.strategies.fedit import FedIt
from fedpeft.strategies.flexlora import FlexLora
from fedpeft.strategies.lora_fair import LoraFair
from fedpeft.strategies.lora_lego import LoraLego, merge

LAYER = "layer"
METHODS: dict[str, Callable[[], AdapterStrategy]] = {
    "fedit": lambda: FedIt(seed=0, frozen=[]),
    "lora-fair": lambda: LoraFair(seed=0, frozen=[]),
    "flexlora": lambda: FlexLora(seed=0, frozen=[]),
    "flexlora randomized": lambda: FlexLora(seed=0, frozen=[], solver="randomized"),
    "lora-lego": lambda: LoraLego(seed=0, frozen=[]),
}
SINGLE_FACTORS = [name for name in METHODS if name != "fedit"]  # these hold the cohort


@dataclass(frozen=True)
class Row:
    """One line of the table; a figure without a target is there to be read."""

    what: str
    value: float
    unit: str
    target: str = ""
    passed: bool | None = None
    remark: str = ""


@dataclass(frozen=True)
class Setting:
    """Sizes of a cohort of one square layer, and how often the contenders take turns."""

    clients: int
    size: int
    rank: int
    turns: int

    def __str__(self) -> str:
        return f"{self.clients} clients, {self.size} x {self.size}, rank {self.rank}"


def at_least(what: str, value: float, target: float | None, remark: str = "") -> Row:
    return _judged(what, value, target, ">=", target is not None and value >= target, remark)


def at_most(what: str, value: float, target: float | None, remark: str = "") -> Row:
    return _judged(what, value, target, "<=", target is not None and value <= target, remark)


def _judged(what: str, value: float, target: float | None, sign: str, passed: bool, remark: str) -> Row:
    if target is None:
        return Row(what, value, "x", remark=remark)
    return Row(what, value, "x", f"{sign} {target:g}", passed, remark)


# --- cohorts ---------------------------------------------------------------------------------------------------------


def updates(clients: int, size: int, rank: int, drift: float = 0.3) -> Iterator[ClientUpdate]:
    """Yield float32 clients that left a common adapter, each by `drift` of its length; math.inf: that share nothing."""
    centre, noise = (1.0, drift) if drift < math.inf else (0.0, 1.0)
    common = np.random.default_rng(0)
    A0, B0 = _normal(common, rank, size), _normal(common, size, rank)
    for k in range(clients):
        own = np.random.default_rng([1, k])
        A = (centre * A0 + noise * _normal(own, rank, size)) / size**0.5
        B = (centre * B0 + noise * _normal(own, size, rank)) / 100
        yield ClientUpdate(str(k), 10 + k % 7, {LAYER: LoraFactors(A, B, 2.0)})


def adapter(size: int, rank: int) -> AdapterState:
    """Return what the clients started from."""
    A = _normal(np.random.default_rng(2), rank, size) / size**0.5
    return AdapterState({LAYER: LoraFactors(A, torch.zeros(size, rank), 2.0)})


def _normal(random: np.random.Generator, *shape: int) -> Tensor:
    return torch.from_numpy(random.standard_normal(shape, dtype=np.float32))


def stacked(cohort: Sequence[ClientUpdate]) -> tuple[Tensor, Tensor]:
    """Return B* and A*, whose product is DW, in float32."""
    B, A = stack([u.factors[LAYER] for u in cohort], client_weights(cohort))
    return B.to(torch.float32), A.to(torch.float32)


# --- measuring -------------------------------------------------------------------------------------------------------


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def race(turns: int, *contenders: Callable[[], object]) -> list[float]:
    """Return each contender's best time; they take turns, after a first one that does not count."""
    for contender in contenders:
        contender()
    return [min(times) for times in zip(*([seconds(c) for c in contenders] for _ in range(turns)), strict=True)]


def slope(xs: Sequence[int], times: Sequence[float]) -> float:
    """Return the slope of log time over log x: 1 is proportional, 2 quadratic."""
    return float(np.polyfit(np.log(xs), np.log(times), 1)[0])


def status(field: str) -> int:
    """Return a field of this process's status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def peak(method: str, clients: int, size: int, rank: int, streamed: bool) -> int:
    """Return by how many bytes a merge raises this process's memory; streamed clients are made as they are read."""
    strategy = METHODS[method]()
    strategy.aggregate(updates(3, 4 * rank, rank), adapter(4 * rank, rank))
    current = adapter(size, rank)
    cohort: Iterable[ClientUpdate] = updates(clients, size, rank)
    if not streamed:
        cohort = list(cohort)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    strategy.aggregate(cohort, current)
    return status("VmHWM") - before


def peak_apart(method: str, s: Setting, streamed: bool, quick: bool) -> int:
    """Return `peak` of a process of its own, of this one if `quick`."""
    if quick:
        return peak(method, s.clients, s.size, s.rank, streamed)
    arguments = [method, str(s.clients), str(s.size), str(s.rank), str(int(streamed))]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, "--peak", *arguments]
    return int(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout)


# --- what is compared ------------------------------------------------------------------------------------------------


def fair_rows(s: Setting, judged: bool) -> list[Row]:
    """LoRA-FAIR against forming DW, and against the same formula computed from DW."""
    cohort, current = list(updates(s.clients, s.size, s.rank)), adapter(s.size, s.rank)
    B, A = stacked(cohort)
    strategy = METHODS["lora-fair"]()
    dense, fair = race(s.turns, lambda: B @ A, partial(strategy.aggregate, cohort, current))
    mean = weighted_mean(cohort, current).factors[LAYER]
    gram = mean.A @ mean.A.T
    mu = 0.01 * gram.trace() / s.rank
    residual = (B @ A / mean.scaling - mean.B @ mean.A) @ mean.A.T
    expected = mean.B + torch.linalg.solve(gram + mu * torch.eye(s.rank), residual, left=False)
    sent = strategy.aggregate(cohort, current).factors[LAYER].B
    return [
        at_least(
            f"lora-fair, times faster than DW as one product; {s}",
            dense / fair,
            10 if judged else None,
            f"{fair:.4f} s, {dense:.4f} s",
        ),
        agreement("lora-fair, B against the formula computed from DW in float32", sent - expected, expected),
    ]


def agreement(what: str, difference: Tensor, expected: Tensor) -> Row:
    """Two float32 computations agree where they differ by what float32 rounds."""
    value = float(difference.norm() / expected.norm())
    return Row(what, value, "relative", "<= 1e-05", value <= 1e-5)


def flex_rows(s: Setting, judged: bool) -> list[Row]:
    """FlexLoRA against DW and its dense SVD, which runs once, and its error against the best of its rank."""
    cohort, current = list(updates(s.clients, s.size, s.rank)), adapter(s.size, s.rank)
    B, A = stacked(cohort)
    start = time.perf_counter()
    U, S, Vt = torch.linalg.svd(B @ A, full_matrices=False)
    dense = time.perf_counter() - start
    best = LoraFactors(Vt[: s.rank], U[:, : s.rank] * S[: s.rank], 1.0)
    del U, Vt
    rows = []
    target = Target(cohort)
    for name, times in (("flexlora", 5), ("flexlora randomized", 50)):
        strategy = METHODS[name]()
        (own,) = race(s.turns, partial(strategy.aggregate, cohort, current))
        sent = strategy.aggregate(cohort, current).factors[LAYER]
        what = f"{name}, times faster than DW and its dense SVD; {s}"
        rows.append(at_least(what, dense / own, times if judged else None, f"{own:.3f} s, {dense:.3f} s"))
        rows.extend(nearness(f"{name}, clients alike", target, sent, best, "the dense SVD's"))
    apart = list(updates(s.clients, s.size, s.rank, math.inf))
    exact, random = (METHODS[name]().aggregate(apart, current).factors[LAYER] for name in METHODS if "flex" in name)
    rows.extend(
        nearness("flexlora randomized, clients that share nothing", Target(apart), random, exact, "the exact solver's")
    )
    return rows


class Target:
    """DW of a cohort, and how far from it a product is."""

    def __init__(self, cohort: Sequence[ClientUpdate]) -> None:
        self.B, self.A = stack([u.factors[LAYER] for u in cohort], client_weights(cohort))
        self.square = inner(self.B, self.A, self.B, self.A)

    def error(self, sent: LoraFactors) -> float:
        """Return |DW - sent| / |DW|, good to 1e-10 from 1e-3 on; `squared_distance` would be slower and good below."""
        B = sent.scaling * sent.B.to(torch.float64)
        square = inner(B, sent.A, B, sent.A) - 2 * inner(self.B, self.A, B, sent.A)
        return math.sqrt(max(0.0, 1 + square / self.square))


def nearness(what: str, target: Target, sent: LoraFactors, best: LoraFactors, whose: str) -> Iterator[Row]:
    """Say how far a product is from the best one, and how much further from DW it is."""
    own, least = target.error(sent), target.error(best)
    both = torch.cat([sent.scaling * sent.B, -best.scaling * best.B], dim=1), torch.cat([sent.A, best.A])
    yield Row(f"{what}: product against {whose}", norm(*both) / norm(best.scaling * best.B, best.A), "relative")
    above = own / least - 1 if least else own
    yield Row(f"{what}: |DW - sent| above {whose}", above, "relative", remark=f"{own:.4f} of |DW|")


def lego_rows(s: Setting, judged: bool, drift: float) -> list[Row]:
    """LoRA-LEGO, all of it, against one fit of scikit-learn's k-means on the same units, and how well each clusters."""
    cohort, current = list(updates(s.clients, s.size, s.rank, drift)), adapter(s.size, s.rank)
    factors, weights = [u.factors[LAYER] for u in cohort], client_weights(cohort)
    units = pool(factors, weights)
    points, mass = units.m.to(torch.float32).numpy(), units.weights.numpy()
    strategy = METHODS["lora-lego"]()
    turns = iter(range(s.turns + 1))  # another start at each turn
    fits: list[KMeans] = []

    def scikit() -> None:
        fits.append(KMeans(n_clusters=s.rank, n_init=1, random_state=next(turns)).fit(points, sample_weight=mass))

    own, theirs = race(s.turns, partial(strategy.aggregate, cohort, current), scikit)
    sent = strategy.aggregate(cohort, current).factors[LAYER]
    target = Target(cohort)
    errors = []
    for fit in fits:
        labels = torch.from_numpy(fit.labels_).to(torch.int64)
        A, B = merge(units, labels, torch.ones(len(labels)), torch.zeros(s.rank, s.size), "least-squares")
        errors.append(target.error(LoraFactors(A, B, 1.0)))
    kind = "clients alike" if drift < math.inf else "clients that share nothing"
    return [
        at_most(
            f"lora-lego, {kind}: time, of k-means'; {s}",
            own / theirs,
            1 if judged else None,
            f"{own:.3f} s, {theirs:.3f} s",
        ),
        Row(
            f"lora-lego, {kind}: |DW - sent|",
            target.error(sent),
            "of |DW|",
            remark=f"with k-means' clusters {min(errors):.5f} to {max(errors):.5f}",
        ),
    ]


def memory_rows(s: Setting, quick: bool) -> list[Row]:
    """Memory beyond the uploads, of those that need the cohort; and of a mean, over a growing cohort."""
    uploads = 2 * 4 * s.clients * s.size * s.rank
    rows = []
    for name in SINGLE_FACTORS:
        extra = peak_apart(name, s, False, quick)
        what = f"{name}, extra memory, of the uploads; {s}"
        rows.append(at_most(what, extra / uploads, 2, f"{extra / 1e6:.0f} MB, {uploads / 1e6:.0f} MB"))
    few = Setting(max(2, s.clients // 10), s.size, s.rank, 1)
    less, more = (peak_apart("fedit", each, True, quick) for each in (few, s))
    what = f"fedit, streamed: memory at {s.clients} clients, of that at {few.clients}"
    return [*rows, at_most(what, more / max(less, 1), 1.25, f"{more / 1e6:.1f} MB, {less / 1e6:.1f} MB")]


def slope_rows(size: int, clients: Sequence[int], ranks: Sequence[int], turns: int) -> Iterator[Row]:
    """How time grows with clients at the middle rank, and with the rank at the second number of clients."""
    over = {
        "clients": [(k, Setting(k, size, ranks[len(ranks) // 2], turns)) for k in clients],
        "rank": [(r, Setting(clients[1], size, r, turns)) for r in ranks],
    }
    for axis, settings in over.items():
        xs, times = [x for x, _ in settings], []
        for _, s in settings:
            cohort, current = list(updates(s.clients, s.size, s.rank)), adapter(s.size, s.rank)
            times.append(race(turns, *(partial(build().aggregate, cohort, current) for build in METHODS.values())))
        for name, column in zip(METHODS, zip(*times, strict=True), strict=True):
            remark = " ".join(f"{1e3 * t:.1f}" for t in column) + f" ms at {', '.join(map(str, xs))}; size {size}"
            yield Row(f"{name}, log-log slope of time over {axis}", slope(xs, column), "", remark=remark)


def run(main: Setting, quick: bool) -> Iterator[Row]:
    """Measure everything; the dense SVD of the whole size takes most of the time."""
    small = Setting(main.clients, main.size // 4, main.rank, main.turns)
    for s in (small, main):
        yield from fair_rows(s, s is main)
        yield from flex_rows(s, s is main)
        yield from lego_rows(s, s is main, 0.3)
        yield from lego_rows(s, s is main, math.inf)
    yield from memory_rows(main, quick)
    clients, ranks = ((2, 4), (2, 4)) if quick else ((10, 20, 50, 100), (4, 8, 16, 32))
    yield from slope_rows(small.size, clients, ranks, main.turns)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--size", type=int, default=4096, help="both sides of the layer")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--turns", type=int, default=5, help="how often each contender runs")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, whose figures mean nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    parser.add_argument("--peak", nargs=5, metavar="WORD", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.peak:
        method, *sizes = given.peak
        clients, size, rank, streamed = map(int, sizes)
        print(peak(method, clients, size, rank, bool(streamed)))
        return
    setting = Setting(6, 64, 4, 1) if given.quick else Setting(given.clients, given.size, given.rank, given.turns)
    machine = f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}, float32 uploads"
    table = Table(
        "Figure", "Measured", "Target", "", "Seconds and such", title=f"One layer, {setting}", caption=machine
    )
    rows = []
    for row in run(setting, given.quick):
        rows.append(row)
        print(f"{row.what}: {row.value:.3g} {row.unit}", file=sys.stderr, flush=True)  # the table takes minutes
        verdict = {True: "pass", False: "falls short", None: ""}[row.passed]
        table.add_row(row.what, f"{row.value:.3g} {row.unit}".strip(), row.target, verdict, row.remark)
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    if given.json:
        meant = {"machine": machine, "setting": asdict(setting), "rows": [asdict(row) for row in rows]}
        given.json.write_text(json.dumps(meant, indent=2) + "\n")


if __name__ == "__main__":
    if "OMP_WAIT_POLICY" not in os.environ:  # it is read where torch is imported
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"OMP_WAIT_POLICY": "PASSIVE"})
    main()

"""The methods on adapters that lie on disk: what a server does to a cohort's updates, once, without any federation.

Adapters take the place of clients' updates, their weights that of row counts: w_k are made whole numbers by multiplying
all with one, exactly, which changes no p_k = w_k / sum w. There is no adapter that all started from. Methods find in
its place one with the A of the first adapter, cut or filled up with drawn rows to the rank wanted, and B = 0.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedpeft.adapters.export import SavedAdapter, read_adapter, write_adapter, write_labels
from fedpeft.adapters.state import A_SUFFIX, AdapterState, ClientUpdate, LoraFactors
from fedpeft.errors import AdapterError, ConfigError
from fedpeft.runs import check_vacant
from fedpeft.runs.files import whole_folder
from fedpeft.seeds import generator
from fedpeft.strategies.algebra.base_changes import exact_sum
from fedpeft.strategies.algebra.factors import aggregation_error
from fedpeft.strategies.algebra.spectra import decompose, truncate
from fedpeft.strategies.base import AdapterStrategy
from fedpeft.strategies.capabilities import Merging
from fedpeft.strategies.merging.alike import check_alike, check_base
from fedpeft.strategies.registry import available, find
from fedpeft.strategies.rounds.terms import RunTerms

EXACT = 1e-6  # relative; what is beyond is a method's error, not the rounding of those that compute in float32
MOST = 2**62  # sum of the weights as whole numbers
EXPONENT = re.compile(r"[eE][+-]?0*[1-9]\d{2,}")  # of a number that only fills the memory


@dataclass(frozen=True)
class Merged:
    """A merged adapter, and what it was made of.

    Parameters
    ----------
    method : str
        Its name.
    options : mapping
        All of its options.
    inputs : list of dict
        Path, ranks, scalings and weight of each adapter.
    state : AdapterState
        The result, in the inputs' type.
    ranks : list of int
        The result's, the smallest first.
    error : float
        ``|DW - merged| / |DW|`` of what is written.
    exact : bool
        Whether nothing but rounding to the type is wrong with it.
    dtype : str
        The types that tensors are written in.
    note : str
        How the result was made to fit, if it had to be.
    base : str
        How the base that was given compares with those that the adapters name.
    out : Path or None
        Where it was written.
    """

    method: str
    options: Mapping[str, Any]
    inputs: list[dict[str, Any]]
    state: AdapterState
    ranks: list[int]
    error: float
    exact: bool
    dtype: str
    note: str = ""
    base: str = ""
    out: Path | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return all but the tensors, for JSON."""
        facts = {name: getattr(self, name) for name in ("method", "options", "inputs", "ranks", "error", "exact")}
        facts |= {"dtype": self.dtype, "note": self.note, "base": self.base or None}
        return facts | {"out": None if self.out is None else str(self.out)}


def merge_directories(
    method: str,
    directories: Sequence[Path],
    out: Path,
    *,
    weights: Sequence[str] | None = None,
    rank: int | None = None,
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
    base: str | None = None,
) -> Merged:
    """Merge adapters on disk into one that ``PeftModel.from_pretrained`` loads.

    Parameters
    ----------
    method : str
        Name of a strategy.
    directories : sequence of Path
        PEFT's adapter folders; safetensors only.
    out : Path
        The folder to write; must hold nothing.
    weights : sequence of str, optional
        A positive number for each adapter, such as ``3``, ``0.25`` or ``1/3``; equal ones if not given.
    rank : int, optional
        Of the result; the largest of the inputs, layer by layer, or what the method makes of them if not given.
    options : mapping, optional
        The method's own.
    seed : int
        What is drawn follows from it.
    base : str, optional
        The base of all adapters, under whatever path each of them names it; compared by its weights where they are
        here, and named in what is written.

    Raises
    ------
    ConfigError
        A method or an option that cannot do this.
    AdapterError
        Folders that are no adapters, or adapters that differ in more than rank and scaling.
    """
    check_vacant(out)
    check_method(method)
    adapters = [read_adapter(directory) for directory in directories]
    config = check_alike(adapters, base)
    compared = check_base(adapters, base) if base is not None else ""
    merged = merge_adapters(method, adapters, weights, rank, options or {}, seed)
    labels = adapters[0].labels
    with whole_folder(out) as draft:
        write_adapter(draft, config, merged.state)
        if labels is not None and all(adapter.labels == labels for adapter in adapters):
            write_labels(draft, labels)
    return replace(merged, out=out, base=compared)


def check_method(name: str) -> None:
    """Raise ConfigError if there is no such method, or none for adapters on disk."""
    if why := find(name).capabilities.merging.refused:
        raise ConfigError(f"strategy '{name}' {why}; merge by one of these: {_names(lambda facts: not facts.refused)}.")


def _names(can: Callable[[Merging], bool]) -> str:
    """Return the names of the methods for adapters on disk of which something is so."""
    facts = {name: method.capabilities.merging for name, method in available().items()}
    return ", ".join(name for name, each in facts.items() if not each.refused and can(each))


def merge_adapters(
    method: str,
    adapters: Sequence[SavedAdapter],
    weights: Sequence[str] | None,
    rank: int | None,
    options: Mapping[str, Any],
    seed: int,
) -> Merged:
    """Merge adapters that are alike; see `merge_directories`."""
    rows = whole_weights(weights, len(adapters))
    updates = [
        ClientUpdate(str(adapter.path), count, adapter.state.factors, adapter.state.dense)
        for adapter, count in zip(adapters, rows, strict=True)
    ]
    check_ranks(method, updates, rank)
    facts = find(method).capabilities.merging
    shared = rank is None and facts.rank_option not in options and share_a(updates)
    if facts.shares_a and not shared:
        others = _names(lambda other: not other.shares_a)
        raise AdapterError(
            f"strategy '{method}' averages {facts.shares_a} over adapters that share A, and these do not; "
            f"take one of these: {others}."
        )
    strategy = build(method, options, seed, updates[0], shared)
    strategy.check_cohort(strategy.options, len(updates))
    current = starting_point(updates, rank, strategy.terms.scaling, seed)
    merged, note = strategy.aggregate(iter(updates), current, facts.as_round), ""
    if strategy.capabilities.changes_base:
        merged, note = as_one_adapter(merged, rank, current)
    dtypes = _dtypes(updates)
    written = _cast(merged, dtypes)
    for name, tensor in written.to_tensors().items():
        if not torch.isfinite(tensor).all():
            raise AdapterError(f"merged tensor {name} is too large for {tensor.dtype}; save the adapters as float32.")
    return Merged(
        method,
        strategy.options.model_dump(mode="json", exclude_none=True),
        [_facts(update, count / sum(rows)) for update, count in zip(updates, rows, strict=True)],
        written,
        sorted({f.rank for f in written.factors.values()}),
        aggregation_error(updates, written.factors),
        aggregation_error(updates, merged.factors) < EXACT,
        ", ".join(sorted({str(dtype).removeprefix("torch.") for dtype in dtypes.values()})),
        note,
    )


def build(method: str, options: Mapping[str, Any], seed: int, first: ClientUpdate, shared: bool) -> AdapterStrategy:
    """Make the strategy, with the most common scaling of the first adapter for the result."""
    scaling = Counter(f.scaling for f in first.factors.values()).most_common(1)[0][0]
    frozen = [layer + A_SUFFIX for layer in first.factors] if shared else []
    kind = find(method)
    parsed = kind.parse_options(options).model_dump(exclude_none=True)
    strategy = kind(terms=RunTerms(seed=seed, scaling=scaling, frozen=frozen), **parsed)
    if option := strategy.needs_start(strategy.options):
        raise ConfigError(
            f"strategy.{option} goes by how far clients moved from a common start, which adapters on disk do not tell; "
            "leave it out."
        )
    return strategy


def whole_weights(words: Sequence[str] | None, count: int) -> list[int]:
    """Return weights as the smallest whole numbers that stand in the same proportion."""
    if words is None:
        return [1] * count
    if len(words) != count:
        raise ConfigError(f"--weights gives {len(words)} numbers for {count} adapters; give one for each.")
    exact = []
    for word in words:
        try:
            weight = Fraction(word.strip()) if EXPONENT.search(word) is None else Fraction(0)
        except (ValueError, ZeroDivisionError):
            weight = Fraction(0)
        if weight <= 0:
            raise ConfigError(f"--weights: '{word}' is no positive number, such as 3, 0.25 or 1/3.")
        exact.append(weight)
    scale = math.lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * scale) for weight in exact]
    whole = [number // math.gcd(*whole) for number in whole]
    if sum(whole) > MOST:
        raise ConfigError(f"--weights {','.join(words)} need more than 18 digits to be held exactly; round them.")
    return whole


def check_ranks(method: str, updates: Sequence[ClientUpdate], rank: int | None) -> None:
    """Raise an error if the method cannot take these ranks, or not make that one of them."""
    shapes = [_per_layer(update, lambda f: f.rank) for update in updates]
    if not find(method).capabilities.mixed_ranks and any(ranks != shapes[0] for ranks in shapes):
        listed = ", ".join(f"'{u.client_id}' has {_range(u)}" for u in updates)
        able = [name for name, other in available().items() if other.capabilities.mixed_ranks]
        raise AdapterError(
            f"strategy '{method}' averages factors, which takes equal ranks in each layer: {listed}. "
            f"These take any: {', '.join(able)}."
        )
    if rank is None:
        return
    if rank < 1:
        raise ConfigError(f"--rank {rank} must be at least 1.")
    for layer, f in updates[0].factors.items():
        if rank > min(f.B.shape[0], f.A.shape[1]):
            smaller = min(f.B.shape[0], f.A.shape[1])
            raise AdapterError(f"--rank {rank} is larger than layer '{layer}', where {smaller} is the most.")
    facts = find(method).capabilities.merging
    if facts.rank_by:
        raise ConfigError(
            f"strategy '{method}' finds the ranks itself: give --option {facts.rank_by} instead of --rank."
        )
    largest = {max(ranks) for ranks in zip(*(each.values() for each in shapes), strict=True)}
    if not facts.any_rank and largest != {rank}:
        have = ", ".join(map(str, sorted(largest)))
        raise ConfigError(
            f"--rank {rank}: strategy '{method}' keeps the adapters' rank, {have}. "
            f"These can write any: {_names(lambda other: other.any_rank)}."
        )


def _per_layer(update: ClientUpdate, value: Callable[[LoraFactors], int]) -> dict[str, int]:
    return {layer: value(f) for layer, f in update.factors.items()}


def _range(update: ClientUpdate) -> str:
    return " and ".join(str(rank) for rank in sorted({f.rank for f in update.factors.values()}))


def share_a(updates: Sequence[ClientUpdate]) -> bool:
    """Tell whether all adapters have one A, as those of clients with a frozen A do."""
    first = updates[0].factors
    return all(torch.equal(f.A, first[layer].A) for update in updates for layer, f in update.factors.items())


def starting_point(updates: Sequence[ClientUpdate], rank: int | None, scaling: float, seed: int) -> AdapterState:
    """Make the adapter that methods merge into, in float64; see the module's description."""
    factors = {}
    for layer, f in updates[0].factors.items():
        wanted = rank or max(update.factors[layer].rank for update in updates)
        A = f.A.double()[:wanted]
        if len(A) < wanted:
            shape = (wanted - len(A), A.shape[1])
            rows = torch.from_numpy(generator(seed, "merge", layer).standard_normal(shape))
            size = float(A.norm(dim=1).mean()) or 1.0
            A = torch.cat([A, rows * (size / rows.norm(dim=1, keepdim=True))])
        factors[layer] = LoraFactors(A, torch.zeros(f.B.shape[0], wanted, dtype=torch.float64), scaling)
    return AdapterState(factors, {name: tensor.double() for name, tensor in updates[0].dense.items()})


def as_one_adapter(merged: AdapterState, rank: int | None, current: AdapterState) -> tuple[AdapterState, str]:
    """Turn an adapter and a change of the base into one adapter: their sum, or the nearest of a rank; and say which."""
    whole = exact_sum(merged)
    if rank is None:
        return whole, "the exact sum of the adapter and the change of the base, at the rank that it needs"
    factors = {
        layer: truncate(decompose([f], [1.0]), rank, current.factors[layer]) for layer, f in whole.factors.items()
    }
    return AdapterState(factors, whole.dense), f"the best of rank {rank} for the sum of adapter and change of the base"


def _dtypes(updates: Sequence[ClientUpdate]) -> dict[str, torch.dtype]:
    types: dict[str, torch.dtype] = {}
    for update in updates:
        for name, tensor in AdapterState(update.factors, update.dense).to_tensors().items():
            types[name] = torch.promote_types(types.get(name, tensor.dtype), tensor.dtype)
    return types


def _cast(state: AdapterState, dtypes: Mapping[str, torch.dtype]) -> AdapterState:
    def to(name: str, tensor: Tensor) -> Tensor:
        return tensor.to(dtypes[name]).contiguous()

    tensors = {name: to(name, tensor) for name, tensor in state.to_tensors().items()}
    plain = AdapterState.from_tensors(tensors, 1.0)
    factors = {layer: LoraFactors(f.A, f.B, state.factors[layer].scaling) for layer, f in plain.factors.items()}
    return AdapterState(factors, plain.dense)


def _facts(update: ClientUpdate, weight: float) -> dict[str, Any]:
    return {
        "path": update.client_id,
        "ranks": sorted({f.rank for f in update.factors.values()}),
        "scalings": sorted({f.scaling for f in update.factors.values()}),
        "weight": weight,
    }

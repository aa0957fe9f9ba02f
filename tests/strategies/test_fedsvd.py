"""FedSVD: the product stays, A becomes orthonormal, and its singular values stand in B."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedpeft.adapters.state import LoraFactors
from fedpeft.config import AdapterConfig
from fedpeft.errors import ConfigError
from fedpeft.strategies.fedsvd import FedSvd, refactor
from tests.strategies.oracles import (
    Cohort,
    assert_close,
    cohorts,
    ideal,
    make,
    make_cohort,
    per_layer,
    products,
    share_a,
)


@st.composite
def layers(draw: st.DrawFn) -> LoraFactors:
    rank = draw(st.integers(1, 4))
    d_in, d_out = draw(st.integers(rank, 9)), draw(st.integers(1, 9))  # d_out may be below the rank
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    A = torch.randn(rank, d_in, generator=generator, dtype=torch.float64)
    B = torch.randn(d_out, rank, generator=generator, dtype=torch.float64)
    B[:, draw(st.integers(0, rank)) :] = 0  # of any rank, zero included
    return LoraFactors(A, B, 2.0)


@settings(max_examples=60, deadline=None)
@given(layers())
def test_the_product_stays_and_the_rows_of_a_are_orthonormal(f: LoraFactors) -> None:
    new = refactor(f)
    assert_close({"": new.product()}, {"": f.product()})
    assert_close({"": new.A @ new.A.T}, {"": torch.eye(f.rank, dtype=torch.float64)})
    singular_values = torch.linalg.svdvals(f.B @ f.A)
    lengths = new.B.norm(dim=0)  # S itself, not its root
    assert_close({"": lengths[: len(singular_values)]}, {"": singular_values[: f.rank]})
    gram = new.B.T @ new.B
    assert_close({"": gram}, {"": torch.diag(gram.diagonal())})


@settings(max_examples=40, deadline=None)
@given(cohorts(mixed=False))
def test_the_global_product_is_the_mean_of_products(cohort: Cohort) -> None:
    assume(all(f.rank <= f.A.shape[1] for f in cohort.current.factors.values()))  # else no adapter can be made
    cohort = share_a(cohort)
    merged = make(FedSvd).aggregate(iter(cohort.updates), cohort.current)
    assert_close(products(merged), ideal(cohort.updates))
    backwards = make(FedSvd).aggregate(iter(cohort.updates[::-1]), cohort.current)
    assert_close(products(backwards), products(merged))


def projection(A: torch.Tensor) -> torch.Tensor:
    Q = torch.linalg.qr(A.double().T).Q
    return Q @ Q.T


def test_the_row_space_of_a_stays_that_of_the_first_a_however_many_rounds() -> None:
    first = share_a(make_cohort(ranks=(3, 3, 3), d_in=7, d_out=11))
    state = first.current
    one = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    for number in range(4):
        drawn = make_cohort(number, ranks=(3, 3, 3), d_in=7, d_out=11)
        cohort = share_a(Cohort(drawn.updates, state))
        if number == 1:  # a round that learns in one direction only: the rest is completed
            cohort = Cohort([per_layer(u, lambda f: replace(f, B=f.B * one)) for u in cohort.updates], state)
        state = make(FedSvd).aggregate(iter(cohort.updates), state)
        for layer, f in state.factors.items():
            assert_close({"": f.A @ f.A.T}, {"": torch.eye(3, dtype=torch.float64)})  # what the SVD buys
            assert_close({"": projection(f.A)}, {"": projection(first.current.factors[layer].A)})


def test_a_frozen_a_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"fedsvd.*ffa-lora"):
        FedSvd.check(FedSvd.parse_options({}), AdapterConfig(kind="ffa-lora"))

"""PVeRA: VeRA whose inner vector is drawn while training (L. Fillioux et al., arXiv 2512.07703).

``diag(b) B z`` with z of a normal distribution, whose mean and log-variance are ``diag(d) A x``; with z its mean when
scoring, and when merged. What is drawn depends on the client's seed of the round, as dropout does.
"""

from __future__ import annotations

from fedpeft.adapters.kinds.kind import Kind

PVERA = Kind(
    name="pvera",
    config="PveraConfig",
    update="neither",
    parts=("pvera_",),
    dropout="pvera_dropout",
    seed="projection_prng_key",
    settings={"save_projection": True, "sample_at_inference": False, "generator_seed": None},
    quantised=True,
)

"""AdaMSS: clusters of W's principal directions, each with a low-rank update of its own (PEFT's ``AdamssConfig``).

The r greatest directions of W (``adapter.rank``) are clustered into ``num_subspaces`` groups of rows; in each, B A of
rank ``subspace_rank`` is trained on the directions. Which rows are in which group follows from the base and the run's
seed. The choice of groups while training (``use_asa``) is left out: it is a callback of a trainer.
"""

from __future__ import annotations

from fedpeft.adapters.kinds.kind import Kind

ADAMSS = Kind(
    name="adamss",
    config="AdamssConfig",
    update="neither",
    parts=("adamss_",),
    conv1d=False,
    seed="random_seed",
    settings={"use_asa": False},
    reads_base=True,
)

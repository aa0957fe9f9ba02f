"""RandLoRA: a sum of scaled random products, of full rank (P. Albert et al., arXiv 2502.00987).

The random bases are saved with the adapter. PEFT runs the rows of A over (rank, basis) and the columns of B over
(basis, rank), so that its sum pairs them otherwise than the paper's does; all are drawn alike.
"""

from __future__ import annotations

from fedpeft.adapters.kinds.kind import Kind

RANDLORA = Kind(
    name="randlora",
    config="RandLoraConfig",
    update="neither",
    parts=("randlora_",),
    alpha="randlora_alpha",
    dropout="randlora_dropout",
    seed="projection_prng_key",
    settings={"save_projection": True},
    quantised=True,
)

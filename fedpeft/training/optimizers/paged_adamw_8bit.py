"""AdamW whose moments are in 8 bits and in memory that a GPU may page out: arXiv 2110.02861 and 2305.14314."""

from fedpeft.training.optimizers.quantised_states import adamw_of_bitsandbytes

PAGED_ADAMW_8BIT = adamw_of_bitsandbytes(
    "paged-adamw-8bit", "AdamW with paged moments in 8 bits (bitsandbytes)", "PagedAdamW8bit", bits=8
)

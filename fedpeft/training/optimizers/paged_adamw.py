"""AdamW whose moments a GPU may page out to main memory: T. Dettmers et al., NeurIPS 2023, arXiv 2305.14314."""

from fedpeft.training.optimizers.quantised_states import adamw_of_bitsandbytes

PAGED_ADAMW = adamw_of_bitsandbytes(
    "paged-adamw", "AdamW with moments in memory that a GPU pages out (bitsandbytes)", "PagedAdamW32bit", bits=32
)

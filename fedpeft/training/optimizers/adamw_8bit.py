"""AdamW whose moments are kept in 8 bits: T. Dettmers et al., ICLR 2022, arXiv 2110.02861."""

from fedpeft.training.optimizers.quantised_states import adamw_of_bitsandbytes

ADAMW_8BIT = adamw_of_bitsandbytes(
    "adamw-8bit", "AdamW with moments in 8 bits, in blocks of 256 (bitsandbytes)", "AdamW8bit", bits=8
)

"""A few trained coefficients of the update's transform, at random places; linear in what is trained.

* ``fourierft``: dW = scaling Re(ifft2(S)) (Z. Gao et al., arXiv 2405.03003). It begins at random values, as in the
  paper, and so does the model; ``adapter.init_weights=true`` begins at zero.
* ``waveft``: dW = scaling idwt2(S), of a wavelet (A. Bilican et al., arXiv 2505.12532), which begins at zero.

``adapter.n_frequency`` entries of S are trained in each layer and ``adapter.scaling`` is a number of its own: there is
neither rank nor alpha. PEFT draws the places from one seed for all layers, here the run's in place of 777: layers of
one shape share them. It does not save them, but draws them again from the saved seed.
"""

from __future__ import annotations

from fedpeft.adapters.kinds.blocks import at_most_all_entries
from fedpeft.adapters.kinds.kind import Kind

FOURIERFT = Kind(
    name="fourierft",
    config="FourierFTConfig",
    update="linear",
    parts=("fourierft_",),
    rank=(),
    seed="random_loc_seed",
    misfit=at_most_all_entries,
    quantised=True,
)
WAVEFT = Kind(
    name="waveft",
    config="WaveFTConfig",
    update="linear",
    parts=("waveft_",),
    rank=(),
    seed="random_loc_seed",
    misfit=at_most_all_entries,
    quantised=True,
)

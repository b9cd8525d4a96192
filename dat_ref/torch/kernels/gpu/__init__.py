"""Triton kernels for CUDA devices, see `dat_ref.torch.kernels`.

================  ===============================================================
`deformable`      deformable attention, forward and backward
`neighborhood`    neighborhood attention, forward and backward
`lookup`          bias table as cells of polynomial coefficients, and its lookup
`table_gradient`  gradient of the bias table
`tile_config`     tile sizes and autotuning
`common`          input checks, loads and stores of rows, online softmax
================  ===============================================================
"""

from .deformable import deformable_backward, deformable_forward
from .neighborhood import neighborhood_backward, neighborhood_forward

__all__ = ["deformable_backward", "deformable_forward", "neighborhood_backward", "neighborhood_forward"]

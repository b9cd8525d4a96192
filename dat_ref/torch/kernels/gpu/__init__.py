"""The Triton kernels, for CUDA devices; see `dat_ref.torch.kernels`.

`common` has what all of them share, `lookup` how the bias table is read, `table_gradient` how it gets its gradient;
`deformable` and `neighborhood` are the two attentions.
"""

from .deformable import deformable_backward, deformable_forward
from .neighborhood import neighborhood_backward, neighborhood_forward

__all__ = ["deformable_backward", "deformable_forward", "neighborhood_backward", "neighborhood_forward"]

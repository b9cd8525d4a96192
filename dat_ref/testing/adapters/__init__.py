"""Adapters of other packages for the kit: ``dat-ref check dat_ref.testing.adapters.<name>``.

=================================================  ==================================================================
`dat_ref.testing.adapters.torch`                   sampler: ``torch.nn.functional.grid_sample``
`dat_ref.testing.adapters.torchvision`             deform_conv: ``torchvision.ops.deform_conv2d``
`dat_ref.testing.adapters.transformers`            multi_scale: the function of Deformable DETR and related models
`dat_ref.testing.adapters.onnx`                    sampler and deform_conv: ONNX's reference implementation
`dat_ref.testing.adapters.deformable_attention`    sampler and reference_grid: the package of that name on PyPI
=================================================  ==================================================================

dat_ref does not install these packages. Each adapter is a short file that translates between the names and layouts of
the package and those of the protocol. You can use it as an example for your own adapter.
"""

from __future__ import annotations

import importlib
from typing import Any

from ..._checks import ConfigError


class MissingPackageError(ConfigError, ImportError):
    """The package of an adapter is not installed."""


def require(module: str, package: str = "") -> Any:
    """Import a module of another package.

    Args:
        module: full name of the module.
        package: name of the package on PyPI, if different.

    Raises:
        MissingPackageError: if it is not installed; the message has the command to install it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        requirement = package or module.partition(".")[0]
        raise MissingPackageError(f"{module} is needed for this adapter: pip install {requirement}") from error

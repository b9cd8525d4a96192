"""Other people's implementations, as the kit takes them: ``dat-ref check dat_ref.testing.adapters.<name>``.

=================================================  ==================================================================
`dat_ref.testing.adapters.torch`                   sampler: ``torch.nn.functional.grid_sample``
`dat_ref.testing.adapters.torchvision`             deform_conv: ``torchvision.ops.deform_conv2d``
`dat_ref.testing.adapters.transformers`            multi_scale: the function of Deformable DETR and its relatives
`dat_ref.testing.adapters.onnx`                    sampler and deform_conv: ONNX's own definition of both operators
`dat_ref.testing.adapters.deformable_attention`    sampler and reference_grid: the package of that name on PyPI
=================================================  ==================================================================

None of these packages comes along with dat_ref. Each adapter is a page: what the package calls things, and what the
protocol calls them. They are examples for adapters of your own.
"""

from __future__ import annotations

import importlib
from typing import Any

from ..._checks import ConfigError


class MissingPackageError(ConfigError, ImportError):
    """A package that an adapter is for is not installed."""


def require(module: str, package: str = "") -> Any:
    """Import a module of another package.

    Args:
        module: its full name.
        package: what to install, if that is called something else.

    Raises:
        MissingPackageError: with the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        requirement = package or module.partition(".")[0]
        raise MissingPackageError(f"{module} is needed for this adapter: pip install {requirement}") from error

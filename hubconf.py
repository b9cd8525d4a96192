"""Models for ``torch.hub.load``, one function for each name of `dat_ref.torch.list_models`.

From a clone: ``torch.hub.load("path/of/the/clone", "dat_tiny", source="local", checkpoint="dat_tiny_in1k_224.pth")``.
"""

from functools import partial, update_wrapper

import dat_ref.data
from dat_ref.torch import create_model as _create_model
from dat_ref.torch import list_models as _list_models

dependencies = ["torch", "numpy", "scipy", "safetensors"]


def _entrypoint(name, pretrained=False, **options):
    """Build a backbone; the options are those of `dat_ref.torch.create_model`.

    Args:
        pretrained: whether to load the weights that ship, which only ``dat_spot`` has. For released weights pass the
            downloaded file as `checkpoint`.
    """
    if pretrained:
        if name != "dat_spot":
            raise ValueError(f"pretrained: {name} has no weights that ship; pass the downloaded file as checkpoint=")
        options = {"checkpoint": dat_ref.data.network_path(), "num_classes": 9, **options}
    return _create_model(name, **options)


for _name in _list_models():
    globals()[_name] = update_wrapper(partial(_entrypoint, _name), _entrypoint)

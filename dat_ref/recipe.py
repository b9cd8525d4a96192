"""Deprecated: this module is now `dat_ref.train_config`, and `Recipe` is `TrainConfig`."""

from ._deprecation import deprecated_names

_MOVED = ("AMP_DTYPES", "LAPTOP", "NON_SEMANTIC_FIELDS", "PRESETS", "RELEASED", "TrainConfig", "preset")
_RENAMED = {"AMP": "AMP_DTYPES", "FREE": "NON_SEMANTIC_FIELDS", "Recipe": "TrainConfig"}

__getattr__ = deprecated_names(
    __name__,
    {old: f"dat_ref.train_config:{new}" for old, new in {**{name: name for name in _MOVED}, **_RENAMED}.items()},
)

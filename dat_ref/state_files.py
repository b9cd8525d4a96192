"""State dicts on disk: names and arrays, read from and written to ``.pth``, ``.safetensors`` and ``.npz``.

A checkpoint is read, never run. ``.pth`` files are pickles, which can call any function of Python; they go
through torch's restricted reader, which makes tensors and plain containers and refuses everything else. Training
scripts keep their settings beside the weights (the released one a ``yacs`` node, others a namespace or a NumPy
number): the classes of those are replaced by empty stand-ins and what they hold is dropped.
"""

from __future__ import annotations

import os
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ._checks import Array, CheckpointError

TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".tar")
SUFFIXES = (".safetensors", ".npz", *TORCH_SUFFIXES)

# What trainers call the weights inside a checkpoint, first choice first; averaged weights come before raw ones.
WRAPPERS = ("state_dict_ema", "model_ema", "ema_state_dict", "state_dict", "model_state_dict", "model_state", "model")

# What wraps a backbone (parallel training, a detector, a trainer, a compiler) puts its own name before every key.
_BACKBONE_KEY = re.compile(r"((?:(?:module|backbone|model|_orig_mod)\.)*)(?:patch_proj|patch_embedding|stages)\.")


# ------------------------------------------------------------------------------------------------ reading


def read_state(path: str | os.PathLike[str]) -> dict[str, Array]:
    """Return the backbone's arrays in a checkpoint by name, without the wrapping.

    Weights are looked for under the names of `WRAPPERS`; prefixes such as ``module.`` and ``backbone.`` are taken
    off, and what has no such prefix in a file where the backbone has one (a detector's neck and head) is left
    out. bfloat16 arrays, which NumPy does not have, come as float32 of the same values.

    Args:
        path: a ``.safetensors`` file (needs safetensors), ``.npz``, or a file of `TORCH_SUFFIXES` (needs torch).

    Raises:
        CheckpointError: if the file is not what its suffix says, is damaged, or would have to be executed.
    """
    return select_backbone(read_arrays(path), os.fspath(path))[0]


def read_arrays(path: str | os.PathLike[str]) -> dict[str, Array]:
    """Return every array of a checkpoint by its name in the file, the wrapping around the whole taken off."""
    file = Path(path)
    _check_content(file)
    try:
        if file.suffix == ".npz":
            arrays = _read_npz(file)
        elif file.suffix == ".safetensors":
            arrays = _read_safetensors(file)
        else:
            arrays = _read_torch(file)
    except (CheckpointError, MemoryError, OSError):
        raise
    except Exception as error:  # a damaged file fails in any way that its format's reader can fail
        raise CheckpointError(
            f"{file}: cannot be read as {file.suffix}: damaged, cut short, or another format; download it again"
            f" ({type(error).__name__}: {_first_line(error)})"
        ) from error
    if not arrays:
        raise CheckpointError(f"{file}: expected named arrays, found none")
    return arrays


def select_backbone(state: Mapping[str, Array], source: str = "state") -> tuple[dict[str, Array], tuple[str, ...]]:
    """Return the backbone's arrays without prefix, and the names of the others (none where there is no prefix).

    Raises:
        CheckpointError: if there is more than one backbone.

    >>> select_backbone({"backbone.stages.0.x": 1, "neck.y": 2})
    ({'stages.0.x': 1}, ('neck.y',))
    """
    prefixes = sorted({match[1] for name in state if (match := _BACKBONE_KEY.match(name))})
    if len(prefixes) > 1:
        found = ", ".join(repr(prefix) for prefix in prefixes)
        raise CheckpointError(f"{source}: expected one backbone, found {len(prefixes)}, under the prefixes {found}")
    prefix = prefixes[0] if prefixes else ""
    backbone = {name[len(prefix) :]: array for name, array in state.items() if name.startswith(prefix)}
    return backbone, tuple(name for name in state if not name.startswith(prefix))


def _check_content(file: Path) -> None:
    """Raise if the suffix is unknown, or the file's first bytes show that it holds no checkpoint of any kind."""
    if file.suffix not in SUFFIXES:
        raise CheckpointError(f"{file}: expected a file name that ends in one of {', '.join(SUFFIXES)}")
    if file.is_dir():
        raise CheckpointError(f"{file}: expected a file, got a folder")
    with file.open("rb") as opened:
        head = opened.read(256)
    if not head:
        raise CheckpointError(f"{file}: is empty; the download has failed, download it again")
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise CheckpointError(f"{file}: is a web page, not weights; open the link in a browser and download the file")
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{file}: is a Git LFS pointer, not weights; fetch the file itself with `git lfs pull`")


def _read_npz(file: Path) -> dict[str, Array]:
    with file.open("rb") as opened, np.load(opened, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def _read_safetensors(file: Path) -> dict[str, Array]:
    try:
        import safetensors
    except ImportError as error:
        raise CheckpointError(f"{file}: safetensors is needed to read it: pip install safetensors") from error
    deserialize: Any = safetensors.deserialize
    return {name: _from_bytes(name, **tensor) for name, tensor in deserialize(file.read_bytes())}


def _from_bytes(name: str, dtype: str, shape: list[int], data: bytes) -> Array:
    """Return an array from the bytes that safetensors keeps, little-endian and row by row."""
    if dtype == "BF16":  # the upper half of a float32
        bits = np.frombuffer(data, "<u2").astype(np.uint32) << 16
        return bits.view(np.float32).reshape(shape)
    kinds = {"F": "<f", "I": "<i", "U": "<u"}
    if dtype == "BOOL":
        return np.frombuffer(data, np.bool_).reshape(shape).copy()
    if dtype[0] not in kinds or not dtype[1:].isdigit():
        raise CheckpointError(f"{name}: expected numbers that NumPy knows, or BF16, got {dtype}")
    return np.frombuffer(data, f"{kinds[dtype[0]]}{int(dtype[1:]) // 8}").reshape(shape).copy()


# ------------------------------------------------------------------------------------------------ torch's files


class _Placeholder:
    """Stands in for a class or function that a checkpoint names beside its weights: takes anything, keeps nothing."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


class _PlaceholderMapping:
    """The same for mappings: the reader fills in items only where it finds an ``OrderedDict``."""

    def __new__(cls, *_: Any) -> Any:
        return OrderedDict()


_PLACEHOLDERS: list[Any] = [
    (_PlaceholderMapping, "yacs.config.CfgNode"),
    (_PlaceholderMapping, "argparse.Namespace"),
    (_Placeholder, "numpy.dtype"),
    (_Placeholder, "numpy.core.multiarray.scalar"),
    (_Placeholder, "numpy._core.multiarray.scalar"),
]


def _read_torch(file: Path) -> dict[str, Array]:
    try:
        import torch
    except ImportError as error:
        raise CheckpointError(f"{file}: torch is needed to read it: pip install 'dat-ref[torch]'") from error
    import pickle

    try:
        with torch.serialization.safe_globals(_PLACEHOLDERS):
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused is None:
            raise
        raise CheckpointError(
            f"{file}: refused: it asks for {refused[1]}, and loading that could run code. Expected tensors only; if "
            "you trust its maker, load it in a place that may be harmed and save its state dict by itself"
        ) from error
    tensors = {name: value for name, value in _unwrap(loaded, file).items() if isinstance(value, torch.Tensor)}
    return {name: _to_numpy(value) for name, value in tensors.items()}


def _unwrap(loaded: Any, file: Path) -> Mapping[str, Any]:
    """Return the innermost state dict; a wrapper without one, such as ``model_ema: None``, is passed over."""
    while isinstance(loaded, Mapping):
        inner = next((loaded[name] for name in WRAPPERS if isinstance(loaded.get(name), Mapping)), None)
        if inner is None:
            return loaded
        loaded = inner
    raise CheckpointError(f"{file}: expected a state dict (names and tensors), got {type(loaded).__name__}")


def _to_numpy(tensor: Any) -> Array:
    import torch

    tensor = tensor.detach()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


# ------------------------------------------------------------------------------------------------ writing


def save_state(path: str | os.PathLike[str], state: Mapping[str, Array]) -> None:
    """Write named arrays; the file is there whole or not at all, and one that was there stays until then.

    Args:
        path: its suffix decides: ``.safetensors``, ``.npz``, or ``.pth`` (``{"model": state}``, as released).

    Raises:
        CheckpointError: for another suffix, for arrays of objects, or if the package that writes it is missing.
    """
    file = Path(path)
    if file.suffix not in (".safetensors", ".npz", ".pth"):
        raise CheckpointError(f"{file}: expected a file name that ends in .safetensors, .npz or .pth")
    arrays = {name: np.ascontiguousarray(array).reshape(np.shape(array)) for name, array in state.items()}
    objects = [name for name, array in arrays.items() if array.dtype.hasobject]
    if objects:
        raise CheckpointError(f"state: expected arrays of numbers, got objects in {', '.join(objects)}")
    with atomic_write(file) as partial:
        if file.suffix == ".npz":
            with partial.open("wb") as opened:
                np.savez(opened, **dict[str, Any](arrays))
        elif file.suffix == ".safetensors":
            _write_safetensors(partial, arrays)
        else:
            _write_torch(partial, arrays)


@contextmanager
def atomic_write(file: Path) -> Iterator[Path]:
    """Yield a name beside `file` to write to; at the end it takes the place of `file`, or goes if writing failed."""
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def _write_safetensors(file: Path, arrays: dict[str, Array]) -> None:
    try:
        from safetensors.numpy import save_file
    except ImportError as error:
        raise CheckpointError("safetensors is needed to write .safetensors: pip install safetensors") from error
    save_file(arrays, file, metadata={"format": "pt"})  # the layout is the same; some loaders insist on the word


def _write_torch(file: Path, arrays: dict[str, Array]) -> None:
    try:
        import torch
    except ImportError as error:
        raise CheckpointError("torch is needed to write .pth: pip install 'dat-ref[torch]'") from error
    # A copy, since torch warns of arrays that cannot be written to.
    torch.save({"model": {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}}, file)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:160]

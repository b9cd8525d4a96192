"""State dicts on disk: named arrays in ``.pth``, ``.safetensors`` and ``.npz`` files.

Code in a checkpoint is never executed. ``.pth`` files are pickles, which can call any Python function. torch's
restricted unpickler reads them: it builds tensors and plain containers and refuses everything else. Training scripts
also store their settings (the released one a ``yacs`` node, others a namespace or a NumPy scalar). Empty placeholders
replace these classes, and their content is dropped.

``.pth`` (as a zip archive) and ``.npz`` store a checksum for each array, and a file whose content does not match its
checksums is refused. ``.safetensors`` files and ``.pth`` files written by torch before 1.6 have no checksums.
"""

from __future__ import annotations

import errno
import io
import json
import os
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ._checks import Array, CheckpointError

TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".tar")
SUFFIXES = (".safetensors", ".npz", *TORCH_SUFFIXES)

WRITABLE_SUFFIXES = (".safetensors", ".npz", ".pth")

# Names of the weights inside a training checkpoint, in order of preference: averaged weights come before raw ones.
WRAPPERS = ("state_dict_ema", "model_ema", "ema_state_dict", "state_dict", "model_state_dict", "model_state", "model")

RUN_MAGIC = b"dat_ref run 1\n"  # first bytes of the training state of a run, see `dat_ref.torch.train.checkpoint`
_MAX_HEADER_BYTES = 100_000_000  # limit of the safetensors format

# Modules that contain a backbone (a detector, a trainer, a compiler) add a prefix to its names. The first layer marks
# the backbone. Stages do so only in a file without a first layer, because other networks have stages, too.
_MARKERS = tuple(re.compile(rf"((?:.*?\.)?){layer}\.") for layer in (r"(?:patch_proj|patch_embedding)\.\d+", "stages"))


# ------------------------------------------------------------------------------------------------ reading


def read_state(path: str | os.PathLike[str], prefix: str | None = None) -> dict[str, Array]:
    """Return the backbone's arrays in a checkpoint by name, without wrappers and prefixes.

    The weights are searched under the names in `WRAPPERS`. The prefix of the backbone, such as ``module.`` or
    ``student.backbone.``, is removed, and arrays without it (a detector's neck and head) are left out. bfloat16 arrays,
    which NumPy does not have, become float32 arrays of the same values.

    Args:
        path: ``.safetensors`` file (needs safetensors), ``.npz`` file, or a file with one of `TORCH_SUFFIXES` (needs
            torch).
        prefix: prefix of the backbone, see `backbone_prefix`.

    Raises:
        CheckpointError: if the content does not match the suffix, is damaged, or would have to be executed; or if the
            file has several backbones, or none under `prefix`.
        OSError: if the file cannot be opened or read.
    """
    return select_backbone(read_arrays(path), os.fspath(path), prefix)[0]


def read_arrays(path: str | os.PathLike[str]) -> dict[str, Array]:
    """Return every array of a checkpoint by its name in the file. Only the wrapper of the whole state is removed."""
    file = Path(path)
    _check_content(file)
    try:
        if file.suffix == ".npz":
            arrays = _read_npz(file)
        elif file.suffix == ".safetensors":
            arrays = _read_safetensors(file)
        else:
            arrays = _read_torch(file)
    except CheckpointError:
        raise
    except MemoryError as error:  # also raised for a damaged header that declares a huge array
        raise MemoryError(f"{file}: needs more memory than is available: {_first_line(error)}") from error
    except OSError as error:
        if error.errno == errno.EINVAL:  # torch seeks before the start of a file that is cut short
            raise _damaged(file, error) from error
        if error.errno is not None and error.filename is None:
            raise OSError(error.errno, error.strerror, str(file)) from error
        raise
    except Exception as error:  # a damaged file can raise any exception in the reader of its format
        raise _damaged(file, error) from error
    if not arrays:
        raise CheckpointError(f"{file}: expected named arrays, found none")
    return arrays


def _damaged(file: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{file}: cannot be read as {file.suffix}: damaged, cut short, or another format; download it again"
        f" ({type(error).__name__}: {_first_line(error)})"
    )


def backbone_prefix(state: Mapping[str, Array], source: str = "state", prefix: str | None = None) -> str:
    """Return the prefix of the backbone's names in a state dict: empty, or with a dot at the end.

    Args:
        state: named arrays.
        source: name of the state dict for error messages.
        prefix: expected prefix, with or without its last dot; None: the only one.

    Raises:
        CheckpointError: if there are several backbones and no prefix is given, or none has the given prefix.

    >>> backbone_prefix({"student.backbone.stages.0.x": 1, "student.head.y": 2})
    'student.backbone.'
    """
    found = _prefixes(state)
    listed = ", ".join(repr(each) for each in found) or "none"
    if prefix is None:
        if len(found) > 1:
            raise CheckpointError(
                f"{source}: expected one backbone, found {len(found)}, under the prefixes {listed}; select one with "
                "the option prefix"
            )
        return found[0] if found else ""
    dotted = prefix if not prefix or prefix.endswith(".") else f"{prefix}."
    if dotted not in found:
        raise CheckpointError(f"{source}: prefix: expected the prefix of a backbone ({listed}), got {prefix!r}")
    return dotted


def _prefixes(state: Mapping[str, Array]) -> list[str]:
    """Return the prefixes of all backbones."""
    for marker in _MARKERS:
        found = sorted({match[1] for name in state if (match := marker.match(name))})
        if found:
            return found
    return []


def select_backbone(
    state: Mapping[str, Array], source: str = "state", prefix: str | None = None
) -> tuple[dict[str, Array], tuple[str, ...]]:
    """Return the backbone's arrays without their prefix, and the names of the other arrays.

    If the only backbone has no prefix, there are no other arrays.

    Args:
        state, source, prefix: as in `backbone_prefix`.

    Raises:
        CheckpointError: as in `backbone_prefix`.

    >>> select_backbone({"backbone.stages.0.x": 1, "neck.y": 2})
    ({'stages.0.x': 1}, ('neck.y',))
    """
    prefix = backbone_prefix(state, source, prefix)
    # Names of another backbone can begin with the same prefix: `` and `ema.`, or `model.` and `model.teacher.`.
    inner = tuple(each for each in _prefixes(state) if each != prefix and each.startswith(prefix))
    own = {name: name.startswith(prefix) and not name.startswith(inner) for name in state}
    backbone = {name[len(prefix) :]: array for name, array in state.items() if own[name]}
    return backbone, tuple(name for name in state if not own[name])


def _check_content(file: Path) -> None:
    """Raise an error if the suffix is unknown or the first bytes show that the file is not a checkpoint."""
    if file.suffix not in SUFFIXES:
        raise CheckpointError(f"{file}: expected a file name that ends in one of {', '.join(SUFFIXES)}")
    if file.is_dir():
        raise CheckpointError(f"{file}: expected a file, got a folder")
    if file.exists() and not file.is_file():
        raise CheckpointError(f"{file}: expected a regular file, got a device or a pipe")
    with file.open("rb") as opened:
        head = opened.read(256)
    if not head:
        raise CheckpointError(f"{file}: is empty; the download has failed, download it again")
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise CheckpointError(f"{file}: is a web page, not weights; open the link in a browser and download the file")
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{file}: is a Git LFS pointer, not weights; fetch the file itself with `git lfs pull`")
    if head.startswith(RUN_MAGIC):
        raise CheckpointError(
            f"{file}: is the training state of a run; the weights are in best.safetensors in the same folder"
        )


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
    """Return an array from the bytes in a safetensors file (little-endian, row-major)."""
    if dtype == "BF16":  # the upper half of a float32
        bits = np.frombuffer(data, "<u2").astype(np.uint32) << 16
        return bits.view(np.float32).reshape(shape)
    kinds = {"F": "<f", "I": "<i", "U": "<u"}
    if dtype == "BOOL":
        return np.frombuffer(data, np.bool_).reshape(shape).copy()
    if dtype[0] not in kinds or not dtype[1:].isdigit():
        raise CheckpointError(f"{name}: expected a NumPy dtype or BF16, got {dtype}")
    return np.frombuffer(data, f"{kinds[dtype[0]]}{int(dtype[1:]) // 8}").reshape(shape).copy()


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Return the metadata in the header of a ``.safetensors`` file; empty if there are none.

    Raises:
        CheckpointError: if the header cannot be read.
        OSError: if the file cannot be opened or read.
    """
    file = Path(path)
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = opened.read(min(length, _MAX_HEADER_BYTES))
    try:
        metadata = json.loads(header).get("__metadata__", {})
        return {str(name): str(value) for name, value in metadata.items()}
    except (ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file}: cannot be read as .safetensors: its header is not a JSON object") from error


# ------------------------------------------------------------------------------------------------ torch's files


class _Placeholder:
    """Replacement for a class or function that a checkpoint names: accepts any arguments, stores nothing."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


class _PlaceholderMapping:
    """Replacement for a mapping. The unpickler sets items only on an ``OrderedDict``."""

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

    with file.open("rb") as opened:  # not by name: torch opens only UTF-8 names
        _check_checksums(opened)
        try:
            with torch.serialization.safe_globals(_PLACEHOLDERS):
                loaded = torch.load(opened, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            refused = re.search(r"GLOBAL (\S+)", str(error))
            if refused is None:
                raise
            raise CheckpointError(
                f"{file}: refused: it needs {refused[1]}, and loading that could run code. Expected tensors only; if "
                "you trust its author, load it in an isolated environment and save only its state dict"
            ) from error
    tensors = {name: value for name, value in _unwrap(loaded, file).items() if isinstance(value, torch.Tensor)}
    for name in tensors:
        if not isinstance(name, str):
            raise CheckpointError(f"{file}: expected parameter names (strings), got the {type(name).__name__} {name!r}")
    return {name: _to_numpy(value, f"{file}: {name}") for name, value in tensors.items()}


def _check_checksums(opened: BinaryIO) -> None:
    """Raise an error if an entry of a zip archive does not match its checksum; torch does not compare them.

    ``torch.serialization.set_crc32_options(False)`` writes zeros in place of all checksums. Such files pass.
    """
    if zipfile.is_zipfile(opened):
        with zipfile.ZipFile(opened) as archive:
            damaged = archive.testzip() if any(entry.CRC for entry in archive.infolist()) else None
        if damaged is not None:
            raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
    opened.seek(0)


def _unwrap(loaded: Any, file: Path) -> Mapping[Any, Any]:
    """Return the innermost state dict. A wrapper without a state dict, such as ``model_ema: None``, is skipped."""
    seen: set[int] = set()
    while isinstance(loaded, Mapping):
        if id(loaded) in seen:
            raise CheckpointError(
                f"{file}: expected a state dict (names and tensors), got a mapping that contains itself"
            )
        seen.add(id(loaded))
        inner = next((loaded[name] for name in WRAPPERS if isinstance(loaded.get(name), Mapping)), None)
        if inner is None:
            return loaded
        loaded = inner
    raise CheckpointError(f"{file}: expected a state dict (names and tensors), got {type(loaded).__name__}")


def _to_numpy(tensor: Any, name: str) -> Array:
    import torch

    tensor = tensor.detach()
    try:
        array: Array = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    except (TypeError, RuntimeError) as error:  # sparse, quantized, without data, or a dtype that NumPy lacks
        raise CheckpointError(
            f"{name}: expected a dense tensor with a NumPy dtype or bfloat16, got {tensor.layout}, {tensor.dtype} on "
            f"{tensor.device}"
        ) from error
    return array


# ------------------------------------------------------------------------------------------------ writing


def save_state(path: str | os.PathLike[str], state: Mapping[str, Array]) -> None:
    """Write named arrays to a file, atomically: an existing file stays until the new one is complete.

    Args:
        path: file name. The suffix selects the format: ``.safetensors``, ``.npz``, or ``.pth`` (``{"model": state}`` as
            in the releases).
        state: named numeric arrays.

    Raises:
        CheckpointError: for another suffix, for arrays of objects, or if the package for the format is missing.
        OSError: if the file cannot be written.
    """
    file = Path(path)
    check_writable_suffix(file)
    arrays = {name: np.ascontiguousarray(array).reshape(np.shape(array)) for name, array in state.items()}
    objects = [name for name, array in arrays.items() if array.dtype.hasobject]
    if objects:
        raise CheckpointError(f"state: expected numeric arrays, got objects in {', '.join(objects)}")
    with atomic_write(file) as partial, partial.open("wb") as opened:
        if file.suffix == ".npz":
            np.savez(opened, **dict[str, Any](arrays))
        elif file.suffix == ".safetensors":
            opened.write(_safetensors_bytes(arrays))
        else:
            opened.write(_torch_bytes(arrays))


def check_writable_suffix(file: Path) -> None:
    """Raise `CheckpointError` if `save_state` cannot write the file name's format."""
    if file.suffix not in WRITABLE_SUFFIXES:
        raise CheckpointError(f"{file}: expected a file name that ends in .safetensors, .npz or .pth")


@contextmanager
def atomic_write(file: Path, suffix: str = "") -> Iterator[Path]:
    """Yield a temporary name in the folder of `file`. At the end it replaces `file`; after an error it is removed.

    The temporary name ends in `suffix`, for writers that choose the format by it. An `OSError` about the temporary file
    (no such folder, disk full) is raised again with the name of `file`.
    """
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial{suffix}")
    try:
        try:
            yield partial
            partial.replace(file)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        if error.errno is None or error.filename not in (None, str(partial), partial):
            raise
        raise OSError(error.errno, error.strerror, str(file)) from error


# The writers below return bytes. When torch and safetensors write to a file themselves, they hide the error of a full
# disk in exceptions of their own.


def _safetensors_bytes(arrays: dict[str, Array]) -> bytes:
    try:
        from safetensors.numpy import save
    except ImportError as error:
        raise CheckpointError("safetensors is needed to write .safetensors: pip install safetensors") from error
    content: bytes = save(arrays, metadata={"format": "pt"})  # torch's loaders require this entry
    return content


def _torch_bytes(arrays: dict[str, Array]) -> memoryview:
    try:
        import torch
    except ImportError as error:
        raise CheckpointError("torch is needed to write .pth: pip install 'dat-ref[torch]'") from error
    buffer = io.BytesIO()
    # The copy avoids torch's warning about read-only arrays.
    torch.save({"model": {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}}, buffer)
    return buffer.getbuffer()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:160]

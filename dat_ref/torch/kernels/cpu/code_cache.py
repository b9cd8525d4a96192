"""On-disk cache of compiled kernels. No failure of the cache stops a computation.

Numba stores compiled code next to the source, or in the user's cache directory if the package is read-only. The
environment variable ``NUMBA_CACHE_DIR`` names another directory. Numba raises where no directory is writable, the disk
is full, or a file is damaged. Here these failures only cost compile time:

==========================  ==========================================================
failure                     consequence
==========================  ==========================================================
no writable directory       one warning; every process compiles the kernels
code cannot be written      one warning; the kernel's files are removed from the cache
file is damaged             one warning; the kernel's files are replaced
==========================  ==========================================================
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from numba.core.caching import FunctionCache
from numba.core.ccallback import CFunc
from numba.core.sigutils import normalize_signature

_LOGGER = logging.getLogger(__name__)
_WARNED: set[str] = set()


def compile_cached(kernel: Callable[[Any], None], signature: Any) -> Any:
    """Compile a kernel to a C callback, or load its code from the cache.

    Args:
        kernel: plain Python function at module level.
        signature: its Numba signature.
    """
    function = _CachedCFunc(kernel, normalize_signature(signature), locals={}, options={})
    function.enable_caching()
    function.compile()
    return function


class _CachedCFunc(CFunc):  # type: ignore[misc]
    """C callback that is compiled without a cache if there is no writable directory."""

    def enable_caching(self: Any) -> None:
        try:
            self._cache = _KernelCache(self._pyfunc)
        except (RuntimeError, OSError) as error:
            _warn_uncached(error)


class _KernelCache(FunctionCache):  # type: ignore[misc]
    """Cache of one kernel for all signatures. Loading and saving never raise."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Return the code for a signature, or None if there is none or it is damaged."""
        try:
            code = super().load_overload(sig, target_context)
            # After an interrupted write the index can name a file with code for another signature.
            if code is None:
                _announce_compilation(self.cache_path)
            if code is None or code.signature.args == sig.args:
                return code
            reason = "it contains other code"
        except Exception as error:  # damaged pickles raise exceptions of any type
            reason = _describe(error)
        _warn_once(
            "damaged",
            f"Numba's cache of {self._py_func.__name__!r} in {self.cache_path} is damaged ({reason}). "
            "The kernel is compiled again.",
        )
        self._remove_files()
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Store the code for a signature if possible."""
        try:
            super().save_overload(sig, data)
        except Exception as error:
            self._remove_files()  # the index may already name a file that was not written
            _warn_uncached(error)

    def _remove_files(self) -> None:
        """Remove the index, then the code, of all signatures. Other processes then compile the kernel again."""
        prefix = f"{self._impl.filename_base}."
        with suppress(OSError):
            found = [path for path in Path(self.cache_path).iterdir() if path.name.startswith(prefix)]
            for path in sorted(found, key=lambda path: path.suffix != ".nbi"):
                if path.suffix in (".nbi", ".nbc"):
                    path.unlink(missing_ok=True)


def _announce_compilation(directory: str) -> None:
    """Log once that the call waits for a compiler, at a level that Python prints by default."""
    if "compilation" not in _WARNED:
        _WARNED.add("compilation")
        _LOGGER.warning(
            "Compiling the CPU attention kernels for this processor, once: about 5 seconds each. The code is stored in "
            "%s. `dat-ref bench --warm` compiles all of them in advance.",
            directory,
        )


def _warn_uncached(error: Exception) -> None:
    _warn_once(
        "uncached",
        f"Numba cannot cache the compiled CPU kernels ({_describe(error)}). Every process compiles them again. "
        "Set NUMBA_CACHE_DIR to a writable directory with free space.",
    )


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _warn_once(kind: str, message: str) -> None:
    if kind not in _WARNED:
        _WARNED.add(kind)
        warnings.warn(message, RuntimeWarning, stacklevel=2)

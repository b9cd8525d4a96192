"""On-disk cache of compiled kernels: hits, and recovery from injected faults."""

import ctypes
import errno
import os
import pathlib

import pytest

pytest.importorskip("torch")
pytest.importorskip("numba")

import numba
from numba import types
from numba.core import caching

from dat_ref.torch import functional
from dat_ref.torch.kernels import cpu
from dat_ref.torch.kernels.cpu import code_cache, launch

INT, FLOAT = (types.void(types.CPointer(element)) for element in (types.int64, types.float64))


def add_one(values):
    """Kernel under test: small, so that it compiles quickly."""
    values[0] += 1


def add_two(values):
    """Second kernel under test."""
    values[0] += 2


def fail(code):
    """Return a function that raises the error of this number."""

    def raises(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    return raises


@pytest.fixture(autouse=True)
def directory(monkeypatch, tmp_path):
    """Use an empty cache directory, and forget the warnings of other tests."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(code_cache, "_WARNED", set())
    return tmp_path


def compiled(kernel=add_one, signature=INT):
    """Compile a kernel, check its result, and return whether its code was in the cache."""
    function = code_cache.compile_cached(kernel, signature)
    number = ctypes.c_int64(41) if signature is INT else ctypes.c_double(41)
    ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function.address)(ctypes.addressof(number))
    assert number.value == {add_one: 42, add_two: 43}[kernel]
    return bool(function.cache_hits)


def compiled_each():
    """Compile both kernels, and the first one twice; return whether any code was in the cache."""
    return [compiled(kernel) for kernel in (add_one, add_two, add_one)]


def files(directory, suffix=""):
    return sorted(path for path in directory.rglob("*") if path.is_file() and path.name.endswith(suffix))


def test_compiled_code_is_loaded_from_numba_cache_dir(directory):
    assert not compiled()
    assert not compiled(signature=FLOAT)
    assert [path.suffix for path in files(directory)] == [".nbc", ".nbc", ".nbi"]
    assert compiled()
    assert compiled(signature=FLOAT)


def test_a_compilation_is_announced_once_per_process(directory, caplog, monkeypatch):
    """The first call of a new installation waits for the compiler, and says so; a process that finds code does not."""
    compiled_each()
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert str(directory) in record.getMessage()
    assert "dat-ref bench --warm" in record.getMessage()
    caplog.clear()
    monkeypatch.setattr(code_cache, "_WARNED", set())
    assert compiled_each() == [True, True, True]
    assert not caplog.records


def test_without_a_writable_directory_kernels_are_compiled_with_one_warning(monkeypatch, directory):
    monkeypatch.setattr(caching._CacheLocator, "ensure_cache_path", fail(errno.EROFS))
    with pytest.warns(RuntimeWarning, match="cannot cache function.* Set NUMBA_CACHE_DIR") as caught:
        hits = compiled_each()
    assert hits == [False, False, False]
    assert len(caught) == 1
    assert not files(directory)
    assert "cpu" in functional.backends()


@pytest.mark.parametrize("method", ["_save_index", "_save_data"])
def test_on_a_full_disk_kernels_are_compiled_with_one_warning(monkeypatch, directory, method):
    with monkeypatch.context() as patch:
        patch.setattr(caching.IndexDataCacheFile, method, fail(errno.ENOSPC))
        with pytest.warns(RuntimeWarning, match=r"No space left on device.* Set NUMBA_CACHE_DIR") as caught:
            hits = compiled_each()
        assert hits == [False, False, False]
        assert len(caught) == 1
        assert not files(directory)
    assert not compiled()
    assert compiled()


@pytest.mark.parametrize("suffix", [".nbi", ".nbc"])
@pytest.mark.parametrize("damage", [lambda old: b"", lambda old: old[: len(old) // 2], lambda old: bytes(len(old))])
def test_a_damaged_file_is_replaced(directory, suffix, damage):
    compiled()
    (path,) = files(directory, suffix)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(RuntimeWarning, match="cache of 'add_one' in .* is damaged"):
        assert not compiled()
    assert compiled()


def test_a_removed_file_is_replaced(directory):
    compiled()
    files(directory, ".nbc")[0].unlink()
    assert not compiled()
    assert compiled()


def test_code_for_another_signature_is_never_run(directory):
    compiled()
    compiled(signature=FLOAT)
    one, other = files(directory, ".nbc")
    one.write_bytes(other.read_bytes())
    with pytest.warns(RuntimeWarning, match="it contains other code"):
        assert not compiled()
    assert not compiled(signature=FLOAT)
    assert compiled()
    assert compiled(signature=FLOAT)


def test_files_of_other_kernels_stay(directory):
    compiled_each()
    next(path for path in files(directory, ".nbi") if "add_one" in path.name).write_bytes(b"")
    with pytest.warns(RuntimeWarning, match="damaged"):
        assert not compiled()
    assert compiled(add_two)


def test_a_damaged_file_that_cannot_be_removed_costs_only_time(monkeypatch, directory):
    compiled()
    files(directory, ".nbi")[0].write_bytes(b"")
    monkeypatch.setattr(pathlib.Path, "unlink", fail(errno.EACCES))
    with pytest.warns(RuntimeWarning) as caught:
        hits = [compiled(), compiled()]
    assert hits == [False, False]
    damaged, uncached = (str(warning.message) for warning in caught)
    assert "is damaged (EOFError" in damaged
    assert "cannot cache the compiled CPU kernels (EOFError" in uncached


def test_all_kernels_are_compiled_through_the_cache(monkeypatch):
    class Function:
        address = 7

    seen = []
    monkeypatch.setattr(launch, "compile_cached", lambda kernel, signature: seen.append(kernel) or Function)
    monkeypatch.setattr(launch, "_KEEP_ALIVE", [])
    arguments = (cpu.deformable.forward, cpu.deformable.FIELDS, launch.torch.float32)
    assert launch.compile_kernel.__wrapped__(*arguments) == 7
    assert cpu.deformable.forward in seen
    assert [Function] == launch._KEEP_ALIVE

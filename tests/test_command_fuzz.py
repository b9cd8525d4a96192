"""Fuzzing of the command and of the files that it reads, bounded and seeded.

Every case runs the command in this process, with a time limit. It must end with the right result, or with exit code 2,
one error message and no traceback, and it must not leave a partial file, a new folder or a changed target. `CASES` has
the number of cases of each kind, 921 in all.
"""

import io
import json
import os
import random
import resource
import signal
import subprocess
import sys
import zipfile
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest

import dat_ref
from dat_ref.checkpoints import detect_preset, fit_state
from dat_ref.cli import agree, complexity, main
from dat_ref.cli import claims as claims_command
from dat_ref.params import flatten
from dat_ref.state_files import read_state, save_state
from dat_ref.testing import check as check_library

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")
pytest.importorskip("hypothesis")
pytest.importorskip("matplotlib")

ROOT = Path(__file__).parents[1]
SECONDS = 30  # limit of a case
CASES = {
    "damaged files": 240,
    "states that do not fit": 80,
    "contents of .pth files": 14,
    "arguments": 300,
    "results of bench": 150,
    "training configs": 60,
    "check targets": 15,
    "encodings": 30,
    "failed writes": 8,
    "control characters": 24,
}


assert sum(CASES.values()) == 921


class Overtime(BaseException):
    """Raised when a case exceeds its time limit."""


class Outcome:
    """Exit code and output of a run of the command."""

    def __init__(self, code, out, err):
        self.code, self.out, self.err = code, out, err

    def __repr__(self):
        return f"exit code {self.code}\n--- stdout\n{self.out[-2000:]}\n--- stderr\n{self.err[-4000:]}"


def _stop(*_):
    raise Overtime


def run(*arguments, encoding="utf-8"):
    """Run the command with output streams of an encoding that accept nothing else."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict") for _ in range(2))
    previous = signal.signal(signal.SIGALRM, _stop)
    signal.alarm(SECONDS)
    try:
        with redirect_stdout(out), redirect_stderr(err):
            try:
                code = main([str(argument) for argument in arguments])
            except SystemExit as stop:
                code = stop.code
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    out.flush()
    err.flush()
    return Outcome(code, out.buffer.getvalue().decode(encoding), err.buffer.getvalue().decode(encoding))


def require_refusal(outcome, *, lines=1):
    """Require exit code 2 and one error message of at most so many lines (a report of a checkpoint has more)."""
    assert outcome.code == 2, outcome
    assert outcome.err.startswith("dat-ref"), outcome
    assert ": error: " in outcome.err.splitlines()[0], outcome
    assert "Traceback" not in outcome.err, outcome
    assert len(outcome.err.strip().splitlines()) <= lines, outcome


def listing(folder):
    """Return all files below a folder with their content, and all folders."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


REPORT_LINES = 60


# ------------------------------------------------------------------------------------------------ files


def spot_params(seed=0):
    config = dat_ref.config("dat_spot", num_classes=5)
    return {name: array.astype(np.float32) for name, array in flatten(dat_ref.init_params(config, seed)).items()}


def damage(content, rng):
    """Return file content with one random kind of damage."""
    content = bytearray(content)
    position = rng.randrange(len(content))
    kind = rng.choice(["bit", "bit", "bit", "byte", "cut", "zeros", "insert", "remove", "swap", "tail"])
    if kind == "bit":
        content[position] ^= 1 << rng.randrange(8)
    elif kind == "byte":
        content[position] = rng.randrange(256)
    elif kind == "cut":
        del content[position:]
    elif kind == "zeros":
        content[position : position + 64] = bytes(len(content[position : position + 64]))
    elif kind == "insert":
        content[position:position] = rng.randbytes(rng.randrange(1, 40))
    elif kind == "remove":
        del content[position : position + rng.randrange(1, 40)]
    elif kind == "swap":
        half = len(content) // 2
        content = content[half:] + content[:half]
    else:
        content += rng.randbytes(40)
    return bytes(content)


def headers(content, suffix):
    """Return ranges of bytes with structure, which random positions seldom hit."""
    if suffix == ".safetensors":
        return [(0, 8 + int.from_bytes(content[:8], "little"))]
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return [
            (archive.start_dir, len(content)),
            *((info.header_offset, info.header_offset + 90) for info in archive.infolist()),
        ]


@pytest.mark.parametrize("suffix", [".pth", ".npz", ".safetensors"])
def test_damaged_files(suffix, tmp_path):
    """Formats with checksums give back every bit or are refused. safetensors has none: the structure must be right."""
    rng = random.Random(f"damage {suffix}")
    state = spot_params()
    source, target = tmp_path / f"w{suffix}", tmp_path / "out.npz"
    save_state(source, state)
    content = source.read_bytes()
    regions = headers(content, suffix)
    refused = 0
    for index in range(CASES["damaged files"] // 3):
        if index % 2:
            broken = damage(content, rng)
        else:  # half of the cases change the structure
            first, last = rng.choice(regions)
            broken = content[:first] + damage(content[first:last], rng) + content[last:]
        source.write_bytes(broken)
        before = listing(tmp_path)
        outcome = run("convert", source, target, "--model", "dat_spot")
        if outcome.code == 0:
            found = read_state(target)
            assert found.keys() == state.keys()
            if suffix != ".safetensors":
                assert all(np.array_equal(found[name], state[name]) for name in state), index
            target.unlink()
        else:
            require_refusal(outcome, lines=REPORT_LINES)
            assert str(source) in outcome.err, outcome
            refused += 1
        assert listing(tmp_path) == before
    assert refused > 30


def test_a_flipped_bit_in_the_weights_is_refused(tmp_path):
    """torch does not compare checksums. One bit of an exponent moves a weight far."""
    source = tmp_path / "w.pth"
    save_state(source, spot_params())
    content = bytearray(source.read_bytes())
    with zipfile.ZipFile(source) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
    content[largest.header_offset + 4000] ^= 0x40
    source.write_bytes(content)
    assert torch.load(source, weights_only=True)
    outcome = run("convert", source, tmp_path / "out.npz")
    require_refusal(outcome)
    assert "wrong checksum" in outcome.err
    torch.serialization.set_crc32_options(False)  # such files have no checksums
    try:
        save_state(source, spot_params())
    finally:
        torch.serialization.set_crc32_options(True)
    assert run("convert", source, tmp_path / "out.npz").code == 0


def change_state(state, rng):
    """Return a state dict with one random mistake, and whether it must be refused."""
    state = dict(state)
    name = rng.choice(sorted(state))
    array = state[name]
    kind = rng.choice(
        ["delete", "extra", "scalar", "empty", "flat", "transposed", "int", "bool", "complex", "nan", "inf", "rename",
         "prefix", "half", "double", "rows", "head", "stem", "table"]
    )  # fmt: skip
    if kind == "delete":
        del state[name]
    elif kind == "extra":
        state[f"{name}.more"] = array
    elif kind == "scalar":
        state[name] = np.float32(1).reshape(())
    elif kind == "empty":
        state[name] = array[:0]
    elif kind == "flat":
        state[name] = array.reshape(1, -1)
    elif kind == "transposed":
        state[name] = array.reshape(*array.shape, 1)
    elif kind in ("int", "bool", "complex"):
        state[name] = array.astype(kind)
    elif kind in ("nan", "inf"):
        state[name] = np.full_like(array, float(kind))
    elif kind == "rename":
        state[name.replace(".", "_")] = state.pop(name)
    elif kind == "prefix":
        state[f"module.{name}"] = state.pop(name)
    elif kind in ("half", "double"):
        state[name] = array.astype(np.float16 if kind == "half" else np.float64)
    elif kind == "rows":
        state[name] = np.concatenate([array, array])
    elif kind == "head":
        state["head.weight"] = rng.choice(
            [np.float32(1).reshape(()), np.zeros((0, 112), np.float32), np.zeros(3, np.float32)]
        )
    elif kind == "stem":
        state["patch_embedding.0.projection.weight"] = rng.choice(
            [np.zeros((16, 0, 3, 3), np.float32), np.zeros((), np.float32)]
        )
    elif kind == "table":
        tables = [each for each in state if each.endswith("bias.table")]
        state[tables[0]] = rng.choice(
            [np.zeros((len(state[tables[0]]), 0, 0), np.float32), np.zeros((1, 1, 1), np.float32)]
        )
    return state, kind not in ("half", "double")


@pytest.mark.parametrize("suffix", [".npz", ".pth"])
def test_states_that_do_not_fit(suffix, tmp_path):
    rng = random.Random(f"states {suffix}")
    config = dat_ref.config("dat_nano", num_classes=5)
    state = flatten(dat_ref.init_params(config, 0))
    source, target = tmp_path / f"w{suffix}", tmp_path / "out.npz"
    for index in range(CASES["states that do not fit"] // 2):
        changed, must_fail = change_state(state, rng)
        save_state(source, changed)
        before = listing(tmp_path)
        arguments = ["--model", "dat_nano"] if index % 3 else []
        outcome = run("convert", source, target, *arguments)
        if must_fail:
            require_refusal(outcome, lines=REPORT_LINES)
            assert str(source) in outcome.err, outcome
            assert listing(tmp_path) == before
        else:
            assert outcome.code == 0, outcome
            target.unlink()


def recursive(wrapper):
    loop = {"epoch": 1}
    loop[wrapper] = loop
    return loop


def nested(depth):
    state = {"stages.x": torch.ones(1)}
    for _ in range(depth):
        state = {"model": state}
    return state


def contents_of_torch_files():
    one = torch.ones(2)
    yield "itself", recursive("model")
    yield "itself by two", {"state_dict": {"model": recursive("state_dict")}}
    yield "int names", {0: one, 1: one}
    yield "mixed names", {"model": {"stages.x": one, 5: one}}
    yield "tuple names", {("a", "b"): one}
    yield "none", {"model": None}
    yield "list", [one, one]
    yield "tensor", one
    yield "number", 3
    yield "sparse", {"stages.x": torch.eye(3).to_sparse()}
    yield "meta", {"stages.x": torch.ones(2, device="meta")}
    yield "float8", {"patch_proj.0.weight": one.to(torch.float8_e4m3fn)}
    yield "empty", {"model": {}}
    yield "deep", nested(40)


def test_contents_of_torch_files(tmp_path):
    source, target = tmp_path / "w.pth", tmp_path / "out.npz"
    contents = list(contents_of_torch_files())
    assert len(contents) == CASES["contents of .pth files"]
    for name, content in contents:
        torch.save(content, source)
        before = listing(tmp_path)
        outcome = run("convert", source, target)
        require_refusal(outcome)
        assert str(source) in outcome.err, (name, outcome)
        assert "download it again" not in outcome.err, (name, outcome)
        assert listing(tmp_path) == before


def test_a_state_with_many_foreign_names_is_refused_at_once():
    config = dat_ref.config("dat_nano", num_classes=5)
    state = flatten(dat_ref.init_params(config, 0)) | {f"foreign.{i}": np.ones(1, np.float32) for i in range(20_000)}
    previous = signal.signal(signal.SIGALRM, _stop)
    signal.alarm(5)
    try:
        with pytest.raises(dat_ref.CheckpointError, match="unexpected \\(20000\\)"):
            fit_state(state, config)
        assert detect_preset(state) is None
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


# ------------------------------------------------------------------------------------------------ arguments

NASTY = [
    *("", " ", "\t", "-", "--", "/", "../..", "/dev/null", "no/such.npz"),
    *("[[[[", "{}", "{0}", "%s", "a:b", "True", "None"),
    *("0", "-1", "-3", "1", "2", "1.5", "nan", "inf", "1e400", "9" * 400, "-" + "9" * 400, "9" * 5000, "٣"),
    *("224x", "1x1", "64x96", "100000x100000", "1x1x1", "x224", "\udcff", "é×", "x", "a" * 5000),
    *("dat_tiny", "dat_nano", "dat_spot", "window", "cpu", "sampler", "C"),
]
OPTIONS = {
    "complexity": ["--model", "--size", "--attention", "--json"],
    "check": ["--op", "--convention", "--dtype", "--max-examples", "--xfails", "--list"],
    "claims": ["--only", "--json", "--markdown"],
    "bench": ["--threads", "--rounds", "--shapes", "--backends", "--dtypes", "--compile", "--read", "--device"],
    "convert": ["--model", "--to", "--force"],
    "evaluate": ["--config", "--batch-size", "--data"],
    "agree": ["--model", "--seed", "--checkpoint", "--json"],
}
FLAGS = ("--json", "--markdown", "--list", "--force")
POSITIONAL = {"convert": 2, "evaluate": 1, "check": 1, "agree": 1}


@pytest.fixture
def cheap(monkeypatch, tmp_path):
    """Replace the expensive parts of the commands, so that accepted arguments take no time; enter an empty folder."""
    results = json.loads((ROOT / "docs/performance/cpu.json").read_text(encoding="utf-8"))
    finding = claims_command.run_claim(claims_command.LEDGER[0])
    monkeypatch.setattr("dat_ref.bench.run.benchmark", lambda *_, **__: results)
    monkeypatch.setattr("torch.set_num_threads", lambda _: None)
    monkeypatch.setattr(claims_command, "run_claim", lambda _: finding)
    monkeypatch.setattr(complexity, "_matplotlib_is_installed", lambda: False)
    monkeypatch.setattr(agree, "compare", lambda *_: [])
    monkeypatch.setattr(agree, "table", lambda _: "")
    monkeypatch.setattr("dat_ref.cli.weights.init_params", lambda *_: {})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.mark.parametrize("command", OPTIONS)
def test_arguments(command, cheap, tmp_path):
    """Nasty values in random options. A good value passes; the folder stays empty in any case."""
    rng = random.Random(f"arguments {command}")
    codes = []
    for _ in range(CASES["arguments"] // len(OPTIONS)):
        arguments = [command]
        if rng.random() < 0.6:
            arguments += [rng.choice(NASTY) for _ in range(POSITIONAL.get(command, 0))]
        for option in rng.sample(OPTIONS[command], rng.randrange(1, 4)):
            arguments += [option] if option in FLAGS else [option, rng.choice(NASTY)]
        outcome = run(*arguments)
        codes.append(outcome.code)
        if outcome.code:
            require_refusal(outcome)
        assert listing(tmp_path) == {}, arguments
    assert 2 in codes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "--threads", "-3"], "--threads: expected 1 to 1024, got -3"),
        (["bench", "--threads", "0"], "--threads: expected 1 to 1024, got 0"),
        (["bench", "--rounds", "0"], "--rounds: expected 1 or more, got 0"),
        (["bench", "--compile", "dat_huge"], "--compile: expected some of dat_tiny"),
        (["bench", "--shapes", "C", "--plot", "made/a.png"], "--plot: needs the shape 'curve'"),
        (["complexity", "--size", "9" * 400], "--size: expected at most 65536 pixels"),
        (["complexity", "--out", "made"], "--out: matplotlib is needed"),
        (["convert", "no.npz", "out.txt"], "out.txt: expected a file name that ends in"),
        (["evaluate", "none.safetensors"], "none.safetensors"),
        (["diagnose", "none.safetensors"], "none.safetensors"),
        (["diagnose", "--images", "1"], "--images: expected 2 or more, got 1"),
        (["diagnose", "--batch-size", "0"], "--batch-size: expected 1 or more, got 0"),
        (["diagnose", "--config", "none.json"], "--config: expected WEIGHTS as well"),
        (["diagnose", "--data", "none"], "none/val: expected a folder"),
    ],
)
def test_messages_name_the_argument(arguments, message, cheap, tmp_path):
    outcome = run(*arguments)
    require_refusal(outcome)
    assert message in outcome.err
    assert listing(tmp_path) == {}


@pytest.mark.parametrize("model", ["dat_nano", "dat_spot", "dat_pp_tiny"])
def test_complexity_without_matplotlib(model, cheap, tmp_path):
    """All numbers are printed, for presets of our own as well, and no folder is made."""
    plain, exact = run("complexity", "--model", model), run("complexity", "--model", model, "--json")
    assert (plain.code, exact.code) == (0, 0)
    assert "G multiply-adds" in plain.out
    assert "no figure: matplotlib is needed" in plain.err
    facts = json.loads(exact.out)
    assert facts["figures"] == []
    assert (facts["published"] is None) == (model != "dat_pp_tiny")
    assert {curve["kind"] for curve in facts["curves"]} >= {"deformable", "multi_head"}
    assert listing(tmp_path) == {}


@pytest.mark.parametrize("model", ["dat_nano", "dat_spot"])
def test_complexity_draws_small_presets(model, tmp_path):
    outcome = run("complexity", "--model", model, "--out", tmp_path / "made")
    assert outcome.code == 0, outcome
    assert [path.name for path in (tmp_path / "made").iterdir()] == [f"{model}_growth.png"]


# ------------------------------------------------------------------------------------------------ JSON files


def deep(levels):
    return "[" * levels + "]" * levels


def change_json(value, rng, depth=0):
    """Return JSON data with one random change somewhere."""
    if isinstance(value, dict) and value and (depth < 1 or rng.random() < 0.8):
        key = rng.choice(sorted(value))
        if rng.random() < 0.15:
            return {name: each for name, each in value.items() if name != key}
        return value | {key: change_json(value[key], rng, depth + 1)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        index = rng.randrange(len(value))
        return [*value[:index], change_json(value[index], rng, depth + 1), *value[index + 1 :]]
    return rng.choice(
        [None, True, 0, -1, 10**400, float("nan"), float("inf"), "", "x", [], {}, [None], {"a": 1}, 1e-320]
    )


def change_text(text, rng):
    """Return a text with one random change: characters, length, nesting, or bytes that are not UTF-8."""
    kind = rng.choice(["cut", "character", "deep", "bytes", "empty", "prefix"])
    position = rng.randrange(len(text))
    if kind == "cut":
        return text[:position].encode()
    if kind == "character":
        return (text[:position] + rng.choice('{}[]",:0x\x00') + text[position + 1 :]).encode()
    if kind == "deep":
        return deep(rng.choice([100, 5000, 100_000])).encode()
    if kind == "bytes":
        return text.encode()[:position] + b"\xff\xfe" + text.encode()[position:]
    return b"" if kind == "empty" else b"\xef\xbb\xbf" + text.encode()


def test_results_of_bench(tmp_path):
    """`bench --read`: tables of the right form, or one line, and no file."""
    rng = random.Random("bench")
    results = json.loads((ROOT / "docs/performance/cpu.json").read_text(encoding="utf-8"))
    source, target = tmp_path / "other.json", tmp_path / "made" / "tables.md"
    refused = 0
    for index in range(CASES["results of bench"]):
        if index % 3:
            source.write_text(json.dumps(change_json(results, rng)), encoding="utf-8")
        else:
            source.write_bytes(change_text(json.dumps(results), rng))
        before = listing(tmp_path)
        outcome = run("bench", "--read", source, "--markdown", target)
        if outcome.code:
            require_refusal(outcome)
            assert str(source) in outcome.err, outcome
            assert listing(tmp_path) == before
            refused += 1
        else:
            assert target.read_text(encoding="utf-8").startswith("<!--")
            target.unlink()
            target.parent.rmdir()
    assert refused > 50


def test_training_configs(tmp_path):
    """`evaluate --config`: a config that cannot be used is named. There is no data, so nothing is ever evaluated."""
    from safetensors.numpy import save_file

    from dat_ref.train_config import TrainConfig

    rng = random.Random("configs")
    text = TrainConfig().to_json()
    weights, config = tmp_path / "best.safetensors", tmp_path / "config.json"
    for index in range(CASES["training configs"]):
        classes = rng.choice(['["a", "b"]', "3", "[1]", deep(100_000), "{", None])
        save_file({"x": np.ones(3)}, weights, metadata=None if classes is None else {"classes": classes})
        if index % 2:
            config.write_text(json.dumps(change_json(json.loads(text), rng)), encoding="utf-8")
        else:
            config.write_bytes(change_text(text, rng))
        before = listing(tmp_path)
        outcome = run("evaluate", weights, "--config", config, "--data", tmp_path / "none")
        require_refusal(outcome)
        assert str(tmp_path) in outcome.err, outcome
        assert listing(tmp_path) == before


# ------------------------------------------------------------------------------------------------ targets of check

RIGHT = "from dat_ref.ops.sampling import bilinear_sample\n"
TARGETS = {
    "exits": ("import sys; sys.exit(0)", "{name}", 2),
    "exits_with_text": ("raise SystemExit('bye')", "{name}", 2),
    "raises_base": ("class Odd(BaseException): pass\nraise Odd('odd')", "{name}", 2),
    "raises": ("1 / 0", "{name}", 2),
    "syntax": ("def (", "{name}", 2),
    "property_raises": (
        "class Port:\n    @property\n    def bilinear_sample(self):\n        raise RuntimeError('no')", "{name}:Port", 2
    ),
    "property_raises_value_error": (
        "class Port:\n    @property\n    def bilinear_sample(self):\n        raise ValueError('no')", "{name}:Port", 2
    ),
    "property_exits": (
        "import sys\nclass Port:\n    @property\n    def bilinear_sample(self):\n        sys.exit(0)", "{name}:Port", 2
    ),
    "constructor_exits": ("import sys\nclass Port:\n    def __init__(self):\n        sys.exit(0)", "{name}:Port", 2),
    "getattr_raises": ("def __getattr__(name):\n    raise RuntimeError(name)", "{name}", 2),
    "function_exits": ("import sys\ndef bilinear_sample(x, points_px):\n    sys.exit(0)", "{name}", 1),
    "function_raises": ("def bilinear_sample(x, points_px):\n    raise KeyError('x')", "{name}", 1),
    "returns_text": ("def bilinear_sample(x, points_px):\n    return 'zero'", "{name}", 1),
    "returns_itself": ("def bilinear_sample(x, points_px):\n    return bilinear_sample", "{name}", 1),
    "right": (RIGHT, "{name}:bilinear_sample", 0),
}  # fmt: skip


@pytest.mark.parametrize("name", TARGETS)
def test_check_targets(name, tmp_path, monkeypatch):
    """Exit code 1 for a function that ran and is wrong, 2 for a target that cannot be used, and never silence."""
    assert len(TARGETS) == CASES["check targets"]
    source, target, code = TARGETS[name]
    module = f"fuzzed_{name}"
    (tmp_path / f"{module}.py").write_text(source, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    try:
        outcome = run("check", target.format(name=module), "--op", "sampler", "--max-examples", "1")
        require_target(outcome, target.format(name=module), code)
    finally:
        sys.modules.pop(module, None)
    assert ("SystemExit: 0" in outcome.out) == (name == "function_exits")


def require_target(outcome, target, code):
    """Require an exit code of `check`, and the same result of the library."""
    assert outcome.code == code, outcome
    if code == 2:
        require_refusal(outcome)
        assert target.partition(":")[0] in outcome.err
        with pytest.raises(ValueError, match=r"^TARGET: "):
            check_library(target, ["sampler"], max_examples=1)
    else:
        assert "checks hold" in outcome.out or "bilinear_sample" in outcome.out
        (report,) = check_library(target, ["sampler"], max_examples=1)
        assert report.passed == (code == 0)


# ------------------------------------------------------------------------------------------------ output

ENCODINGS = ("ascii", "cp1252", "cp932", "latin-1", "utf-8")
PRINTING = (["complexity"], ["complexity", "--json"], ["check", "--list"], ["claims"], ["train", "--help"], ["convert"])


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_encodings(encoding, cheap, tmp_path):
    """All commands print on streams of any encoding, also names of files that are not UTF-8."""
    assert len(ENCODINGS) * len(PRINTING) == CASES["encodings"]
    source = tmp_path / os.fsdecode(b"gewicht\xff.npz")
    save_state(source, spot_params())
    for arguments in PRINTING:
        files = [source, tmp_path / os.fsdecode(b"out\xe9.pth")] if arguments == ["convert"] else []
        outcome = run(*arguments, *files, encoding=encoding)
        assert outcome.code == 0, outcome
        assert outcome.out
        assert "Traceback" not in outcome.err
        if files:
            assert "gewicht\\xff.npz: dat_spot, dat_ref names" in outcome.out
            assert read_state(files[1]).keys() == spot_params().keys()
            require_refusal(run("convert", files[1], tmp_path / "no/out.pth", encoding=encoding))
            files[1].unlink()
    if encoding == "ascii":
        assert "one image of 224x224" in run("complexity", encoding=encoding).out


@contextmanager
def full_disk(size):
    """Let no file grow larger than `size` bytes: writing more fails as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("size", [0, 5000])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".npz", ".png"])
def test_failed_writes(suffix, size, tmp_path):
    """The file that was there stays as it was, and the message names it."""
    assert CASES["failed writes"] == 2 * 4
    source = tmp_path / "w.npz"
    save_state(source, spot_params())
    target = tmp_path / ("dat_tiny_growth.png" if suffix == ".png" else f"out{suffix}")
    target.write_bytes(b"precious")
    before = listing(tmp_path)
    arguments = ["complexity", "--out", tmp_path] if suffix == ".png" else ["convert", source, target, "--force"]
    with full_disk(size):
        outcome = run(*arguments)
    require_refusal(outcome)
    assert f"{target}: File too large" in outcome.err
    assert listing(tmp_path) == before


@pytest.mark.parametrize(
    ("target", "message"),
    [("nope/y.npz", "nope/y.npz: No such file"), ("w.npz/y.npz", "w.npz/y.npz: Not a directory"), (".npz", "ends in")],
)
def test_errors_name_the_right_file(target, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_state("w.npz", spot_params())
    outcome = run("convert", "w.npz", target)
    require_refusal(outcome)
    assert message in outcome.err
    (tmp_path / "file").write_bytes(b"")
    outcome = run("complexity", "--out", "file/sub")
    require_refusal(outcome)
    assert "--out: expected a folder, and file is a file" in outcome.err


NAMES = ("first\nsecond.npz", "a\rb.npz", "\x1b[31mred.npz")


@pytest.mark.parametrize("name", NAMES)
def test_control_characters_in_file_names(name, tmp_path, monkeypatch):
    """A message stays one line and does not control the terminal."""
    monkeypatch.chdir(tmp_path)
    save_state(name, spot_params())
    (tmp_path / "pictures/cat").mkdir(parents=True)
    (tmp_path / "pictures/cat" / name.replace(".npz", ".png")).write_bytes(b"no picture")
    commands = (
        ["convert", f"no {name}", "out.npz"],
        ["convert", name, f"no/{name}"],
        ["convert", name, name.removesuffix(".npz")],
        ["explain", f"no {name}"],
        ["train", "--data", "pictures", "--out", "run"],
        ["bench", "--read", f"no {name}"],
        ["check", f"no {name}"],
        [f"no {name}"],
    )
    assert len(commands) * len(NAMES) == CASES["control characters"]
    for command in commands:
        outcome = run(*command)
        require_refusal(outcome)
        assert not set(outcome.err) & set("\r\x1b"), (command, outcome)


def test_internal_errors_show_a_traceback_and_ask_for_a_report(monkeypatch):
    monkeypatch.setattr(complexity, "_curves", lambda _: {}["absent"])
    outcome = run("complexity")
    assert outcome.code == 3
    assert "Traceback" in outcome.err
    assert "Please report it" in outcome.err.splitlines()[-1]


@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError()])
def test_too_little_memory_is_one_line(error, monkeypatch):
    def fail(_):
        raise error

    monkeypatch.setattr(complexity, "_curves", fail)
    outcome = run("complexity")
    require_refusal(outcome)
    assert "memory" in outcome.err


def test_standard_output_of_a_real_process(tmp_path):
    """A full disk, a closed pipe and an ASCII terminal, as the shell provides them."""

    def shell(command, **environment):
        return subprocess.run(
            ["bash", "-c", command.replace("dat-ref", f"{sys.executable} -m dat_ref")],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONWARNINGS": "ignore"} | environment,
            cwd=tmp_path,
            capture_output=True,
            timeout=120,
        )

    if Path("/dev/full").exists():
        full = shell("dat-ref complexity --model dat_spot --json > /dev/full")
        assert full.returncode == 2
        assert full.stderr == b"dat-ref: error: standard output: No space left on device\n"
    ascii_only = shell("dat-ref check --list --op sampler | cat", PYTHONIOENCODING="ascii")
    assert ascii_only.stderr == b""
    assert b"border_fades" in ascii_only.stdout

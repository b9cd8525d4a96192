"""Benchmark: no timing of implementations that disagree, medians of alternating rounds, memory, pages from the JSON."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

import dat_ref.torch.functional as functional  # noqa: E402
from dat_ref.bench import cases, implementations, measure, memory, report, timing  # noqa: E402
from dat_ref.bench.agreement import Disagreement, check  # noqa: E402
from dat_ref.bench.implementations import BACKWARD, FORWARD, draw_inputs, make_implementation  # noqa: E402
from dat_ref.bench.released import released_formulation  # noqa: E402
from dat_ref.cli import main  # noqa: E402
from dat_ref.torch.functional import registry  # noqa: E402

DOCS = Path(__file__).parents[1] / "docs"
CORE = cases.CoreCase("C", 1, (5, 7), (2, 3), 4, 2, depth=8)
MODEL = cases.ModelCase("dat_tiny", 1, 64)


@pytest.fixture
def tiny_cases(monkeypatch):
    """Make the shape C tiny, and the model's image small."""
    monkeypatch.setattr(cases, "cases", lambda names, device: [each for each in (CORE, MODEL) if each.name in names])
    monkeypatch.setattr(timing, "MIN_SAMPLE_SECONDS", 0.0)


@pytest.fixture
def no_memory(monkeypatch):
    """Skip the separate processes that measure memory."""
    monkeypatch.setattr(measure, "extra_bytes", lambda *arguments: 2_500_000)


# ------------------------------------------------------------------------------------------------ agreement


def results(dtype=torch.float32, backend="blockwise"):
    return dict(make_implementation(backend, CORE, draw_inputs(CORE, torch.float32, "cpu", 5).to(dtype)).results())


def test_backends_agree_and_are_within_the_budget_in_half_precision():
    expected = results(backend="eager")
    assert check("blockwise", results(), expected, expected, torch.float32) < 1e-5
    plain = results(torch.bfloat16, "eager")
    assert check("blockwise", results(torch.bfloat16), expected, plain, torch.bfloat16) < 0.1
    assert list(expected) == ["forward", "out", "q", "k", "v", "points", "table"]


@pytest.mark.parametrize("part", ["forward", "out", "q", "k", "v", "points", "table"])
@pytest.mark.parametrize("mistake", ["thousandth", "nan", "missing", "shape", "one element"])
def test_a_mistake_in_any_part_is_detected(part, mistake):
    wrong, expected = results(), results(backend="eager")
    tensor = wrong[part].clone()
    wrong[part] = {
        "thousandth": tensor * 1.001,
        "nan": tensor.index_fill(0, torch.tensor([0]), float("nan")),
        "missing": tensor,
        "shape": tensor[..., :-1],
        "one element": tensor.flatten().index_fill(0, torch.tensor([3]), 0.0).view(tensor.shape),
    }[mistake]
    if mistake == "missing":
        del wrong[part]
    with pytest.raises(
        Disagreement, match=r"shape|gives|by nan" if mistake in ("shape", "missing", "nan") else f"differs: {part} by"
    ):
        check("wrong", wrong, expected, expected, torch.float32)


def test_a_relative_error_of_a_tenth_is_detected_in_half_precision():
    expected, plain = results(), results(torch.bfloat16, "eager")
    wrong = {**plain, "points": plain["points"] * 1.3}
    check("right", plain, expected, plain, torch.bfloat16)
    with pytest.raises(Disagreement, match="points"):
        check("wrong", wrong, expected, plain, torch.bfloat16)


# ------------------------------------------------------------------------------------------------ time and memory


def test_implementations_take_turns_and_the_median_counts(monkeypatch):
    """Each round starts with another implementation; a fake clock gives each a known duration."""
    now, ran = [0.0], []
    # The first call, of 9 seconds, only determines the number of repetitions.
    costs = {"a": [9, 1, 5, 2], "b": [9, 40, 30, 20], "c": [9, 3, 3, 3]}

    def run(name):
        def call():
            ran.append(name)
            now[0] += costs[name][ran.count(name) - 1]

        return call

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(timing, "MAX_ROUNDS_SECONDS", 1e9)
    medians, rounds = timing.median_seconds({name: run(name) for name in costs}, 3, "cpu")
    assert (medians, rounds) == ({"a": 2, "b": 30, "c": 3}, 3)
    assert "".join(ran) == "abc" + "abc" + "bca" + "cab"


def test_short_calls_are_repeated_and_long_ones_get_fewer_rounds(monkeypatch):
    now, calls = [0.0], {"short": 0, "long": 0}

    def run(name, seconds):
        def call():
            calls[name] += 1
            now[0] += seconds

        return call

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    medians, rounds = timing.median_seconds({"short": run("short", 0.0005), "long": run("long", 9.0)}, 50, "cpu")
    assert rounds == timing.MIN_ROUNDS
    assert calls == {"short": 1 + 10 * rounds, "long": 1 + rounds}
    assert medians == pytest.approx({"short": 0.0005, "long": 9.0})


def allocate(megabytes):
    """Return a small run and one that allocates a given number of bytes, for `extra_bytes`."""
    return [lambda: torch.ones(3) @ torch.ones(3), lambda: torch.ones(megabytes * 250_000).sum()]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs /proc/self/clear_refs")
def test_extra_bytes_equal_the_allocation():
    for megabytes in (5, 40):
        taken = memory.extra_bytes("cpu", 1, allocate, megabytes)
        assert 0.95 * megabytes < taken / 1e6 < megabytes + 2


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs /proc/self/clear_refs")
@pytest.mark.parametrize("backend", ["blockwise", "cpu", "eager"])
def test_memory_grows_with_queries_and_not_with_pairs(backend):
    """Memory grows with the queries; the counter-example is the eager formulation, which stores all pairs."""
    if backend not in functional.backends():
        pytest.skip(f"no backend {backend}")

    def taken(case):
        return memory.extra_bytes("cpu", 1, measure.attention_runs, case, backend, torch.float32, "cpu", FORWARD)

    small, large = (taken(replace(case, heads=6)) for case in cases.resolutions((24, 48)))
    linear = large < 5 * small + 2e6
    assert linear == (backend != "eager"), (small, large)


# ------------------------------------------------------------------------------------------------ selection


def test_unsupported_backends_are_left_out():
    assert implementations.unsupported_reason("blockwise", CORE, draw_inputs(CORE, torch.float32, "cpu", 0)) == ""
    if not torch.cuda.is_available():
        assert implementations.unsupported_reason("triton", CORE, draw_inputs(CORE, torch.float32, "cpu", 0)) != ""


def test_each_run_draws_new_data(monkeypatch):
    seeds = []

    def recorded(case, dtype, device, seed):
        seeds.append(seed)
        return draw_inputs(case, dtype, device, seed)

    monkeypatch.setattr(measure, "draw_inputs", recorded)
    monkeypatch.setattr(measure, "extra_bytes", lambda *arguments: None)
    options = measure.Options("cpu", 1, 1, ("blockwise",), (torch.float32,))
    for _ in range(2):
        list(measure.compare_cases([CORE], options, lambda message: None))
    assert seeds[0] != seeds[1]


@pytest.mark.parametrize("name", ["dat_tiny", "dat_pp_tiny"])
def test_the_released_formulation_has_the_same_parameters_and_outputs(name):
    import dat_ref.torch as dt

    torch.manual_seed(0)
    model = dt.create_model(name, num_classes=10).eval()
    released = released_formulation(model)
    assert released.state_dict().keys() == model.state_dict().keys()
    kinds = {type(module).__name__ for module in released.modules()}
    assert {"PointwiseConvolution"} | ({"ExplicitWindowAttention"} if name == "dat_tiny" else set()) <= kinds
    assert "WindowAttention" not in kinds
    x = torch.randn(1, 3, 67, 98)
    with torch.no_grad():
        torch.testing.assert_close(released(x), model(x), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------ the command


def bench(*arguments):
    return main(["bench", "--rounds", "1", "--device", "cpu", *arguments])


def test_everything_is_measured_printed_and_written(tiny_cases, no_memory, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("dat_ref.cli.bench.SIDES", {"cpu": (3, 5)})
    monkeypatch.setattr(torch, "compile", lambda model: model)  # this would take minutes
    files = {kind: tmp_path / "made" / f"numbers.{kind}" for kind in ("json", "md", "png")}
    written = ["--json", str(files["json"]), "--markdown", str(files["md"]), "--plot", str(files["png"])]
    assert (
        bench("--shapes", "C", "dat_tiny", "curve", "--backends", "blockwise", "--compile", "dat_tiny", *written) == 0
    )
    printed = capsys.readouterr()
    found = json.loads(files["json"].read_text(encoding="utf-8"))
    core, model = found["comparisons"]
    assert [row["name"] for row in core["rows"]] == ["eager", "blockwise", "sdpa"]
    assert all(row["seconds"][kind] > 0 for row in core["rows"] for kind in (FORWARD, BACKWARD))
    assert core["rows"][0]["bytes"].keys() == {FORWARD, BACKWARD}
    plain, half = ([row["name"] for row in model["rows"] if row["dtype"] == name] for name in ("float32", "bfloat16"))
    assert plain == ["released", "blockwise", "optimized"]
    assert half == ["released", "released, compiled", "blockwise", "blockwise, compiled", "optimized"]
    assert sum(model["shares"]["float32"].values()) == pytest.approx(1)
    assert BACKWARD not in next(row for row in model["rows"] if row["name"] == "optimized")["seconds"]
    assert [each["side"] for each in found["resolutions"]] == [3, 5]
    assert "torch's attention, no bias" in printed.out
    assert "1.00×" in printed.out
    assert files["png"].read_bytes()[:4] == b"\x89PNG"
    again = tmp_path / "again.md"
    assert main(["bench", "--read", str(files["json"]), "--markdown", str(again)]) == 0
    assert again.read_text(encoding="utf-8") == files["md"].read_text(encoding="utf-8")
    assert capsys.readouterr().out == printed.out


def test_a_processor_without_packed_bfloat16_is_reported_in_its_row(tiny_cases, no_memory, monkeypatch, capsys):
    """AVX2 alone has no packed layers in bfloat16: the row says so, nothing warns, and float32 is measured."""
    monkeypatch.setattr("dat_ref.torch.inference._supports_packing", lambda dtype: dtype == torch.float32)
    assert bench("--shapes", "dat_tiny", "--backends", "blockwise", "--dtypes", "bfloat16") == 0
    printed = capsys.readouterr().out
    assert re.search(r"bfloat16 +optimized: not available on this processor( +–)+", printed)
    assert "dat_tiny, bfloat16: optimized: this CPU has no packed linear layers in torch.bfloat16." in printed
    assert re.search(r"float32 +optimized +\d", printed)


@pytest.mark.parametrize("numbers", sorted(DOCS.glob("performance/*.json")), ids=lambda path: path.name)
def test_the_tables_of_the_site_are_those_of_the_numbers(numbers):
    """`dat-ref bench --read docs/performance/cpu.json --markdown docs/performance/cpu.md` regenerates them."""
    found = json.loads(numbers.read_text(encoding="utf-8"))
    tables = numbers.with_suffix(".md").read_text(encoding="utf-8")
    assert tables == report.format_markdown(found)
    page = (DOCS / "performance.md").read_text(encoding="utf-8")
    for name in re.findall(r"\[start:(\w+)\]", tables):
        assert f'"docs/performance/{numbers.stem}.md:{name}"' in page or name == "machine"
    other = json.loads(numbers.read_text(encoding="utf-8"), parse_float=lambda number: 2 * float(number))
    assert tables != report.format_markdown(other)


class CrookedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out):
        return out.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 1.001


@pytest.mark.parametrize("mistake", [lambda out: out * 1.001, CrookedGradient.apply], ids=["output", "gradient"])
def test_disagreeing_implementations_are_not_timed(tiny_cases, no_memory, mistake, monkeypatch, capsys, tmp_path):
    """A wrong implementation stops the whole benchmark: no timings, no files, exit code 1."""

    def run(*arguments):
        return mistake(registry._BACKENDS["eager"].operations["deformable"].run(*arguments))

    operations = {"deformable": registry.Implementation(run=run)}
    crooked = replace(registry._BACKENDS["eager"], name="crooked", operations=operations)
    monkeypatch.setitem(registry._BACKENDS, "crooked", crooked)
    path = tmp_path / "numbers.json"
    assert bench("--shapes", "C", "--backends", "blockwise", "crooked", "--json", str(path)) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.search(r"crooked in float32 differs: .*no timing is reported", printed.err, re.DOTALL)
    assert not path.exists()


def test_runs_that_would_not_fit_are_skipped(tiny_cases, no_memory, monkeypatch, capsys):
    """If the released formulation does not fit, the blockwise one is the reference."""
    monkeypatch.setattr(measure, "free_bytes", lambda device: 1000)
    broken = {"deformable": registry.Implementation(run="not called")}
    monkeypatch.setitem(registry._BACKENDS, "eager", replace(registry._BACKENDS["eager"], operations=broken))
    assert bench("--shapes", "C", "--backends", "blockwise") == 0
    assert "C, float32: eager: needs about 0.0 GB, 0.0 GB are free." in capsys.readouterr().out


def test_first_calls_are_timed_in_fresh_processes(tiny_cases, monkeypatch, capsys):
    if "cpu" not in functional.backends():
        pytest.skip("needs the CPU kernels")
    took = iter([8.5, 0.25])
    monkeypatch.setattr("dat_ref.bench.run.fresh_process", lambda *arguments: next(took))
    assert bench("--shapes", "C", "--warm") == 0
    assert re.search(r"cpu +float32 +8\.5 +0\.2", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "Z"], "--shapes: expected some of A, A22, B"),
        (["--backends", "fast"], "--backends: expected some of eager"),
        (["--dtypes", "int8"], "--dtypes: expected one of float32, bfloat16, float16, got 'int8'"),
        (["--dtypes", "float64"], "--dtypes: expected one of float32, bfloat16, float16, got 'float64'"),
        (["--warm", "--dtypes", "int8"], "--dtypes: expected one of float32, bfloat16, float16, float64, got 'int8'"),
        (["--read", "no/such.json"], "no/such.json: No such file"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    assert bench(*arguments) == 2
    assert message in capsys.readouterr().err

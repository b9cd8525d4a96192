"""``dat-ref bench``: time and memory of every backend and model, next to the released formulation in the same run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import ConfigError
from ..state_files import atomic_write
from .output import HelpFormatter, make_folder, read_json

if TYPE_CHECKING:
    from ..bench.measure import Options

CURVE = "curve"
SIDES = {"cpu": (14, 20, 28, 40, 56, 80), "cuda": (14, 28, 56, 112, 168)}
MAX_THREADS = 1024


def add_parser(subparsers: Any) -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "bench",
        help="measure time and memory of every backend",
        description="Measure the attention core, neighborhood attention and whole models with every backend, next to "
        "the released formulation. All run in turns, in one process, on new random data. If outputs or gradients "
        "disagree, no timing is reported and the exit code is 1.",
        epilog="example:\n  dat-ref bench --shapes C dat_tiny --backends cpu --threads 2 --json bench.json",
        formatter_class=HelpFormatter,
    )
    what = parser.add_argument_group("cases")
    what.add_argument(
        "--shapes",
        nargs="+",
        metavar="NAME",
        help="A A22 B C L N1 N2 N3, dat_tiny, dat_pp_tiny, or curve for a sweep of map sizes (default: all; on a CPU "
        "without L)",
    )
    what.add_argument("--backends", nargs="+", metavar="NAME", help="backends to compare (default: all but matmul)")
    what.add_argument(
        "--dtypes",
        nargs="+",
        metavar="NAME",
        help="float32, bfloat16, float16, with --warm also float64 (default: float32; on CUDA bfloat16 and float32; "
        "for models both)",
    )
    what.add_argument(
        "--compile", nargs="+", default=[], metavar="MODEL", help="models to measure with torch.compile as well"
    )
    how = parser.add_argument_group("measurement")
    how.add_argument("--device", choices=("cpu", "cuda"), help="device (default: cuda if available)")
    how.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's)")
    how.add_argument(
        "--rounds",
        type=int,
        default=7,
        metavar="N",
        help="maximum number of rounds; the median is reported (default: 7)",
    )
    how.add_argument(
        "--warm", action="store_true", help="only compile the kernels and report the time of that, in seconds"
    )
    how.add_argument("--read", type=Path, metavar="FILE", help="report the results in FILE, written by --json, instead")
    output = parser.add_argument_group("output")
    output.add_argument("--json", type=Path, metavar="FILE", help="write all results as JSON")
    output.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables as Markdown")
    output.add_argument("--plot", type=Path, metavar="FILE", help="plot time and memory against map size")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command; return 1 if implementations disagree."""
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise ConfigError("torch is needed to measure it: pip install 'dat-ref[torch]'") from error
    from ..bench.agreement import Disagreement

    if options.plot:
        _require_matplotlib()
    try:
        results = _measure(options) if options.read is None else read_json(options.read, "--read")
        text, markdown = _format(results, options.read)
    except Disagreement as error:
        print(f"dat-ref bench: {error}\nno timing is reported of implementations that disagree", file=sys.stderr)
        return 1
    print(text)
    if options.markdown:
        make_folder(options.markdown.parent, "--markdown")
        with atomic_write(options.markdown) as partial:
            partial.write_text(markdown, encoding="utf-8")
    if options.plot:
        make_folder(options.plot.parent, "--plot")
        _draw(results, options.plot)
    return 0


def _format(results: Any, source: Path | None) -> tuple[str, str]:
    """Return results as text and as Markdown; `source` is the file that they were read from, None for a measurement."""
    from ..bench.report import format_markdown, format_text

    try:
        return format_text(results), format_markdown(results)
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        if source is None:
            raise
        raise ConfigError(
            f"--read: expected a file that `dat-ref bench --json` wrote, got {source} ({type(error).__name__}: {error})"
        ) from error


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    from ..bench import run as bench
    from ..bench.cases import cases

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device: there is no CUDA device")
    names = _select_shapes(options.shapes, device)
    if options.plot and CURVE not in names and not options.warm:
        raise ConfigError(f"--plot: needs the shape {CURVE!r}")
    measure_options = _measure_options(options, device)
    for path, option in ((options.json, "--json"), (options.markdown, "--markdown"), (options.plot, "--plot")):
        if path is not None:
            make_folder(path.parent, option)
    command = " ".join(["dat-ref", *sys.argv[1:]])
    selected_cases = cases(names, device)
    if options.warm:
        results = bench.empty_results(measure_options, command)
        results["first_use"] += bench.first_use(selected_cases, measure_options, _log)
        bench.save_results(results, options.json)
        return results
    sides = SIDES[device] if CURVE in names else ()
    return bench.benchmark(selected_cases, sides, measure_options, command=command, save=options.json, log=_log)


def _measure_options(options: argparse.Namespace, device: str) -> Options:
    """Return the options of the measurement after a check, and set torch's number of threads."""
    import torch

    from ..bench.cases import DTYPES
    from ..bench.measure import Options

    if options.rounds < 1:
        raise ConfigError(f"--rounds: expected 1 or more, got {options.rounds}")
    if options.threads is not None and not 1 <= options.threads <= MAX_THREADS:
        raise ConfigError(f"--threads: expected 1 to {MAX_THREADS}, got {options.threads}")
    backends = _select_backends(options.backends)
    allowed = ("float32", "bfloat16", "float16", *(["float64"] if options.warm else []))
    dtypes = _select_dtypes(options.dtypes or DTYPES[device], allowed)
    model_dtypes = _select_dtypes(options.dtypes or ("float32", "bfloat16"), allowed)
    models = _select_models(options.compile)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    return Options(
        device=device,
        threads=torch.get_num_threads(),
        rounds=options.rounds,
        backends=backends,
        dtypes=dtypes,
        model_backends=backends if options.backends else ("auto",),
        model_dtypes=model_dtypes,
        compiled=models,
    )


def _log(description: str) -> None:
    print(f"… {description}", file=sys.stderr, flush=True)


def _select_shapes(requested: Sequence[str] | None, device: str) -> tuple[str, ...]:
    from ..bench.cases import DEFAULT_SHAPES, SHAPES

    known = (*SHAPES, CURVE)
    for name in requested or ():
        if name not in known:
            raise ConfigError(f"--shapes: expected some of {', '.join(known)}, got {name!r}")
    return tuple(requested) if requested else (*DEFAULT_SHAPES[device], CURVE)


def _select_backends(requested: Sequence[str] | None) -> tuple[str, ...]:
    from ..torch import backends

    available = tuple(backends())
    for name in requested or ():
        if name not in available:
            raise ConfigError(f"--backends: expected some of {', '.join(available)}, got {name!r}")
    return tuple(requested) if requested else tuple(name for name in available if name != "matmul")


def _select_models(requested: Sequence[str]) -> tuple[str, ...]:
    known = ("dat_tiny", "dat_pp_tiny")
    for name in requested:
        if name not in known:
            raise ConfigError(f"--compile: expected some of {', '.join(known)}, got {name!r}")
    return tuple(requested)


def _select_dtypes(requested: Sequence[str], allowed: tuple[str, ...]) -> tuple[Any, ...]:
    import torch

    for name in requested:
        if name not in allowed:
            raise ConfigError(f"--dtypes: expected one of {', '.join(allowed)}, got {name!r}")
    return tuple(getattr(torch, name) for name in requested)


def _require_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError("matplotlib is needed to draw: pip install 'dat-ref[viz]'") from error


def _draw(results: dict[str, Any], path: Path) -> None:
    from ..viz.speed import draw_speed, save

    if not results["resolutions"]:
        raise ConfigError(f"--plot: needs the shape {CURVE!r}")
    with atomic_write(path, suffix=path.suffix) as partial:
        save(draw_speed(results), partial)

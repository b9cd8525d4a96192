"""``dat-ref bench``: how fast each backend and each model is, beside the released formulation in the same run."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import ConfigError
from .explain import make_folder

CURVE = "curve"
SIDES = {"cpu": (14, 20, 28, 40, 56, 80), "cuda": (14, 28, 56, 112, 168)}


def add_parser(subparsers: Any) -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "bench",
        help="time and memory of every backend, side by side",
        description="Time the core, neighborhood attention and whole models by every backend beside the formulation of "
        "the released code, in turns and in one run, on fresh random data. Nothing is told of a run in which outputs "
        "or gradients disagree: it exits with 1.",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where (cuda if there is one)")
    parser.add_argument("--threads", type=int, metavar="N", help="threads on a CPU (torch's own choice)")
    parser.add_argument("--shapes", nargs="+", metavar="NAME", help="A A22 B C L N1 N2 N3, a model, or curve")
    parser.add_argument(
        "--backends",
        nargs="+",
        metavar="NAME",
        help="what to compare (all that there are but matmul, which is for exporters)",
    )
    parser.add_argument("--dtypes", nargs="+", metavar="NAME", help="float32, bfloat16, float16")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="at most; the median counts (7)")
    parser.add_argument("--compile", nargs="+", default=[], metavar="MODEL", help="models to run compiled as well")
    parser.add_argument("--warm", action="store_true", help="only compile what backends compile, and say how long")
    parser.add_argument("--read", type=Path, metavar="FILE", help="take the numbers of an earlier --json instead")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables of the site")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw time and memory against resolution")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command; 1 if something computes something else."""
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise ConfigError("torch is needed to measure it: pip install 'dat-ref[torch]'") from error
    from ..bench.agreement import Disagreement
    from ..bench.report import format_markdown, format_text

    for path in (options.json, options.markdown, options.plot):
        if path is not None:
            make_folder(path.parent)
    try:
        results = json.loads(options.read.read_text(encoding="utf-8")) if options.read else _measure(options)
    except Disagreement as error:
        print(f"dat-ref bench: {error}\nno speed is told of what computes something else", file=sys.stderr)
        return 1
    print(format_text(results))
    if options.markdown:
        options.markdown.write_text(format_markdown(results), encoding="utf-8")
    if options.plot:
        _draw(results, options.plot)
    return 0


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    from ..bench import run as bench
    from ..bench.cases import DTYPES, cases
    from ..bench.measure import Options

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device: there is no CUDA device here")
    if options.threads:
        torch.set_num_threads(options.threads)
    names = _select_shapes(options.shapes, device)
    measure_options = Options(
        device=device,
        threads=torch.get_num_threads(),
        rounds=options.rounds,
        backends=_select_backends(options.backends),
        dtypes=_select_dtypes(options.dtypes or DTYPES[device]),
        model_backends=_select_backends(options.backends) if options.backends else ("auto",),
        model_dtypes=_select_dtypes(options.dtypes or ("float32", "bfloat16")),
        compiled=tuple(options.compile),
    )
    command = " ".join(["dat-ref", *sys.argv[1:]])
    selected_cases = cases(names, device)
    if options.warm:
        results = bench.empty_results(measure_options, command)
        results["first_use"] += bench.first_use(selected_cases, measure_options, _log)
        bench.save_results(results, options.json)
        return results
    sides = SIDES[device] if CURVE in names else ()
    return bench.benchmark(selected_cases, sides, measure_options, command=command, save=options.json, log=_log)


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


def _select_dtypes(requested: Sequence[str]) -> tuple[Any, ...]:
    import torch

    for name in requested:
        if name not in ("float32", "bfloat16", "float16"):
            raise ConfigError(f"--dtypes: expected float32, bfloat16 or float16, got {name!r}")
    return tuple(getattr(torch, name) for name in requested)


def _draw(results: dict[str, Any], path: Path) -> None:
    try:
        from ..viz.speed import draw_speed, save
    except ImportError as error:
        raise ConfigError("matplotlib is needed to draw: pip install 'dat-ref[viz]'") from error
    if not results["resolutions"]:
        raise ConfigError(f"--plot: needs the shape {CURVE!r}")
    save(draw_speed(results), path)

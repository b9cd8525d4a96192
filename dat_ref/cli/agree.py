"""``dat-ref agree``: compare NumPy and torch on a photograph, stage by stage, in three precisions.

The reference is the NumPy implementation in float64. The error of torch must stay within a budget:

- float64: 1e-9 of the largest value of the map (for points: of its longer side).
- float32: `FLOAT32_FACTOR` times the error of the NumPy implementation in float32, see `float32_yardstick`.
- bfloat16 (autocast): `BFLOAT16_FACTOR` times the error of the NumPy implementation in float64 with image, weights and
  the maps between blocks rounded to bfloat16. (autocast also rounds inside a block.) Points must be in float32.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from .._checks import Array, ConfigError, Tree
from ..backbone import DAT, embed, embed_image
from ..block import block
from ..config import DATConfig, DeformableAttentionConfig
from ..layer import LayerTrace
from ..params import map_tree
from ..presets import config as preset
from .explanation import check_request
from .output import HelpFormatter
from .photo import add_photo_arguments, input_size, load_photo, normalise, resize
from .weights import select_weights

FLOAT64_BUDGET = 1e-9
FLOAT32_FACTOR = 4.0
FLOAT32_RUNS = 3
FLOAT32_EPS = float(np.finfo(np.float32).eps)
BFLOAT16_FACTOR = 8.0
PRECISIONS = ("float64", "float32", "bfloat16")

# Maximum error by quantity ("stage 3 points", "logits"): in pixels for points, else relative to the largest value.
Errors = dict[str, float]


def add_parser(subparsers: Any) -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "agree",
        help="compare NumPy and torch on a photograph",
        description="Run a backbone on a photograph in NumPy and in torch, and compare the maps of every stage, the "
        "sampling points and the logits in float64, float32 and bfloat16. Exit code 0 if they agree, 1 if not.",
        epilog="example:\n  dat-ref agree photo.jpg --model dat_pp_tiny --size 256",
        formatter_class=HelpFormatter,
    )
    inputs: Any = parser.add_argument_group("image and model")
    add_photo_arguments(inputs)
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print JSON (default: a table)")
    parser.set_defaults(run=run)


# ------------------------------------------------------------------------------------------------ one pass


@dataclass(frozen=True)
class ForwardResult:
    """Results of one forward pass that are compared."""

    maps: list[Array]  # one for each stage
    points: dict[int, list[Array]]  # stage index → points of each deformable block, in pixels of its map
    logits: Array
    seconds: float
    point_dtype: str


def run_numpy(
    config: DATConfig, params: Tree, image: Array, round_map: Callable[[Array], Array] = np.asarray
) -> ForwardResult:
    """Run the NumPy implementation. `round_map` is applied to the input of each block, downsampling and the head."""
    maps: list[Array] = []
    points: dict[int, list[Array]] = {}
    start = time.perf_counter()
    y, _ = embed_image(image, params["patch_embedding"])
    for stage, blocks in enumerate(config.stages):
        if stage:
            y, _ = embed(round_map(y), **params["downsamples"][stage - 1])
        for block_config, block_params in zip(blocks, params["stages"][stage]["blocks"], strict=True):
            y, trace = block(round_map(y), block_params, block_config)
            if isinstance(trace.attention, LayerTrace):
                points.setdefault(stage, []).append(trace.attention.points_px)
        maps.append(y)
    model = DAT(config, params)
    logits = model.classify(model.pool(round_map(y)))
    seconds = time.perf_counter() - start
    return ForwardResult(maps, points, logits, seconds, _point_dtype(points))


def run_torch(config: DATConfig, params: Tree, image: Array, precision: str) -> ForwardResult:
    """Run the torch module: maps and logits from a plain forward pass, points from a traced one."""
    import torch

    from ..torch import DAT as Module

    model = Module(config).to(torch.float64 if precision == "float64" else torch.float32).eval()
    model.load_numpy(params)
    x = torch.from_numpy(image).to(next(model.parameters()).dtype)
    points: dict[int, list[Array]] = {}
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        start = time.perf_counter()
        normed, maps = model.forward_intermediates(x)
        logits = model.forward_head(normed)
        seconds = time.perf_counter() - start
        for step in model.walk(x):
            if isinstance(step.trace.attention, LayerTrace):
                traced: Any = step.trace.attention.points_px
                points.setdefault(step.stage, []).append(traced.numpy())
    float64_arrays = [each.double().numpy() for each in (*maps, logits)]
    return ForwardResult(float64_arrays[:-1], points, float64_arrays[-1], seconds, _point_dtype(points))


def _point_dtype(points: dict[int, list[Array]]) -> str:
    return "+".join(sorted({str(each.dtype) for blocks in points.values() for each in blocks}))


# ------------------------------------------------------------------------------------------------ comparison


def compute_errors(actual: ForwardResult, reference: ForwardResult) -> Errors:
    """Return the maximum error of every quantity."""
    max_errors: Errors = {}
    for stage, (ours, expected) in enumerate(zip(actual.maps, reference.maps, strict=True)):
        max_errors[f"stage {stage + 1} map"] = _max_error(ours, expected) / float(np.abs(expected).max())
        if stage in reference.points:
            pairs = zip(actual.points[stage], reference.points[stage], strict=True)
            max_errors[f"stage {stage + 1} points"] = float(np.max([_max_error(a, b) for a, b in pairs]))
    max_errors["logits"] = _max_error(actual.logits, reference.logits) / float(np.abs(reference.logits).max())
    return max_errors


def _max_error(actual: Array, reference: Array) -> float:
    return float(np.abs(actual.astype(np.float64) - reference).max())


@dataclass(frozen=True)
class Comparison:
    """Comparison in one precision: errors, error budgets, run times, and the dtype of the points."""

    precision: str
    errors: Errors
    allowed: Errors
    numpy_seconds: float
    torch_seconds: float
    point_dtype: str

    @property
    def excess(self) -> list[str]:
        """Quantities whose error exceeds the budget or is NaN."""
        over_budget = [name for name, error in self.errors.items() if not error <= self.allowed[name]]
        low_precision_points = self.point_dtype not in ("float32", "float64")
        return over_budget + ([f"points are computed in {self.point_dtype}"] if low_precision_points else [])


def compare(config: DATConfig, params: Tree, image: Array) -> list[Comparison]:
    """Compare NumPy and torch in each precision.

    Args:
        config: configuration of the backbone.
        params: parameter tree.
        image: (1, C, H, W), normalized.
    """
    exact = _cast(params, np.float64)
    reference = run_numpy(config, exact, image.astype(np.float64))
    float32_seconds, float32_errors = float32_yardstick(config, params, image, reference)
    bfloat16_params = map_tree(round_to_bfloat16, exact)
    bfloat16_result = run_numpy(config, bfloat16_params, round_to_bfloat16(image), round_to_bfloat16)
    allowed = {
        "float64": _scale_errors(_largest_values(reference), FLOAT64_BUDGET),
        "float32": _scale_errors(float32_errors, FLOAT32_FACTOR),
        "bfloat16": _scale_errors(compute_errors(bfloat16_result, reference), BFLOAT16_FACTOR),
    }
    numpy_seconds = {"float64": reference.seconds, "float32": float32_seconds, "bfloat16": reference.seconds}
    comparisons = []
    for precision in PRECISIONS:
        torch_result = run_torch(config, exact, image, precision)
        comparisons.append(
            Comparison(
                precision=precision,
                errors=compute_errors(torch_result, reference),
                allowed=allowed[precision],
                numpy_seconds=numpy_seconds[precision],
                torch_seconds=torch_result.seconds,
                point_dtype=torch_result.point_dtype,
            )
        )
    return comparisons


def float32_yardstick(config: DATConfig, params: Tree, image: Array, reference: ForwardResult) -> tuple[float, Errors]:
    """Return the seconds of one float32 run of the spec, and the error that the spec makes in float32, by quantity.

    One run gives one sample of the error, and the maximum of few elements varies much between samples. The first stage
    of DAT++ has 6 points on an image of 64 × 96: their largest error changes by a factor of 2.5 with the number of BLAS
    threads, because the order of the sums changes. Two terms make the budget independent of such luck:

    - The error is the maximum over `FLOAT32_RUNS` runs. All but the first perturb image and parameters at random by up
      to half a rounding. The roundings of all later operations then differ, and each layer amplifies them as it
      amplifies the roundings of another implementation.
    - One rounding of the largest value is added. The last operation, for example the conversion of points to pixels,
      makes that error even if its input is exact.
    """
    errors: list[Errors] = []
    seconds: list[float] = []
    for run_index in range(FLOAT32_RUNS):
        to_float32 = partial(_to_float32, rng=np.random.default_rng(run_index) if run_index else None)
        result = run_numpy(config, map_tree(to_float32, params), to_float32(image))
        errors.append(compute_errors(result, reference))
        seconds.append(result.seconds)
    largest = _largest_values(reference)
    return seconds[0], {name: max(each[name] for each in errors) + FLOAT32_EPS * largest[name] for name in errors[0]}


def _to_float32(array: Array, rng: np.random.Generator | None) -> Array:
    """Round to float32, after a relative perturbation of at most ε/2 if there is a generator."""
    if rng is not None:
        array = array * (1 + FLOAT32_EPS * rng.uniform(-0.5, 0.5, array.shape))
    return array.astype(np.float32)


def _largest_values(reference: ForwardResult) -> dict[str, float]:
    """Return the largest value of each quantity, in its unit: the map's longer side in pixels for points, else 1."""
    sides = {f"stage {stage + 1} points": max(reference.maps[stage].shape[2:]) for stage in reference.points}
    return {name: float(sides.get(name, 1)) for name in compute_errors(reference, reference)}


def round_to_bfloat16(array: Array) -> Array:
    """Round values to the nearest bfloat16 (ties to even) and return them as float64.

    >>> round_to_bfloat16(np.array([1.0, 1.003, 1.005]))
    array([1.       , 1.       , 1.0078125])
    """
    bits = np.asarray(array, dtype=np.float32).view(np.uint32)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return bits.view(np.float32).astype(np.float64)


def _cast(params: Tree, dtype: Any) -> Tree:
    return map_tree(lambda leaf: leaf.astype(dtype), params)


def _scale_errors(errors: Errors, factor: float) -> Errors:
    return {name: factor * error for name, error in errors.items()}


# ------------------------------------------------------------------------------------------------ the command


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    _require_torch()
    photo = load_photo(options.photo)
    height, width = photo.shape[:2]
    image_size = input_size((height, width), options.size)
    config = preset(options.model)
    check_request(config, _first_deformable_stage(config), image_size, (height, width), [])
    config, params, weights = select_weights(options)
    image = normalise(resize(photo, image_size))
    comparisons = compare(config, params, image)
    agrees = not any(comparison.excess for comparison in comparisons)

    name = "the photograph that ships" if options.photo is None else str(options.photo)
    if options.json:
        print(json.dumps(_to_json(comparisons, options.model, weights, name, image_size), indent=2))
    else:
        print(f"{options.model} on {name}, {height}×{width} resized to {image_size[0]}×{image_size[1]}")
        print(f"{weights}\n\n{table(comparisons)}\n\n{verdict(comparisons)}")
    return 0 if agrees else 1


def _require_torch() -> None:
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise ConfigError("torch is needed to compare with it: pip install 'dat-ref[torch]'") from error


def _first_deformable_stage(config: DATConfig) -> int:
    """Return the number of the first stage with deformable attention, counted from 1."""
    kinds = [{type(block.attention) for block in blocks} for blocks in config.stages]
    return next(stage for stage, stage_kinds in enumerate(kinds, start=1) if DeformableAttentionConfig in stage_kinds)


def _to_json(
    comparisons: list[Comparison], model: str, weights: str, photograph: str, image_size: tuple[int, int]
) -> dict[str, Any]:
    return {
        "model": model,
        "weights": weights,
        "photograph": photograph,
        "image_size": list(image_size),
        "agrees": not any(comparison.excess for comparison in comparisons),
        "precisions": [{**vars(comparison), "excess": comparison.excess} for comparison in comparisons],
    }


def table(comparisons: list[Comparison]) -> str:
    """Return errors and budgets as text: a row for each quantity, two columns for each precision."""
    title_width, cell_width = 16, 9

    def line(title: str, cells: Callable[[Comparison], tuple[str, str]]) -> str:
        parts = [f"{a:>{cell_width}} {b:>{cell_width}}" for a, b in map(cells, comparisons)]
        return (f"{title:<{title_width}}" + "   ".join(parts)).rstrip()

    def error_cells(name: str) -> Callable[[Comparison], tuple[str, str]]:
        return lambda each: (f"{each.errors[name]:.1e}", f"{each.allowed[name]:.1e}")

    lines = [
        line("", lambda each: (each.precision, "")),
        line("", lambda _: ("error", "allowed")),
        *(line(name, error_cells(name)) for name in comparisons[0].errors),
        line("", lambda _: ("NumPy", "torch")),
        line("seconds", lambda each: (f"{each.numpy_seconds:.1f}", f"{each.torch_seconds:.1f}")),
    ]
    notes = "maps and logits: relative to the largest value; points: pixels of the stage's map, over all its blocks"
    return "\n".join(lines) + f"\n\n{notes}"


def verdict(comparisons: list[Comparison]) -> str:
    """Return a line with the result for each precision."""
    lines = []
    for each in comparisons:
        outcome = "agrees" if not each.excess else f"DOES NOT AGREE: {', '.join(each.excess)}"
        lines.append(f"{each.precision}: {outcome} (points in {each.point_dtype})")
    return "\n".join(lines)

"""How long the backends take, as ratios to the releases' formulation, measured side by side in one process.

    python benchmarks/bench_backends.py
    python benchmarks/bench_backends.py --models dat_pp_small --sizes 384 --batches 2 --backends dense matmul --json

A round times every contender once, in an order that turns by one each round; a ratio is that of the medians. Nothing is
printed before all contenders have given the same logits.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Iterator

import torch

import dat_ref.torch as dt

RELEASED = "released"  # the name of what the others are compared with
AGREEMENT = 1e-4  # of the largest logit, float32


def contenders(name: str, backends: list[str]) -> dict[str, dt.DAT]:
    """Return one model a backend, all with the same weights; the first computes as the releases do."""
    torch.manual_seed(0)
    first = dt.create_model(name, backend="eager", sampler="grid_sample").eval()
    models = {RELEASED: first}
    for backend in backends:
        models[backend] = dt.create_model(name, backend=backend).eval()
        models[backend].load_state_dict(first.state_dict())
    return models


def check_agreement(models: dict[str, dt.DAT], x: torch.Tensor) -> None:
    """Raise unless all give the same logits."""
    expected = models[RELEASED](x)
    for backend, model in models.items():
        error = float((model(x) - expected).abs().max() / expected.abs().max())
        if not error <= AGREEMENT:
            raise SystemExit(f"{backend}: differs by {error:.1e} of the largest logit; there is nothing to compare")


def medians(models: dict[str, dt.DAT], x: torch.Tensor, rounds: int) -> dict[str, float]:
    """Return the median seconds of each."""
    names = list(models)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        for place in range(len(names)):
            name = names[(turn + place) % len(names)]
            start = time.perf_counter()
            models[name](x)
            if turn:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(each) for name, each in seconds.items()}


def measure(options: argparse.Namespace) -> Iterator[dict[str, object]]:
    """Yield one row a model, size and batch."""
    for name in options.models:
        models = contenders(name, options.backends)
        for size in options.sizes:
            for batch in options.batches:
                x = torch.randn(batch, 3, size, size)
                check_agreement(models, x)
                seconds = medians(models, x, options.rounds)
                ratios = {each: round(seconds[each] / seconds[RELEASED], 3) for each in options.backends}
                yield {
                    "model": name,
                    "size": size,
                    "batch": batch,
                    "released_ms": round(1000 * seconds[RELEASED], 1),
                    "ratios": ratios,
                }


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=["dat_tiny", "dat_pp_tiny"], choices=dt.list_models())
    parser.add_argument("--backends", nargs="+", default=["auto"], help="what to compare (default: auto)")
    parser.add_argument("--sizes", nargs="+", type=int, default=[224])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with torch.inference_mode():
        rows = list(measure(options))
    if options.json:
        where = {"torch": torch.__version__, "machine": platform.machine(), "threads": options.threads}
        print(json.dumps({**where, "rounds": options.rounds, "rows": rows}, indent=2))
        return
    print("time relative to the releases' formulation (less is faster)")
    for row in rows:
        ratios = "  ".join(f"{name} {ratio:.2f}" for name, ratio in row["ratios"].items())  # type: ignore[attr-defined]
        what = f"{row['model']:12} {row['size']}²  batch {row['batch']:2}"
        print(f"{what}  released {row['released_ms']:8.1f} ms  {ratios}")


if __name__ == "__main__":
    main()

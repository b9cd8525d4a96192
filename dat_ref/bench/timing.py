"""Seconds, side by side: contenders take turns, so that whatever else the machine does falls on all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch

K = TypeVar("K")
LEAST_SAMPLE = 0.005  # seconds; shorter calls are repeated within a sample
LEAST_ROUNDS = 3
LONG_RUN = 20.0  # seconds that the rounds of one comparison may take, if that leaves LEAST_ROUNDS of them


def medians(runs: Mapping[K, Callable[[], object]], rounds: int, device: str) -> tuple[dict[K, float], int]:
    """Return the median seconds a call of each, and how many rounds there were.

    A round times every contender once, in an order that turns by one each round. All have run before.

    Args:
        runs: what to call, by name.
        rounds: at most; fewer, but 3, where they would take long.
        device: ``"cpu"`` or ``"cuda"``, which is waited for.
    """
    first = {name: _seconds(run, 1, device) for name, run in runs.items()}  # the first round only measures how many
    repeats = {name: max(1, round(LEAST_SAMPLE / max(seconds, 1e-6))) for name, seconds in first.items()}
    once = sum(seconds * repeats[name] for name, seconds in first.items())
    rounds = max(min(rounds, int(LONG_RUN / max(once, 1e-6))), min(LEAST_ROUNDS, rounds))
    names = list(runs)
    samples: dict[K, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for place in range(len(names)):
            name = names[(turn + place) % len(names)]
            samples[name].append(_seconds(runs[name], repeats[name], device))
    return {name: statistics.median(each) for name, each in samples.items()}, rounds


def _seconds(run: Callable[[], object], repeats: int, device: str) -> float:
    _wait(device)
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    _wait(device)
    return (time.perf_counter() - start) / repeats


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()

"""Timing: implementations take turns, so that other load on the machine affects all of them equally."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch

K = TypeVar("K")
MIN_SAMPLE_SECONDS = 0.005  # shorter calls are repeated within a sample
MIN_ROUNDS = 3
MAX_ROUNDS_SECONDS = 20.0  # limit for the rounds of one comparison, but at least MIN_ROUNDS are run


def median_seconds(runs: Mapping[K, Callable[[], object]], rounds: int, device: str) -> tuple[dict[K, float], int]:
    """Return the median time of each call in seconds, and the number of rounds.

    A round times every implementation once. Each round starts with the next implementation. All must have run before.

    Args:
        runs: functions to time, by name.
        rounds: maximum number of rounds. Slow calls get fewer, but at least `MIN_ROUNDS`.
        device: ``"cpu"`` or ``"cuda"``; CUDA is synchronized before and after each sample.
    """
    first = {name: _seconds(run, 1, device) for name, run in runs.items()}  # only to choose the repetitions
    repeats = {name: max(1, round(MIN_SAMPLE_SECONDS / max(seconds, 1e-6))) for name, seconds in first.items()}
    round_seconds = sum(seconds * repeats[name] for name, seconds in first.items())
    rounds = max(min(rounds, int(MAX_ROUNDS_SECONDS / max(round_seconds, 1e-6))), min(MIN_ROUNDS, rounds))
    names = list(runs)
    samples: dict[K, list[float]] = {name: [] for name in names}
    for round_index in range(rounds):
        for index in range(len(names)):
            name = names[(round_index + index) % len(names)]
            samples[name].append(_seconds(runs[name], repeats[name], device))
    return {name: statistics.median(times) for name, times in samples.items()}, rounds


def _seconds(run: Callable[[], object], repeats: int, device: str) -> float:
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    _synchronize(device)
    return (time.perf_counter() - start) / repeats


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()

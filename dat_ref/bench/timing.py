"""Seconds, side by side: implementations take turns, so that other load on the machine falls on all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch

K = TypeVar("K")
MIN_SAMPLE_SECONDS = 0.005  # seconds; shorter calls are repeated within a sample
MIN_ROUNDS = 3
MAX_ROUNDS_SECONDS = 20.0  # seconds that the rounds of one comparison may take, if that leaves LEAST_ROUNDS of them


def median_seconds(runs: Mapping[K, Callable[[], object]], rounds: int, device: str) -> tuple[dict[K, float], int]:
    """Return the median seconds a call of each, and how many rounds there were.

    A round times every implementation once, in an order that turns by one each round. All have run before.

    Args:
        runs: what to call, by name.
        rounds: at most; fewer, but 3, where they would take long.
        device: ``"cpu"`` or ``"cuda"``, which is waited for.
    """
    first = {name: _seconds(run, 1, device) for name, run in runs.items()}  # the first round only measures how many
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

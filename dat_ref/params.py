"""Parameter trees: nested dicts and lists of arrays, with their names and checks.

A tree of *shapes* has tuples instead of arrays. Every model builds one from its configuration, to describe its
parameters. Leaves are named ``weight``, ``bias`` or ``table``, so that a subtree can be passed as keyword arguments:
``linear(x, **params["query"])``. The flattened names (``stages.2.blocks.1.attention.query.weight``) equal the names in
the torch modules' state dicts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ._checks import CheckpointError, Tree


def flatten(tree: Tree, prefix: str = "") -> dict[str, Any]:
    """Return the leaves of a tree by their dotted names.

    >>> flatten({"query": {"weight": 1}, "blocks": [{"bias": 2}]})
    {'query.weight': 1, 'blocks.0.bias': 2}
    """
    if isinstance(tree, Mapping):
        branches = list(tree.items())
    elif isinstance(tree, list):
        branches = list(enumerate(tree))
    else:
        return {prefix[:-1]: tree}
    leaves: dict[str, Any] = {}
    for name, branch in branches:
        leaves.update(flatten(branch, f"{prefix}{name}."))
    return leaves


def unflatten(leaves: Mapping[str, Any]) -> Tree:
    """Return the tree of dotted names. A level with only numbers as names becomes a list.

    >>> unflatten({"query.weight": 1, "blocks.0.bias": 2})
    {'query': {'weight': 1}, 'blocks': [{'bias': 2}]}
    """
    if set(leaves) == {""}:
        return leaves[""]
    branches: dict[str, dict[str, Any]] = {}
    for name, leaf in leaves.items():
        head, _, rest = name.partition(".")
        branches.setdefault(head, {})[rest] = leaf
    tree = {head: unflatten(branch) for head, branch in branches.items()}
    if tree and all(head.isdigit() for head in tree):
        return [tree[str(index)] for index in range(len(tree))]
    return tree


def map_tree(function: Callable[..., Any], *trees: Tree) -> Tree:
    """Return the tree of ``function(leaf, ...)`` over trees of the same structure."""
    first = trees[0]
    if isinstance(first, Mapping):
        return {name: map_tree(function, *(tree[name] for tree in trees)) for name in first}
    if isinstance(first, list):
        return [map_tree(function, *branches) for branches in zip(*trees, strict=True)]
    return function(*trees)


def count(tree: Tree) -> int:
    """Return the number of parameters in a tree of arrays or of shapes."""
    return sum(int(np.prod(getattr(leaf, "shape", leaf))) for leaf in flatten(tree).values())


def mismatch_report(expected: Mapping[str, tuple[int, ...]], actual: Mapping[str, tuple[int, ...]]) -> str:
    """Return a report of missing, unexpected and mis-shaped names in `actual`, or ``""``."""
    lines = [f"missing: {name} {tuple(shape)}" for name, shape in expected.items() if name not in actual]
    lines += [f"unexpected: {name} {tuple(shape)}" for name, shape in actual.items() if name not in expected]
    lines += [
        f"mis-shaped: {name}: expected {tuple(shape)}, got {tuple(actual[name])}"
        for name, shape in expected.items()
        if name in actual and tuple(actual[name]) != tuple(shape)
    ]
    return "\n  ".join(lines[:20] + ([f"… and {len(lines) - 20} more"] if len(lines) > 20 else []))


def check_params(params: Tree, shapes: Tree) -> Tree:
    """Return `params` as arrays, after a check of names, shapes and values.

    Raises:
        CheckpointError: with a report of missing, unexpected and mis-shaped names, or the name of an array that is not
            floating point or not finite.
    """
    expected = flatten(shapes)
    arrays = {name: np.asarray(leaf) for name, leaf in flatten(params).items()}
    problems = mismatch_report(expected, {name: leaf.shape for name, leaf in arrays.items()})
    if problems:
        raise CheckpointError(f"params: expected the parameters of this configuration\n  {problems}")
    for name, leaf in arrays.items():
        if not np.issubdtype(leaf.dtype, np.floating):
            raise CheckpointError(f"params: expected floating-point numbers, got {leaf.dtype} in {name}")
        if not np.isfinite(leaf).all():
            nonfinite = int((~np.isfinite(leaf)).sum())
            raise CheckpointError(
                f"params: expected finite numbers, got {nonfinite} NaN or inf of {leaf.size} in {name}"
            )
    return map_tree(np.asarray, params)

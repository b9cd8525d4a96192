"""Text drawings of counter-examples: a small map with points, or positions along an axis."""

from __future__ import annotations

import numpy as np

from .._checks import Array

MAX_SIDE = 9  # larger maps are not drawn
CELL_WIDTH, ROW_HEIGHT = 6, 2  # characters per pixel, lines per pixel


def draw_map(pixels: Array, points: Array) -> str:
    """Draw a map (H, W) with its pixel values, points (P, 2) in pixels as letters, and one pixel around the map.

    >>> print(draw_map(np.array([[1.0, 2.0]]), np.array([[0.0, 1.5]])))
                    x=0   x=1
           y=0        1     2  a
    a: (y, x) = (0, 1.5)
    """
    height, width = pixels.shape
    points = np.round(points, 9) + 0.0  # not -0
    legend = [f"{letter(p)}: (y, x) = ({y:.12g}, {x:.12g})" for p, (y, x) in enumerate(points.tolist())]
    if max(height, width) > MAX_SIDE:
        return "\n".join([f"map of {height} × {width}", *legend])
    lines = [[" "] * (CELL_WIDTH * (width + 4)) for _ in range(ROW_HEIGHT * (height + 1) + 1)]

    def write(row: float, column: float, text: str) -> None:
        """Write a text that ends at position (row, column)."""
        line, end = round(ROW_HEIGHT * (row + 1)), round(CELL_WIDTH * (column + 3)) + 1
        if 0 <= line < len(lines) and len(text) <= end <= len(lines[0]):
            lines[line][end - len(text) : end] = text

    for i, j in np.ndindex(height, width):
        write(i, j, f"{pixels[i, j]:.4g}")
    for i in range(height):
        write(i, -1.5, f"y={i}")
    for p, (y, x) in enumerate(points.tolist()):
        if np.isfinite([y, x]).all():
            shift = 1 / CELL_WIDTH if y == round(y) and x == round(x) else 0  # next to the pixel's value
            write(y, x + shift, letter(p))
    header = "".join(f"{f'x={j}':>{CELL_WIDTH}}" for j in range(width))
    rows = [line for line in ("".join(line).rstrip() for line in lines) if line]  # without empty lines
    return "\n".join([" " * (2 * CELL_WIDTH + 1) + header, *rows, *legend])


def letter(index: int) -> str:
    """Return the name of a point: a, b, c … z, then its index."""
    return chr(ord("a") + index) if index < 26 else str(index)


def draw_axis(name: str, length: int, expected: Array, got: Array) -> str:
    """Draw positions along an axis of pixels: a ruler, expected positions (o), actual ones (x), and both (*).

    >>> print(draw_axis("rows", 3, np.array([0.0, 2.0]), np.array([0.5, 2.5])))
    rows     0     1     2
             o  x        o  x
             expected 0 2, got 0.5 2.5
    """
    margin, label = 3, max(len(name) + 1, 6)
    line = [" "] * (label + margin + CELL_WIDTH * (length + 1))

    def column_of(value: float) -> int:
        return label + margin + round(CELL_WIDTH * value)

    ruler = list(line)
    for pixel in range(length):
        ruler[column_of(pixel)] = str(pixel)[-1]
    for values, mark in ((expected, "o"), (got, "x")):
        for value in values[np.isfinite(values)]:
            column = column_of(float(np.clip(value, -0.5 - margin / CELL_WIDTH, length)))
            if 0 <= column < len(line):
                line[column] = "*" if line[column] == "o" and mark == "x" else mark
    ruler[: len(name)] = name
    texts = " ".join(f"{value:.4g}" for value in expected), " ".join(f"{value:.4g}" for value in got)
    caption = f"{'':{label + margin}}expected {texts[0]}, got {texts[1]}"
    return "\n".join(["".join(ruler).rstrip(), "".join(line).rstrip(), caption])


def describe_largest_error(expected: Array, got: Array) -> str:
    """Describe the largest difference of two arrays: ``at [0, 0, 2]: expected 1, got 0.25``."""
    if expected.shape != got.shape:
        return f"expected shape {expected.shape}, got {got.shape}"
    if not expected.size:
        return ""
    error = np.nan_to_num(np.abs(got - expected), nan=np.inf)
    index = np.unravel_index(int(error.argmax()), error.shape)
    location = ", ".join(str(int(i)) for i in index)
    for digits in (9, 12, 17):  # as many as needed to distinguish them
        texts = f"{expected[index]:.{digits}g}", f"{got[index]:.{digits}g}"
        if texts[0] != texts[1]:
            break
    return f"at [{location}]: expected {texts[0]}, got {texts[1]}"

"""A picture painted from points by the spec: queries compare colors by dot products, nearness is a bias table."""

import numpy as np

from dat_ref import Convention
from dat_ref.ops.attention import deformable_attention, deformable_attention_vjp
from dat_ref.ops.grid import from_pixels, pixels_per_unit
from dat_ref.ops.sampling import bilinear_sample, bilinear_sample_vjp


class Painting:
    """Map of bytes (H, W, 3), sharpness of the comparison and standard deviation of the bias, in pixels."""

    def __init__(self, pixels, sharpness, near):
        self.bytes, self.sharpness, self.near = np.asarray(pixels), sharpness, near
        self.size = self.bytes.shape[:2]
        colors = self.bytes.transpose(2, 0, 1) / 255 - 0.5
        self.x = np.concatenate([colors, np.square(colors).sum(0, keepdims=True)])[None]  # (1, 4, H, W)
        dy, dx = np.meshgrid(*(np.arange(1 - length, length) for length in self.size), indexing="ij")
        self.table = -(dy**2 + dx**2)[None] / (2 * near**2)
        flat = colors.reshape(3, -1).T
        queries = np.concatenate([2 * sharpness * flat, np.full((len(flat), 1), -sharpness)], axis=1)
        self.queries = 2 * queries[None, None]  # (1, 1, H·W, 4); the spec divides logits by √4
        self.options = {"query_size": self.size, "convention": Convention.CELL_CENTER}

    def paint(self, points_px):
        """Return the inputs of the core and what the pixels become, (1, 1, H·W, 4), from points (N, 2)."""
        read = bilinear_sample(self.x, points_px[None]).swapaxes(1, 2)[:, None]
        points = from_pixels(points_px[None, None], self.size, Convention.CELL_CENTER)
        inputs = (self.queries, read, read, points, self.table)
        return inputs, deformable_attention(*inputs, **self.options)

    def errors(self, painted):
        """Return the squared error of each pixel's color, (H·W,)."""
        return np.square(self._difference(painted)).sum(1)

    def error(self, points_px):
        """Return the mean squared error of the painting from points (N, 2)."""
        return self.errors(self.paint(np.asarray(points_px, dtype=float))[1]).mean()

    def gradient(self, points_px):
        """Return the gradient at the points through what they read and through the bias, (N, 2) each."""
        inputs, painted = self.paint(points_px)
        cotangent = 2 * self._difference(painted)[None, None] / painted.shape[2]
        core = deformable_attention_vjp(cotangent, *inputs, **self.options)
        on_read = (core.k + core.v)[:, 0].swapaxes(1, 2)
        features = bilinear_sample_vjp(on_read, self.x, points_px[None]).points_px[0]
        return features, core.points[0, 0] / pixels_per_unit(self.size, Convention.CELL_CENTER)

    def _difference(self, painted):
        difference = painted[0, 0] - self.x[0].reshape(4, -1).T
        difference[:, 3] = 0  # the squared norm is a key, not a color
        return difference

# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Gradients by hand
#
# A deformable-attention layer learns its sampling positions by gradient descent. This requires the derivative of the
# loss with respect to a position. This notebook derives it by hand and checks it in three ways. Then it moves a point
# across the map to show two limits of the derivative: positions where it is discontinuous, and positions where it is
# zero although the loss is not minimal.
#
# Each section makes a claim, names the function of `dat_ref` that it concerns, draws a figure, and ends with
# assertions. All computations are in float64 and take less than a minute. If PyTorch is installed, its autograd is a
# third check.

# %%
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import LightSource, LinearSegmentedColormap, PowerNorm

import dat_ref
from dat_ref import BiasKind, Convention, DeformableAttentionConfig, OffsetBound
from dat_ref.ops.attention import deformable_attention, deformable_attention_vjp
from dat_ref.ops.basic import layer_norm, layer_norm_vjp, softmax, softmax_vjp
from dat_ref.ops.grid import from_pixels, pixels_per_unit, reference_points, to_pixels
from dat_ref.ops.offsets import bound_offsets, bound_offsets_vjp, share_at_bound
from dat_ref.ops.sampling import bilinear_sample, bilinear_sample_vjp
from dat_ref.viz import style

try:
    import torch
except ImportError:
    torch = None

plt.rcParams.update(style.SETTINGS)
plt.rcParams.update({"figure.dpi": 110, "figure.constrained_layout.use": True})
BLUE, ORANGE, GREEN, PINK = style.GROUP_COLORS[:4]
SIGNED = LinearSegmentedColormap.from_list("signed", ["#0B4F7F", "#7FB4D8", "#FBFBF9", "#EFA877", "#A63C00"])

# %% [markdown]
# ## 1. One reading, two gradients
#
# A map $z$ is read at a point $p = (p_y, p_x)$ between its pixels. In the notation of the paper,
#
# $$
# \phi(z;\ p) = \sum_r g(p_y, r_y)\, g(p_x, r_x)\, z[r_y, r_x], \qquad g(a, b) = \max(0,\ 1 - |a - b|).
# $$
#
# $\phi$ is **linear in the map**. With the incoming gradient $c = \partial L / \partial \phi$, pixel $r$ gets its
# weight times $c$:
#
# $$
# \frac{\partial L}{\partial z[r]} = g(p_y, r_y)\, g(p_x, r_x)\, c .
# $$
#
# $\phi$ is **piecewise bilinear in the point**. Only $g$ depends on $p$. As a function of $a$, $g$ is a hat function:
# it rises with slope $+1$ and falls with slope $-1$. Its kinks are at $a = b - 1,\ b,\ b + 1$, and there we use the
# right-hand slope:
#
# $$
# \frac{\partial L}{\partial p_y} = c \sum_r g'(p_y, r_y)\, g(p_x, r_x)\, z[r],
# \qquad g'(a, b) = \begin{cases} +1 & b - 1 \le a < b \\ -1 & b \le a < b + 1 \\ 0 & \text{else.} \end{cases}
# $$
#
# **Claim.** `dat_ref.ops.sampling.bilinear_sample_vjp` computes these two sums. First, the equations as loops:


# %% alt="The hat function of a pixel, and its slope: +1, then −1, with the right-hand value at the kinks" plot=true
def g(a, b):
    return max(0.0, 1.0 - abs(a - b))


def g_slope(a, b):
    return 1.0 if b - 1 <= a < b else -1.0 if b <= a < b + 1 else 0.0


def loop_gradients(z, p, c):
    """Return ∂L/∂z (H, W) and ∂L/∂p (2,) of L = c φ(z; p), term by term."""
    grad_z, grad_p = np.zeros_like(z), np.zeros(2)
    for y in range(z.shape[0]):
        for x in range(z.shape[1]):
            grad_z[y, x] = g(p[0], y) * g(p[1], x) * c
            grad_p[0] += c * g_slope(p[0], y) * g(p[1], x) * z[y, x]
            grad_p[1] += c * g(p[0], y) * g_slope(p[1], x) * z[y, x]
    return grad_z, grad_p


a = np.linspace(-1.7, 1.7, 681)
figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 2.5))
left.plot(a, [g(t, 0) for t in a], color=BLUE, lw=2)
left.set_title("hat function: weight of a pixel at 0 for a point at $a$")
for start, stop, slope in ((-1.7, -1, 0), (-1, 0, 1), (0, 1, -1), (1, 1.7, 0)):
    right.plot([start, stop], [slope, slope], color=ORANGE, lw=2)
right.plot([-1, 0, 1], [1, -1, 0], "o", color=ORANGE, ms=6, zorder=4)
right.plot([-1, 0, 1], [0, 1, -1], "o", mec=ORANGE, mfc="white", mew=1.5, ms=6, zorder=4)
right.set_title("slope; at a kink, the right-hand one (filled dot)")
for axes in (left, right):
    axes.set(xlabel="$a$, in pixels", xticks=[-1, 0, 1])
    axes.axhline(0, color=style.HAIRLINE, lw=0.6, zorder=0)
right.set_yticks([-1, 0, 1])
plt.show()

# %%
rng = np.random.default_rng(0)
z, c = rng.standard_normal((4, 6)), 1.7
inside, outside, corner = np.array([1.3, 3.6]), np.array([-0.4, 5.8]), np.array([2.0, 3.0])
for p in (inside, outside, corner):
    by_hand = bilinear_sample_vjp(np.full((1, 1, 1), c), z[None, None], p[None, None])
    grad_z, grad_p = loop_gradients(z, p, c)
    np.testing.assert_allclose(by_hand.x[0, 0], grad_z, atol=1e-14)
    np.testing.assert_allclose(by_hand.points_px[0, 0], grad_p, atol=1e-14)

# %% [markdown]
# ## 2. Three checks
#
# The loops above have the same author as the code. Two further checks are independent: **finite differences**, which
# do not use the derivation, and **PyTorch's autograd** through `grid_sample`.
#
# **Claim.** Away from the pixel lattice all methods agree within their precision: loops and autograd to the last
# digits of float64, finite differences to about nine digits. Each dot is one of two hundred random points (or its
# map). Its height is the largest deviation from `bilinear_sample_vjp`.


# %% alt="Deviations from the gradient by hand: loops and autograd near 1e-16, differences near 1e-11" plot=true
def finite_differences(function, at, step=1e-5):
    """Return the gradient of a scalar function by central differences."""
    gradient = np.zeros_like(at)
    for index in np.ndindex(at.shape):
        shift = np.zeros_like(at)
        shift[index] = step
        gradient[index] = (function(at + shift) - function(at - shift)) / (2 * step)
    return gradient


def torch_gradients(z, p, c):
    """Return the same gradients by autograd. `grid_sample` takes (x, y); ±1 are the outermost pixel centers."""
    z, p = torch.tensor(z[None, None], requires_grad=True), torch.tensor(p, requires_grad=True)
    last = torch.tensor([z.shape[2] - 1.0, z.shape[3] - 1.0], dtype=p.dtype)
    grid = (2 * p / last - 1).flip(0).reshape(1, 1, 1, 2)
    (c * torch.nn.functional.grid_sample(z, grid, align_corners=True)).sum().backward()
    return z.grad[0, 0].numpy(), p.grad.numpy()


def difference_gradients(z, p, c):
    def loss(z, p):
        return c * bilinear_sample(z[None, None], p[None, None])[0, 0, 0]

    return finite_differences(lambda at: loss(at, p), z), finite_differences(lambda at: loss(z, at), p)


methods = {"loops": loop_gradients, "finite\ndifferences": difference_gradients}
if torch is not None:
    methods["autograd"] = torch_gradients

points = rng.uniform(-0.95, np.array(z.shape) - 0.05, (200, 2))
points += 0.01 * (np.abs(points - points.round()) < 1e-3)  # off the lattice
deviation = {name: np.zeros((len(points), 2)) for name in methods}
for number, p in enumerate(points):
    by_hand = bilinear_sample_vjp(np.full((1, 1, 1), c), z[None, None], p[None, None])
    for name, method in methods.items():
        grad_z, grad_p = method(z, p, c)
        deviation[name][number] = np.abs(grad_z - by_hand.x).max(), np.abs(grad_p - by_hand.points_px).max()

figure, axes = plt.subplots(figsize=(8.4, 3.0))
for column, name in enumerate(methods):
    for side, (color, label) in enumerate(((BLUE, r"$\partial L/\partial z$"), (ORANGE, r"$\partial L/\partial p$"))):
        x = column + 0.36 * (side - 0.5) + rng.uniform(-0.12, 0.12, len(points))
        y = np.maximum(deviation[name][:, side], 1e-17)
        axes.scatter(x, y, s=9, color=color, alpha=0.5, lw=0, label=label if column == 0 else None)
axes.set(yscale="log", ylim=(3e-18, 1e-7), xticks=range(len(methods)), xticklabels=methods, ylabel="largest deviation")
axes.axhline(np.finfo(float).eps, color=style.QUIET, lw=0.8, ls=(0, (4, 3)))
axes.text(0.5, 3.2e-16, "float64 epsilon", color=style.QUIET, size=8, ha="center")
axes.set_title("deviation of each method from the gradient by hand (zero is drawn at $10^{-17}$)")
axes.legend(loc="upper right", ncols=2, markerscale=1.6)
plt.show()

# %%
for name in methods:
    assert deviation[name].max() < (1e-9 if "finite" in name else 1e-13), name

# %% [markdown]
# ## 3. Two paths to a point
#
# In a layer, a moved point $\tilde p_n$ affects the output in two ways. Its **features**
# $\tilde x_n = \phi(x; \tilde p_n)$ become key and value. The **position bias** reads its table $\hat B$ at the
# displacement between query and point:
#
# $$
# z_m = \sum_n A_{mn}\, \tilde v_n, \qquad
# A = \operatorname{softmax}\!\Bigl(\frac{q\,\tilde k^{\top}}{\sqrt d} + B\Bigr),
# \qquad B_{mn} = \phi\bigl(\hat B;\ \underbrace{q_m - \tilde p_n + (H - 1,\ W - 1)}_{i_{mn}}\bigr).
# $$
#
# Both are readings with the same $\phi$, so both gradients follow from section 1. The displacement decreases when the
# coordinate of the point increases, hence the minus sign:
#
# $$
# \frac{\partial L}{\partial \tilde p_n}
# = \underbrace{\sum_{\text{channels}} \frac{\partial \phi(x;\ \tilde p_n)}{\partial \tilde p_n}\,
#   \frac{\partial L}{\partial \tilde x_n}}_{\text{through the features}}
# \;-\; \underbrace{\sum_{m,\ \text{heads}} \frac{\partial \phi(\hat B;\ i_{mn})}{\partial i}\,
#   \frac{\partial L}{\partial B_{mn}}}_{\text{through the bias}} .
# $$
#
# **Claim.** `dat_ref.ops.attention.deformable_attention_vjp` gives the second sum and `bilinear_sample_vjp` the first.
# Only their sum is the gradient of the loss. Some ports omit the second path. No error occurs, but the points get a
# wrong direction.
#
# The example is a small attention core: a map of 5 × 5 pixels, four keys sampled from it (with $W_k = W_v = 1$), one
# head, and the squared distance of the output from a random target.

# %% alt="Four points with arrows from features and from bias; only their sum meets the measured slope" plot=true
SIZE, DEPTH, CONVENTION = (5, 5), 3, Convention.CELL_CENTER
rng = np.random.default_rng(5)
x = rng.standard_normal((1, DEPTH, *SIZE))
q = rng.standard_normal((1, 1, SIZE[0] * SIZE[1], DEPTH))
table = 3 * rng.standard_normal((1, 2 * SIZE[0] - 1, 2 * SIZE[1] - 1))
target = rng.standard_normal(q.shape)
GEOMETRY = {"query_size": SIZE, "convention": CONVENTION}


def broadcast_inputs(points_px):
    return np.broadcast_to(x, (len(points_px), *x.shape[1:])), np.broadcast_to(q, (len(points_px), *q.shape[1:]))


def attend_at(points_px, table=table):
    """Return the inputs and the output of the core for sets of four points (B, 4, 2) in pixels."""
    maps, queries = broadcast_inputs(points_px)
    sampled = bilinear_sample(maps, points_px).swapaxes(1, 2)[:, None]  # (B, 1, 4, d)
    inputs = (queries, sampled, sampled, from_pixels(points_px[:, None], SIZE, CONVENTION), table)
    return inputs, deformable_attention(*inputs, **GEOMETRY)


def losses(points_px, table=table):
    return 0.5 * np.square(attend_at(points_px, table)[1] - target).sum(axis=(1, 2, 3)) / q.shape[2]


def loss(points_px, table=table):
    return losses(points_px[None], table)[0]


def two_paths(points_px, table=table):
    """Return the feature path and the bias path of ∂L/∂p̃, (B, 4, 2) each, per pixel."""
    inputs, output = attend_at(points_px, table)
    core = deformable_attention_vjp((output - target) / q.shape[2], *inputs, **GEOMETRY)
    grad_sampled = (core.k + core.v)[:, 0].swapaxes(1, 2)  # (B, d, 4): key and value are the sampled features
    features = bilinear_sample_vjp(grad_sampled, broadcast_inputs(points_px)[0], points_px).points_px
    return features, core.points[:, 0] / pixels_per_unit(SIZE, CONVENTION)


positions = np.array([[0.7, 3.2], [1.4, 0.6], [3.3, 2.6], [3.6, 0.7]])
features, bias = (path[0] for path in two_paths(positions[None]))
measured = finite_differences(loss, positions)

figure, axes = plt.subplots(figsize=(8.4, 4.1))
axes.imshow(x[0, 0], cmap=style.FIELD, alpha=0.55, extent=(-0.5, 4.5, 4.5, -0.5))
step = 0.9 / np.abs(measured).max()
for color, width, arrows, label in (
    (BLUE, 0.009, features, "through the features"),
    (PINK, 0.009, bias, "through the bias"),
    (style.INK, 0.012, features + bias, "both"),
):
    shown = -step * arrows  # downhill
    axes.quiver(
        positions[:, 1], positions[:, 0], shown[:, 1], shown[:, 0], color=color, label=label,
        angles="xy", scale_units="xy", scale=1, width=width, headwidth=3.6, headlength=4, headaxislength=3.6, zorder=3,
    )  # fmt: skip
ends = positions - step * measured
axes.scatter(ends[:, 1], ends[:, 0], s=95, fc="none", ec=ORANGE, lw=1.6, zorder=5, label="finite differences (tip)")
axes.scatter(positions[:, 1], positions[:, 0], s=26, color="white", ec=style.INK, zorder=6)
axes.set(xticks=range(5), yticks=range(5), xlim=(-0.5, 4.5), ylim=(4.5, -0.5), xlabel="$x$, pixels", ylabel="$y$")
axes.set_title("descent directions of four points: each path, and the sum")
axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), labelspacing=1.0)
plt.show()

# %%
np.testing.assert_allclose(features + bias, measured, atol=1e-9)
for one_path in (features, bias):
    assert np.abs(one_path - measured).max() > 0.1 * np.abs(measured).max()


def cosine(one, other):
    return (one * other).sum(axis=1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)


angles = np.degrees(np.arccos(cosine(features, measured)))
print("without the bias path the directions are wrong by", ", ".join(f"{angle:.0f}°" for angle in angles))

# %% [markdown]
# ## 4. One point crosses the lattice
#
# Now three points are fixed and one moves over the whole map. The figure shows the loss as a function of its position.
#
# **Claim.** Inside a cell of the pixel lattice the loss is smooth. On the rows and columns of pixel centers it is
# continuous but has a crease.

# %% alt="The loss over the positions of one point, as a relief with creases; its slope jumps at every row" plot=true
FINE = 240
axis = -0.5 + (np.arange(FINE) + 0.5) * 5 / FINE  # never on the lattice
moved = np.broadcast_to(positions, (FINE, FINE, 4, 2)).copy()
moved[:, :, 0] = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1)
landscape = np.stack([losses(row) for row in moved])
slope_y = np.stack([sum(two_paths(row))[:, 0, 0] for row in moved])

figure, (left, right) = plt.subplots(1, 2, figsize=(9.2, 4.3), sharey=True)
extent = (-0.5, 4.5, 4.5, -0.5)
light = LightSource(azdeg=330, altdeg=50)
colors = ["#17406B", "#4C8DBE", "#B9D7E8", "#F7F4EA", "#F1C08A", "#C8641B"]
terrain = LinearSegmentedColormap.from_list("terrain", colors)
heights = PowerNorm(0.6, landscape.min(), landscape.max())
relief = light.shade(landscape, terrain, norm=heights, blend_mode="soft", vert_exag=60)
left.imshow(relief, extent=extent, interpolation="bilinear")
left.contour(axis, axis, landscape, levels=16, colors=style.INK, linewidths=0.45, alpha=0.55)
left.set_title("loss, as a relief")
bound = np.abs(slope_y).max()
shown = right.imshow(slope_y, extent=extent, cmap=SIGNED, vmin=-bound, vmax=bound, interpolation="nearest")
right.set_title("slope along $y$, by hand: it jumps on every row")
figure.colorbar(shown, ax=right, shrink=0.75, aspect=28, label="loss per pixel").outline.set_visible(False)
for axes in (left, right):
    axes.plot(*np.meshgrid(range(5), range(5)), ".", color=style.INK, ms=2.5)
    axes.set(xticks=range(5), yticks=range(5), xlabel="$x$, pixels")
    for side in axes.spines.values():
        side.set_visible(False)
left.scatter(positions[1:, 1], positions[1:, 0], s=42, color="white", ec=style.INK, zorder=4)
for position in positions[1:]:
    left.annotate("fixed", position[::-1], xytext=(6, 5), textcoords="offset points", size=7.5, color=style.INK)
left.set_ylabel("$y$, pixels")
plt.show()


# %%
def one_sided(function, at, direction, step=1e-6):
    """Return the one-sided slope of a function at `at` along `direction`, by a second-order difference."""
    return (-3 * function(at) + 4 * function(at + step * direction) - function(at + 2 * step * direction)) / (2 * step)


def along_y(y, x_position=1.35, table=table):
    points = positions.copy()
    points[0] = y, x_position
    return loss(points, table)


jump = {y: abs(one_sided(along_y, y, 1.0) + one_sided(along_y, y, -1.0)) for y in (0.0, 0.4, 1.0, 1.6, 2.0, 2.7, 3.0)}
for y, size in jump.items():
    assert (size > 1e-2) == (y == round(y)), (y, size)

# %% [markdown]
# ## 5. The slope on a crease
#
# On a crease the code has to choose a value. Floor-based indexing gives the slope **to the right of the reading
# position**; PyTorch does the same. For the features, the reading position is the point. For the bias, it is the
# displacement $q - \tilde p$, which moves in the opposite direction. Its right-hand slope is the *left-hand* slope as
# seen from the point.
#
# **Claim.** On the lattice the gradient by hand is the right-hand slope of the feature path plus the left-hand slope
# of the bias path. Without a bias it equals the right-hand slope of the loss. With a bias it equals neither one-sided
# slope of the loss, and it is not always between the two.


# %% alt="The loss along y with left-hand, right-hand and computed slopes, without and with a bias" plot=true
def hand_slope(y, table=table):
    points = positions.copy()
    points[0] = y, 1.35
    return [float(path[0, 0, 0]) for path in two_paths(points[None], table)]  # (features, bias), ∂L/∂p_y


figure, rows = plt.subplots(1, 2, figsize=(9.4, 3.7))
ticks = np.linspace(-0.5, 4.5, 501)
no_bias = np.zeros_like(table)
for axes, read, title in ((rows[0], no_bias, "table of zeros: features only"), (rows[1], table, "features and bias")):
    curve = np.array([along_y(y, table=read) for y in ticks])
    axes.plot(ticks, curve, color=style.HAIRLINE, lw=2.2, zorder=2)
    for y in range(5):
        value = along_y(y, table=read)
        slopes = (
            (-one_sided(lambda t, read=read: along_y(t, table=read), y, -1.0), GREEN, (-1, 0), 2.4, "-"),
            (one_sided(lambda t, read=read: along_y(t, table=read), y, 1.0), BLUE, (0, 1), 2.4, "-"),
            (sum(hand_slope(float(y), read)), ORANGE, (-1, 1), 1.3, (0, (3, 1.5))),
        )
        for slope, color, sides, width, dashes in slopes:
            half = 0.45 / np.hypot(1, 5 * slope / np.ptp(curve)) * np.array(sides)  # equal length on the page
            axes.plot(y + half, value + slope * half, color=color, lw=width, ls=dashes, zorder=4 if width < 2 else 3)
        axes.plot(y, value, "o", color="white", mec=style.INK, ms=5, zorder=5)
    axes.set(xticks=range(5), xlabel="$y$ of the moving point, pixels", title=title)
rows[0].plot([], [], color=GREEN, lw=2.4, label="left-hand slope")
rows[0].plot([], [], color=BLUE, lw=2.4, label="right-hand slope")
rows[0].plot([], [], color=ORANGE, lw=1.3, ls=(0, (3, 1.5)), label="by hand")
rows[0].set_ylabel("loss")
figure.legend(*rows[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
plt.show()


# %%
def frozen_loss(t, y, moving):
    """Return the loss, linearized at y, if only the inputs of one path move to t."""
    (fixed, output), (shifted, _) = (attend_at(np.array([[[at, 1.35], *positions[1:]]])) for at in (y, t))
    inputs = (fixed[0], *shifted[1:3], *fixed[3:]) if moving == "features" else (*fixed[:3], *shifted[3:])
    return ((output - target) / q.shape[2] * deformable_attention(*inputs, **GEOMETRY)).sum()


between = []
for y in range(5):
    np.testing.assert_allclose(
        sum(hand_slope(float(y), no_bias)), one_sided(lambda t: along_y(t, table=no_bias), y, 1.0), atol=1e-7
    )
    features, bias = hand_slope(float(y))
    right_hand = one_sided(lambda t, y=y: frozen_loss(t, y, "features"), y, 1.0)
    left_hand = -one_sided(lambda t, y=y: frozen_loss(t, y, "bias"), y, -1.0)
    np.testing.assert_allclose([features, bias], [right_hand, left_hand], atol=1e-7)
    right_slope, left_slope = one_sided(along_y, y, 1.0), -one_sided(along_y, y, -1.0)
    assert min(abs(features + bias - slope) for slope in (right_slope, left_slope)) > 1e-3  # neither of the two
    between.append(min(right_slope, left_slope) <= features + bias <= max(right_slope, left_slope))
print("gradient not between the one-sided slopes at rows", np.flatnonzero(~np.array(between)).tolist())
assert not all(between)

# %% [markdown]
# The lattice has measure zero, but points are on it at initialization. With **zero offsets**
# (`init_params(..., offsets="zero_offset")`, the initialization of deformable convolution) and stride 1, *every* point
# of the two consistent conventions is at a pixel center: this is the definition of consistency. The grids of the
# releases are off the lattice almost everywhere.
#
# **Claim.** Under `CELL_CENTER` and `PAPER` all points of a zero-offset layer of stride 1 start on a crease, up to
# rounding. Rounding has an effect there: normalized coordinates are rarely exact. So some points are one rounding unit
# *below* their pixel, in the previous cell, and get the left-hand slope.


# %% alt="Shares of points on the lattice at zero offset, by convention; shares that rounding moves" plot=true
def starts_px(side, convention, dtype):
    """Return the points of a zero-offset layer of stride 1 along one axis, in pixels."""
    return to_pixels(reference_points((side, side), convention).astype(dtype), (side, side), convention)[:, 0, 0]


SIDES = [7, 8, 14, 16, 28, 32, 56, 64]
shares = {}
for convention in Convention:
    coordinates = np.concatenate([starts_px(side, convention, np.float64) for side in SIDES])
    shares[convention.name] = (np.abs(coordinates - coordinates.round()) < 1e-9).mean()

figure, (axes, below_axes) = plt.subplots(1, 2, figsize=(9.4, 2.5), width_ratios=[1, 1.5])
axes.barh(list(shares), list(shares.values()), color=[BLUE, BLUE, style.HAIRLINE, style.HAIRLINE], height=0.62)
for row, share in enumerate(shares.values()):
    axes.text(share + 0.02, row, f"{share:.0%}", va="center", size=8.5)
axes.set(xlim=(0, 1.2), xticks=[])
axes.invert_yaxis()
axes.spines["bottom"].set_visible(False)
axes.set_title("points on the lattice at zero offset")

below = {}
for shift, (convention, color) in enumerate(((Convention.CELL_CENTER, BLUE), (Convention.PAPER, ORANGE))):
    floors = [np.floor(starts_px(side, convention, np.float32)) for side in SIDES]
    below[convention] = [(cell < np.arange(len(cell))).mean() for cell in floors]
    at = np.arange(len(SIDES)) + 0.38 * (shift - 0.5)
    below_axes.bar(at, below[convention], width=0.34, color=color, label=convention.name)
below_axes.set(xticks=range(len(SIDES)), xticklabels=SIDES, xlabel="rows of the map", ylim=(0, 0.42))
below_axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
below_axes.set_title("rows that float32 puts into the previous cell")
below_axes.legend(ncols=2, loc="upper right")
plt.show()

# %%
assert shares["CELL_CENTER"] == shares["PAPER"] == 1
assert max(shares["CVPR2022"], shares["DATPP2023"]) < 0.05
for side, share in zip(SIDES, below[Convention.CELL_CENTER], strict=True):
    assert share == 0 or side & (side - 1)  # exact under CELL_CENTER for powers of two

# %% [markdown]
# ## 6. The null spaces of softmax and layer norm
#
# Two more steps are on the path of the gradient, and both have directions that they map to zero. For softmax,
# $A_n = e^{S_n} / \sum_m e^{S_m}$ gives $\partial A_n / \partial S_m = A_n (\delta_{nm} - A_m)$ and so
#
# $$
# \frac{\partial L}{\partial S_n}
# = A_n \Bigl(\frac{\partial L}{\partial A_n} - \sum_m A_m \frac{\partial L}{\partial A_m}\Bigr),
# \qquad \sum_n \frac{\partial L}{\partial S_n} = 0 .
# $$
#
# For layer norm, $y = \gamma \hat x + \beta$ with $\hat x = (x - \mu)/\sqrt{\sigma^2 + \varepsilon}$. Let
# $h = \gamma\, \partial L / \partial y$. Both $\mu$ and $\sigma$ depend on every channel, and each contributes a mean:
#
# $$
# \frac{\partial L}{\partial x}
# = \frac{1}{\sqrt{\sigma^2 + \varepsilon}} \Bigl(h - \overline{h} - \hat x\, \overline{h \hat x}\Bigr) .
# $$
#
# **Claim.** The Jacobian of `softmax` maps constant vectors to zero. The Jacobian of `layer_norm` maps constant
# vectors and, up to $\varepsilon$, multiples of the centered input to zero. One consequence: the bias of the key
# projection adds $q \cdot b_k$ to all logits of a query, so **its gradient is zero**. It is never trained, in the
# released models either.

# %% alt="The Jacobians of softmax and layer norm as matrices of numbers; in both, every row sums to zero" plot=true
logits, cells = np.array([0.2, 1.4, -0.6, 2.0, 0.9]), np.array([0.4, -1.2, 2.0, 0.3, -0.8])
units = np.eye(5)
softmax_jacobian = np.stack([softmax_vjp(unit, softmax(logits)) for unit in units])


def norm_vjp(cotangent):
    ones, zeros = np.ones(5), np.zeros(5)
    return layer_norm_vjp(cotangent.reshape(1, 5, 1, 1), cells.reshape(1, 5, 1, 1), ones, zeros).x.ravel()


norm_jacobian = np.stack([norm_vjp(unit) for unit in units])

figure, panels = plt.subplots(1, 2, figsize=(8.4, 3.1))
for axes, jacobian, title in zip(panels, (softmax_jacobian, norm_jacobian), ("softmax", "layer norm"), strict=True):
    limit = np.abs(jacobian).max()
    axes.imshow(jacobian, cmap=SIGNED, vmin=-limit, vmax=limit)
    for (i, j), value in np.ndenumerate(jacobian):
        color = "white" if abs(value) > 0.65 * limit else style.INK
        axes.text(j, i, f"{value:.2f}", ha="center", va="center", size=8, color=color)
    axes.set(xticks=[], yticks=[], ylabel="output", xlabel="input")
    axes.set_title(f"Jacobian of {title}: every row sums to zero")
    for side in axes.spines.values():
        side.set_visible(False)
plt.show()


# %%
def norm_of(channels):
    return layer_norm(channels.reshape(1, 5, 1, 1), np.ones(5), np.zeros(5)).ravel()


for jacobian, function, at in ((softmax_jacobian, softmax, logits), (norm_jacobian, norm_of, cells)):
    measured = np.stack([finite_differences(lambda t, k=k, f=function: f(t)[k], at) for k in range(5)])
    np.testing.assert_allclose(jacobian, measured, atol=1e-9)
    assert np.abs(jacobian.sum(axis=1)).max() < 1e-14
assert np.abs(norm_jacobian @ (cells - cells.mean())).max() < 1e-4  # not zero: ε

config = DeformableAttentionConfig(dim=12, heads=4, groups=2, size=(5, 7))
layer = dat_ref.DeformableAttention(config, dat_ref.init_params(config, seed=0, dtype=np.float64))
y, pullback = layer.vjp(rng.standard_normal((2, 12, 5, 7)))
_, grads = pullback(rng.standard_normal(y.shape))
assert np.abs(grads["key"]["bias"]).max() < 1e-13 < 1e-3 < np.abs(grads["value"]["bias"]).max()

# %% [markdown]
# ## 7. Bounds and zero gradients
#
# The bound maps the output $\Delta$ of the offset network to a point:
#
# $$
# \begin{aligned}
# \text{paper, 2022:} && \tilde p &= p + \ell \tanh \Delta &
# \frac{\partial L}{\partial \Delta} &= \ell\,(1 - \tanh^2 \Delta)\ \frac{\partial L}{\partial \tilde p} \\
# \text{2023:} && \tilde p &= \min(1, \max(-1,\ p + \Delta)) &
# \frac{\partial L}{\partial \Delta} &= \mathbf{1}[-1 \le p + \Delta \le 1]\ \frac{\partial L}{\partial \tilde p}
# \end{aligned}
# $$
#
# with $\ell = \tfrac{s}{2} \cdot \text{pitch}$. A tanh reduces the gradient but never to zero. A clamp passes no
# gradient outside its range: for any loss, a point clamped to the border gets no gradient that could move it
# back.
#
# **Claim** (`bound_offsets_vjp`, `share_at_bound`). With the released initialization of DAT++, a fifth to a quarter of
# all offset components have a gradient of exactly zero in the first step. With tanh, no component has.

# %% alt="Tanh and clamp with their slopes; points without a gradient along the border; a fifth to a quarter" plot=true
STAGES = [
    next(block.attention for block in blocks if block.attention.kind == "deformable")
    for blocks in dat_ref.config("dat_pp_tiny").stages
]


def initial_pass(stage, seed=0, bound=OffsetBound.CLAMP):
    """Return the configuration and the trace of a DAT++ layer with initial weights on random features."""
    config = replace(STAGES[stage], bias=BiasKind.NONE, offset_bound=bound, size=None)
    side = 224 // (4 << stage)
    features = np.random.default_rng(seed).standard_normal((1, config.dim, side, side))
    params = dat_ref.init_params(config, seed, dtype=np.float64)
    return config, dat_ref.DeformableAttention(config, params)(features, return_trace=True)[1]


def zero_components(config, trace):
    """Return the components whose ∂p̃/∂Δ is exactly zero, (B, G, Hk, Wk, 2), from the VJP."""
    ones = np.ones_like(trace.raw_offsets)
    options = {"offset_range": config.offset_range, "convention": config.convention}
    return bound_offsets_vjp(ones, trace.raw_offsets, trace.reference[0, 0], config.offset_bound, **options) == 0


starts = [[initial_pass(stage, seed) for seed in range(3)] for stage in range(4)]
zero_share = [np.mean([zero_components(*start).mean() for start in of_stage]) for of_stage in starts]

figure, (curves, field, bars) = plt.subplots(1, 3, figsize=(9.8, 3.5), width_ratios=[1.0, 1.15, 0.85])
delta = np.linspace(-2.5, 2.5, 501).reshape(1, 1, 1, -1, 1).repeat(2, axis=-1)
at = np.zeros((1, delta.shape[3], 2))
ones = np.ones_like(delta)
for bound, color, name in ((OffsetBound.TANH_COORDINATES, BLUE, "tanh"), (OffsetBound.CLAMP, ORANGE, "clamp")):
    options = {"offset_range": 2.0, "convention": Convention.CVPR2022}
    moved = bound_offsets(delta, at, bound, **options)[1][0, 0, 0, :, 0]
    passed = bound_offsets_vjp(ones, delta, at, bound, **options)[0, 0, 0, :, 0]
    curves.plot(delta[0, 0, 0, :, 0], moved, color=color, lw=1.8, label=f"{name}: point")
    curves.plot(delta[0, 0, 0, :, 0], passed, color=color, lw=1.2, ls=(0, (3, 2)), label=f"{name}: slope")
curves.axhline(0, color=style.HAIRLINE, lw=0.6, zorder=0)
curves.set(xlabel=r"$p + \Delta$", xticks=[-2, -1, 0, 1, 2], yticks=[-1, 0, 1], ylim=(-1.15, 1.15))
curves.set_title("bound: forward (solid), slope (dashed)")
curves.legend(loc="lower right", fontsize=7, handlelength=2.2)

config, trace = starts[2][0]
is_zero, points_px = zero_components(config, trace)[0, 0], trace.points_px[0, 0]
last = trace.x.shape[2] - 1
field.add_patch(plt.Rectangle((0, 0), last, last, fc=style.MARGIN, ec=style.HAIRLINE, lw=0.8))
for kind, (color, label) in enumerate(((BLUE, "nonzero"), (ORANGE, "one coordinate zero"), (style.QUERY, "both zero"))):
    chosen = is_zero.sum(axis=-1) == kind
    y, x_position = points_px[chosen].T
    field.scatter(x_position, y, s=20, color=color, lw=0, label=label, zorder=3, clip_on=False)
field.set(aspect="equal", xticks=[], yticks=[], xlim=(-0.6, last + 0.6), ylim=(last + 0.6, -0.6))
field.set_title("gradients of one group, stage 3")
field.legend(loc="upper center", bbox_to_anchor=(0.5, -0.02), ncols=3, fontsize=7, handletextpad=0.1, columnspacing=0.9)
for side in field.spines.values():
    side.set_visible(False)

bars.bar(range(1, 5), zero_share, color=ORANGE, width=0.62)
for stage, share in enumerate(zero_share, start=1):
    bars.text(stage, share + 0.004, f"{share:.0%}", ha="center", size=8.5)
bars.set(xticks=range(1, 5), xlabel="stage of dat_pp_tiny", yticks=[], ylim=(0, 0.3))
bars.spines["left"].set_visible(False)
bars.set_title("components with zero gradient")
plt.show()

# %%
assert all(0.15 < share < 0.28 for share in zero_share)
for stage, of_stage in enumerate(starts):
    for seed, (config, trace) in enumerate(of_stage):
        bounding = {"offset_range": config.offset_range, "convention": config.convention}
        clamped = share_at_bound(trace.offsets, trace.reference[0, 0], config.offset_bound, **bounding)
        assert clamped == zero_components(config, trace).mean()
        soft, soft_trace = initial_pass(stage, seed, OffsetBound.TANH_COORDINATES) if stage == 3 else (None, None)
        assert soft is None or not zero_components(soft, soft_trace).any()

# %% [markdown]
# ## What to remember
#
# - The gradient of a position is a difference of neighboring pixels. It depends on the current cell only, so a target
#   attracts a point only from nearby (`dat_ref.ops.coverage.capture_radius`).
# - It has two paths. Without the second one, through the bias, the points get a wrong direction.
# - On the lattice the loss has no derivative. The code uses the right-hand slope of the reading position. As seen from
#   the point, this is the right-hand slope for the features and the left-hand slope for the bias.
# - A clamp can stop the gradient; a tanh only reduces it.
#
# All derivations on one page: *Gradients by hand* in the documentation. `dat_ref.train` trains the whole model with
# these gradients only.

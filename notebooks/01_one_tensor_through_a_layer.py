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
# # One tensor through a layer
#
# In attention, queries are compared with keys, a softmax turns the scores into weights, and the output is a weighted
# mean of values. **Deformable attention changes one thing: where the keys are read.** This notebook follows one
# photograph through one layer and shows every step. At the end you can answer three questions: why all queries share
# the keys, what the number $s$ does, and why the position bias is interpolated.
#
# The layer needs a task whose result a person can judge by eye. Our task: **repaint the photograph from only 24
# readings.** Each of the 2400 output pixels becomes a mixture of these 24 readings. The readings are the palette, and
# attention mixes the paint.
#
# Each section makes a claim, names the function of `dat_ref` that it concerns, draws a figure, and ends with
# assertions.

# %%
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Rectangle

import dat_ref
from dat_ref.cli.photo import load_photo, resize
from dat_ref.complexity import attention_terms, count
from dat_ref.data import photograph_path
from dat_ref.layer import deformable_layer, deformable_layer_vjp
from dat_ref.ops.attention import attend, merge_heads, split_heads
from dat_ref.ops.basic import gelu, layer_norm, linear, softmax
from dat_ref.ops.bias import table_bias, table_positions
from dat_ref.ops.coverage import coverage
from dat_ref.ops.grid import from_pixels, key_grid_size, offset_padding, reference_points, to_pixels
from dat_ref.ops.offsets import bound_offsets, offset_network
from dat_ref.ops.sampling import bilinear_sample
from dat_ref.peers import PerQueryAttentionConfig
from dat_ref.peers.per_query import attend_at_points
from dat_ref.train import AdamW, scheduled_rate
from dat_ref.viz import style
from dat_ref.viz.artists import dim

plt.rcParams.update(style.SETTINGS)
plt.rcParams.update({"figure.dpi": 110, "figure.constrained_layout.use": True})
BLUE, ORANGE, GREEN = style.GROUP_COLORS[:3]

HEIGHT, WIDTH = SIZE = (40, 60)
photo = load_photo(photograph_path("chelsea"))
colors = resize(photo, SIZE).transpose(2, 0, 1) - 0.5  # (3, 40, 60)
QUERIES = {"an eye": (15, 23), "the nose": (32, 35), "the fur": (24, 8)}  # (y, x)


def on_photo(axes, title="", dark=False):
    """Show the photograph in pixel coordinates of the map."""
    axes.imshow(dim(photo) if dark else photo, extent=(-0.5, WIDTH - 0.5, HEIGHT - 0.5, -0.5))
    axes.set(xticks=[], yticks=[], title=title)
    axes.spines[:].set_visible(False)


def star(axes, pixel):
    axes.scatter(pixel[1], pixel[0], marker="*", s=150, color=style.QUERY, ec="white", lw=0.9, zorder=6)


# %% [markdown]
# ## 1. Full attention, and its cost
#
# In plain attention every pixel attends to every pixel. Assume that a pixel attends to pixels of its own color $a$,
# and more to pixels nearby. One formula does that, with a sharpness $\beta$ and a bias $B$ that decreases with the
# distance:
#
# $$ A_{mn} = \operatorname{softmax}_n \bigl(-\beta\, |a_m - a_n|^2 + B_{mn}\bigr). $$
#
# The matrix has 2400 × 2400 entries, although the photograph shows only fur, two eyes, a nose and a blurred room. A
# common remedy is a **window**: a pixel attends only to the pixels of its own square. This is cheap, but the squares
# do not depend on the image. The window of one eye contains neither the nose nor the other eye.
#
# **Claim.** The matrix is nearly of low rank: 24 singular directions carry 98 % of its squared norm.
#
# This suggests that few keys could be enough, but it does not prove it. A singular direction combines all pixels, and
# a key is one reading at one position. Also, we wrote this matrix by hand. The answer depends on where the 24 keys
# are: section 10 measures a larger error than full attention for 24 keys on a grid, and a smaller one for 24 keys that
# have moved.

# %% alt="A cat three times, lit where an eye, the nose and the fur attend; a curve reaches 98 % at 24 directions"
BETA, NEAR = 60.0, 30.0  # sharpness; standard deviation of the distance bias, pixels
flat = colors.reshape(3, -1).T  # (2400, 3)
positions = np.stack(np.divmod(np.arange(HEIGHT * WIDTH), WIDTH), axis=1)  # (2400, 2)


def squared_distances(one, other):
    return np.square(one[:, None] - other[None]).sum(axis=-1)


full = softmax(-BETA * squared_distances(flat, flat) - squared_distances(positions, positions) / (2 * NEAR**2))
energy = np.linalg.svd(full[::4], compute_uv=False) ** 2  # every fourth query is enough
carried = np.cumsum(energy) / energy.sum()

figure, panels = plt.subplots(2, 2, figsize=(8.2, 5.5))
for axes, (name, pixel) in zip(panels.ravel(), QUERIES.items()):
    on_photo(axes, f"full attention of {name}", dark=True)
    row = full[pixel[0] * WIDTH + pixel[1]].reshape(SIZE)
    axes.imshow(row / row.max(), cmap=style.HEAT, extent=(-0.5, WIDTH - 0.5, HEIGHT - 0.5, -0.5))
    window = [10 * (coordinate // 10) - 0.5 for coordinate in pixel]
    axes.add_patch(Rectangle(window[::-1], 10, 10, fill=False, ec="white", lw=0.9))
    star(axes, pixel)
curve = panels[1, 1]
curve.plot(range(1, 61), carried[:60], color=BLUE, lw=1.8)
curve.plot([24, 24, 0], [0, carried[23], carried[23]], color=style.QUIET, lw=0.8, ls=(0, (3, 2)))
curve.set(
    xlim=(0, 60),
    ylim=(0, 1.03),
    xticks=[1, 24, 60],
    yticks=[0, 1],
    xlabel="singular directions",
    title="share of the squared norm",
)
plt.show()

# %%
assert carried[23] > 0.98
eye, other_eye = QUERIES["an eye"], (17, 41)
row = full[eye[0] * WIDTH + eye[1]].reshape(SIZE)
assert row[other_eye] > 50 / row.size  # the other pupil gets more than 50 times a uniform weight ...
assert eye[1] // 10 != other_eye[1] // 10  # ... and is in another window (white squares)
assert eye[0] // 10 != QUERIES["the nose"][0] // 10  # so is the nose

# %% [markdown]
# ## 2. Queries
#
# $$ q = x W_q $$
#
# The map $x$ has 16 channels. Three are the colors (0 is gray), the fourth is the squared norm $|a|^2$, the others are
# zero. This is enough to write the weights by hand. A dot product is not a distance, but
#
# $$
# -|a - b|^2 = 2\,a \cdot b - |b|^2 - |a|^2 ,
# $$
#
# and softmax does not depend on $|a|^2$, which is the same for all keys. So the query $(2\beta a,\ -\beta)$ and the
# key $(b,\ |b|^2)$ compare colors. The other 12 query channels are random mixtures of the colors. They do not affect
# the scores, because the keys are zero there. Only the offset network of section 4 uses them.
#
# **Claim.** With these four channels, the dot products of the queries and keys of `dat_ref.ops.basic.linear` give the
# attention of section 1.

# %% alt="The 16 query channels as pictures: three colors, one constant, twelve random mixtures of the colors"
DIM, STRIDE = 16, 10
config = dat_ref.DeformableAttentionConfig(
    dim=DIM, heads=1, groups=1, stride=STRIDE, kernel_size=STRIDE, offset_range=2.0, size=SIZE
)
x = np.concatenate([colors, np.square(colors).sum(axis=0, keepdims=True), np.zeros((DIM - 4, *SIZE))])[None]


def weights_by_hand(seed=0):
    """Return parameters of a layer that compares and outputs colors, with zero offsets."""
    params = dat_ref.init_params(config, seed, offsets="zero_offset", dtype=np.float64)
    sharpness = BETA / config.scale
    mixtures = np.random.default_rng(seed).standard_normal((DIM - 4, 3))
    query = {"weight": np.zeros((DIM, DIM)), "bias": np.zeros(DIM)}
    query["weight"][:3, :3], query["bias"][3] = 2 * sharpness * np.eye(3), -sharpness  # (2βa, -β)
    query["weight"][4:, :3] = sharpness * mixtures
    passing = {"weight": np.diag([1.0] * 4 + [0.0] * (DIM - 4)), "bias": np.zeros(DIM)}  # (b, |b|²), unchanged
    dy, dx = np.meshgrid(np.arange(1 - HEIGHT, HEIGHT), np.arange(1 - WIDTH, WIDTH), indexing="ij")
    table = -(dy**2 + dx**2)[None] / (2 * NEAR**2)
    return {
        **params, "query": query, "key": passing, "value": passing, "output": passing, "position_bias": {"table": table}
    }  # fmt: skip


params = weights_by_hand()
query = linear(x, **params["query"])  # (1, 16, 40, 60)

figure, panels = plt.subplots(2, 8, figsize=(8.6, 2.0))
for channel, axes in enumerate(panels.T.ravel()):
    axes.imshow(query[0, channel], cmap="gray" if channel < 4 else style.FIELD)
    axes.set(xticks=[], yticks=[])
    axes.set_title(("2βr", "2βg", "2βb", "-β")[channel] if channel < 4 else "mixture", size=7.5, color=style.QUIET)
    axes.spines[:].set_visible(False)
plt.show()

# %%
q, k = split_heads(query, 1), split_heads(linear(x, **params["key"]), 1)  # (1, 1, 2400, 16) each
content = (q @ k.swapaxes(2, 3))[0, 0] * config.scale
compared = softmax(content - squared_distances(positions, positions) / (2 * NEAR**2))
np.testing.assert_allclose(compared, full, atol=1e-12)

# %% [markdown]
# ## 3. Reference points
#
# Put a coarse grid on the map, with one point for $r \times r$ pixels. Here the stride is $r = 10$: four rows of six
# points, each at the center of its cell. These are the positions at which the keys are read if the offsets are zero.
#
# A point reads at most four pixels. At stride 10 the grid therefore reads 4 % of the map (`dat_ref.ops.coverage`). At
# stride 1 or 2 it reads every pixel, and then offsets cannot recover anything. Offsets can help here because so much
# is missed.
#
# **Claim.** `dat_ref.ops.grid.reference_points` are the centers of the cells. They do not depend on the photograph,
# and they read 4 % of its pixels.

# %% alt="The cat under a grid of 4 × 6 cells, with one reference point at the center of each cell"
keys = key_grid_size(SIZE, config.kernel_size, STRIDE, config.convention)
reference = reference_points(keys, config.convention)  # (4, 6, 2), from -1 to 1
reference_px = to_pixels(reference, SIZE, config.convention)  # in pixels of the map


def cells(axes):
    for y in range(0, HEIGHT + 1, STRIDE):
        axes.axhline(y - 0.5, color="white", lw=0.5, alpha=0.6)
    for at in range(0, WIDTH + 1, STRIDE):
        axes.axvline(at - 0.5, color="white", lw=0.5, alpha=0.6)


figure, axes = plt.subplots(figsize=(4.9, 3.3))
on_photo(axes, "24 cells of 10 × 10 pixels, one reference point each")
cells(axes)
axes.scatter(*reference_px.reshape(-1, 2).T[::-1], s=26, color="white", ec=style.INK, lw=0.8, zorder=4)
plt.show()

# %%
rows, columns = 10 * np.arange(4) + 4.5, 10 * np.arange(6) + 4.5  # 4.5: center of pixels 0 … 9
np.testing.assert_allclose(reference_px, np.stack(np.meshgrid(rows, columns, indexing="ij"), axis=-1))
assert coverage(SIZE, STRIDE, config.convention) == 0.04

# %% [markdown]
# An error of half a pixel would matter here, and both releases have one: see the [next notebook](../02_coordinates/)
# and [the page on conventions](../../conventions/).
#
# ## 4. The offset network
#
# None of the 24 points reads the black of a pupil or the red of the nose. A small network, the same for every cell,
# reads the queries *around a reference point* and predicts how far the point moves:
#
# $$ \Delta = W_2\ \mathrm{GELU}\bigl(\mathrm{LayerNorm}(\mathrm{DWConv}_{k \times k,\ \text{stride } r}(q))\bigr). $$
#
# With $k = r$ it reads exactly its own cell. Sixteen filters, one for each channel, reduce the cell to 16 numbers, and
# $W_2$ maps these to two: the offset along $y$ (down) and along $x$ (right).
#
# This network is the only part of the layer that we cannot write by hand. We train it here, with 200 gradient steps on
# the squared error of the repainted photograph. All other parameters are fixed.


# %%
def painting_error(y):
    """Return the squared color error, averaged over the pixels, and its gradient."""
    difference = np.where(np.arange(DIM)[:, None, None] < 3, y - x, 0.0)
    return np.square(difference).sum() / (HEIGHT * WIDTH), 2 * difference / (HEIGHT * WIDTH)


def learn(params, steps=200, rate=0.03):
    """Train the offset network only; return the parameters, the errors and the positions of the points at each step."""
    optimizer = AdamW(weight_decay=0.0)
    state, errors, walk = optimizer.init(params["offset_network"]), [], []
    for step in range(steps):
        y, trace = deformable_layer(x, params, config)
        error, cotangent = painting_error(y)
        _, grads = deformable_layer_vjp(cotangent, trace, params, config)
        now = scheduled_rate(step, steps, rate, warmup_steps=10)
        network, state = optimizer.step(params["offset_network"], grads["offset_network"], state, now)
        params = {**params, "offset_network": network}
        errors.append(error)
        walk.append(trace.points_px[0, 0].reshape(-1, 2))
    return params, np.array(errors), np.array(walk)


untrained = params
params, errors, walk = learn(untrained)
raw, network = offset_network(query, params["offset_network"], stride=STRIDE, padding=((0, 0), (0, 0)))

# %% [markdown]
# **Claim.** `dat_ref.ops.offsets.offset_network` computes the offset of a point from the queries in its own cell, and
# from nothing else. The figure shows the cell with the nose.

# %% alt="The cell with the nose; its 16 filter outputs as bars; their running sums, which end at the two offsets"
CELL = (3, 3)  # row, column: the cell with the nose
filters = params["offset_network"]
normed, activated = (part[0, :, CELL[0], CELL[1]] for part in (network.normed, network.activated))
parts = filters["pointwise"]["weight"] * activated  # (2, 16): contribution of each filter to (Δy, Δx)

figure, (where, bars, summed) = plt.subplots(1, 3, figsize=(8.8, 2.4), width_ratios=[1.2, 1, 1.1])
on_photo(where, "the network reads one cell ...")
left, top = 10 * CELL[1] - 0.5, 10 * CELL[0] - 0.5
where.add_patch(Rectangle((left, top), 10, 10, fill=False, ec="white", lw=1.6))
where.scatter(*reference_px[CELL][::-1], s=26, color="white", ec=style.INK, lw=0.8, zorder=4)
bars.bar(range(DIM), normed, color=style.HAIRLINE, width=0.8, label="after LayerNorm")
bars.bar(range(DIM), activated, color=BLUE, width=0.45, label="after GELU")
bars.set(xticks=[], xlabel="16 filters", title="... as 16 numbers ...")
bars.legend(loc="lower right", fontsize=7)
for axis, (name, color) in enumerate((("$\\Delta_y$", ORANGE), ("$\\Delta_x$", GREEN))):
    summed.plot(np.cumsum(np.append(0, parts[axis])), color=color, lw=1.8, drawstyle="steps-post")
    summed.annotate(name, (DIM + 0.3, parts[axis].sum()), color=color, va="center", size=9)
summed.axhline(0, color=style.HAIRLINE, lw=0.6, zorder=0)
summed.set(xlim=(0, DIM + 2), xticks=[], xlabel="filter by filter", title="... that sum to two offsets")
plt.show()

# %%
assert offset_padding(SIZE, config.kernel_size, STRIDE, config.convention) == ((0, 0), (0, 0))  # cells without overlap
cell = query[0, :, 10 * CELL[0] : 10 * CELL[0] + 10, 10 * CELL[1] : 10 * CELL[1] + 10]
filtered = (filters["depthwise"]["weight"][:, 0] * cell).sum(axis=(1, 2)) + filters["depthwise"]["bias"]
by_hand = filters["pointwise"]["weight"] @ gelu(layer_norm(filtered.reshape(1, -1, 1, 1), **filters["norm"])).ravel()
np.testing.assert_allclose(by_hand, raw[0, :, CELL[0], CELL[1]])

# %% [markdown]
# ## 5. The maximum offset: what s does
#
# $\Delta$ is unbounded. A tanh bounds it, and $s$ sets the maximum offset:
#
# $$ \tilde p = p + \tfrac{s}{2} \cdot \text{pitch} \cdot \tanh \Delta, $$
#
# where the pitch is the distance between neighboring reference points. **A point can move at most $s/2$ key cells in
# each direction**: $s$ is the length of its leash. It stays in a square of $s \times s$ cells around its reference
# point. With $s = 1$ these squares are the cells. They tile the map, and no two points can ever meet. With $s = 2$,
# the value of the 2022 release, a square ends at the neighboring reference points, and four points can come to each
# position. With $s = 0$ no point moves.
#
# **Claim** (`dat_ref.ops.offsets.bound_offsets`). No component of an offset exceeds $s/2$ cells. The squares of
# $s = 1$ cover each pixel once, those of $s = 2$ cover each inner pixel four times.

# %% alt="The cat with the squares that points may reach: separate at s = 0.5, tiling at 1, overlapping at 2"
raw_offsets = raw.reshape(1, 1, 2, *keys).transpose(0, 1, 3, 4, 2)  # (1, 1, 4, 6, 2), (y, x) last
updated = {}
followed = CELL[0] * keys[1] + CELL[1]  # index of the point with the orange square
figure, panels = plt.subplots(1, 3, figsize=(8.8, 2.4))
for axes, s in zip(panels, (0.5, 1.0, 2.0)):
    bounding = {"offset_range": s, "convention": config.convention}
    _, points = bound_offsets(raw_offsets, reference, config.offset_bound, **bounding)
    updated[s] = to_pixels(points, SIZE, config.convention)[0, 0].reshape(-1, 2)
    on_photo(axes, f"s = {s:g}", dark=True)
    for number, ((y0, x0), (y1, x1)) in enumerate(zip(reference_px.reshape(-1, 2), updated[s])):
        corner, mine = (x0 - s / 2 * STRIDE, y0 - s / 2 * STRIDE), number == followed
        axes.add_patch(Rectangle(corner, s * STRIDE, s * STRIDE, fc=(1, 1, 1, 0.11), ec=(1, 1, 1, 0.25), lw=0.5))
        axes.add_patch(Rectangle(corner, s * STRIDE, s * STRIDE, fill=False, ec=ORANGE, lw=1.6 * mine, zorder=3))
        axes.plot([x0, x1], [y0, y1], color="white", lw=0.9)
        axes.scatter(x1, y1, s=34 if mine else 13, color=ORANGE, ec="white", lw=0.6, zorder=4)
    axes.set(xlim=(-0.5, WIDTH - 0.5), ylim=(HEIGHT + 5, -0.5))
plt.show()

# %%
for s, points in updated.items():
    assert np.abs(points - reference_px.reshape(-1, 2)).max() <= s / 2 * STRIDE
_, unmoved = bound_offsets(raw_offsets, reference, config.offset_bound, offset_range=0.0, convention=config.convention)
np.testing.assert_array_equal(unmoved[0, 0], reference)  # s = 0
within = {s: np.abs(positions[:, None] - reference_px.reshape(-1, 2)).max(axis=2) < s / 2 * STRIDE for s in (1, 2)}
assert (within[1].sum(axis=1) == 1).all()
inner = ((positions >= 5) & (positions < np.array(SIZE) - 5)).all(axis=1)
assert (within[2].sum(axis=1)[inner] == 4).all()

# %% [markdown]
# More about $s$, and why DAT++ has no such bound: [Offsets, their range and groups](../03_offsets_range_and_groups/).
#
# ## 6. Sampling between pixels
#
# A moved point $\tilde p$ is rarely at the center of a pixel. It reads the four pixels around it, with larger weights
# for nearer ones:
#
# $$ \tilde x = \phi(x;\ \tilde p) = \sum_r g(\tilde p_y, r_y)\, g(\tilde p_x, r_x)\, x[r], \qquad
# g(a, b) = \max(0,\ 1 - |a - b|). $$
#
# Rounding to the nearest pixel would give almost the same value, but no gradient: a small move of the point would not
# change the reading. The interpolated reading changes with every small move, and its slope gives the direction of
# improvement.
#
# **Claim** (`dat_ref.ops.sampling.bilinear_sample`). A reading is a weighted mean of four pixels, and its slope is not
# zero. The right panels show the palettes: the colors at the reference points and at the moved points.

# %% alt="A point and the weights of four pixels; the 24 colors read on the grid, and after moving" live="sampling"
points_px = updated[2.0]
readings = {
    "reference points": bilinear_sample(x, reference_px.reshape(1, -1, 2)),  # (1, 16, 24)
    "moved points": bilinear_sample(x, points_px[None]),
}
shown = np.abs(points_px % 1 - [0.3, 0.6]).max(axis=1).argmin()  # a point well between the pixels
y, x_position = points_px[shown]
top, left = int(np.floor(y)), int(np.floor(x_position))
four = {
    (row, column): (1 - abs(y - row)) * (1 - abs(x_position - column))
    for row in (top, top + 1)
    for column in (left, left + 1)
}


def as_paint(colors):
    """Return colors (3 or more, N) as rows of red, green and blue."""
    return np.clip(colors[:3].T + 0.5, 0, 1)


figure, (close, *palettes) = plt.subplots(1, 3, figsize=(8.8, 2.4), width_ratios=[1, 1.2, 1.2])
close.imshow(as_paint(colors.reshape(3, -1)).reshape(*SIZE, 3))
for (row, column), weight in four.items():
    close.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, ec="white", lw=0.8))
    close.text(column, row - 0.33, f"{weight:.2f}", color="white", size=9, ha="center", va="center")
close.scatter(x_position, y, s=60, color=ORANGE, ec="white", lw=1.2, zorder=4)
close.set(xlim=(left - 1.5, left + 2.5), ylim=(top + 2.5, top - 1.5), xticks=[], yticks=[])
close.set_title("one point, four weights")
for axes, (name, reading) in zip(palettes, readings.items()):
    axes.imshow(as_paint(reading[0]).reshape(*keys, 3))
    axes.set(xticks=np.arange(0.5, 5), yticks=np.arange(0.5, 3), title=f"24 readings at {name}")
    axes.tick_params(length=0, labelbottom=False, labelleft=False)
    axes.grid(color="white", lw=2.5)
    axes.spines[:].set_visible(False)
plt.show()

# %%
by_hand = sum(weight * x[0, :, row, column] for (row, column), weight in four.items())
np.testing.assert_allclose(readings["moved points"][0, :, shown], by_hand)
np.testing.assert_allclose(sum(four.values()), 1)
assert (np.rint(points_px) == np.rint(points_px + [1e-3, 0])).all(axis=1).mean() > 0.9  # rounding hides a small move
nudged = bilinear_sample(x, points_px[None] + [1e-3, 0])
assert (np.abs(nudged - readings["moved points"])[0, :3].max(axis=0) > 0).all()  # every reading changes
for name in ("an eye", "the nose"):  # only moved points read the pupil's black and the nose's red
    wanted = colors[(slice(None), *QUERIES[name])]
    on_grid, found = (np.square(reading[0, :3].T - wanted).sum(axis=1).min() for reading in readings.values())
    assert found < on_grid / 3

# %% [markdown]
# ## 7. Why all queries share the keys
#
# This is the central design decision. We have 24 points, predicted from 24 cells. They do **not** belong to single
# queries: all 2400 queries use the same points. Deformable convolution and Deformable DETR instead give each query its
# own points.
#
# The reason is cost: fetching features from arbitrary positions is the expensive step. Shared points are read once:
# $N_s C$ values. Points of each query are read once *for each query*: $HW N_s C$ values. With shared keys, the rest of
# the layer is plain attention, a matrix product.
#
# The price is that two queries cannot send the same point to different positions. But each query still has its own
# softmax weights over the points.
#
# **Claim.** Sharing reduces the number of fetched values by a factor of $HW = 2400$. It does not change the operation:
# if every query gets a copy of the shared points, `dat_ref.peers.per_query` returns the same output.

# %% alt="The cat three times with the same 24 points; circles, larger for more attention, differ by the query"
sampled = readings["moved points"].reshape(1, DIM, *keys)  # (1, 16, 4, 6): no query axis
k, v = (split_heads(linear(sampled, **params[name]), 1) for name in ("key", "value"))  # (1, 1, 24, 16)
points = from_pixels(points_px[None, None], SIZE, config.convention)  # (1, 1, 24, 2), from -1 to 1
bias = table_bias(params["position_bias"]["table"], points, query_size=SIZE, convention=config.convention)
attended, attention = attend(q, k, v, bias, config.scale)  # (1, 1, 2400, 16), (1, 1, 2400, 24)

figure, panels = plt.subplots(1, 3, figsize=(8.8, 2.1))
paint = as_paint(sampled.reshape(DIM, -1))
for axes, (name, pixel) in zip(panels, QUERIES.items()):
    on_photo(axes, f"weights of {name}", dark=True)
    shares = attention[0, 0, pixel[0] * WIDTH + pixel[1]]
    axes.scatter(*points_px.T[::-1], s=7, color="white", alpha=0.5, lw=0)
    axes.scatter(*points_px.T[::-1], s=900 * shares, color=paint, ec="white", lw=0.7, zorder=4)
    star(axes, pixel)
plt.show()

# %%
ran = count(deformable_layer, x, params, config)
shared = ran.within("_sample_groups").gathers
own = attention_terms(1, SIZE, PerQueryAttentionConfig(DIM, heads=1, kernel_size=5))["sampling"].gathers
assert shared == 4 * 24 * DIM  # four pixels of sixteen channels for every point
assert own == 2 * HEIGHT * WIDTH * 4 * 25 * DIM  # 25 for each query, a kernel of 5 × 5, for keys and for values
print(f"values fetched: {shared:,} with 24 shared points, {own:,} with 25 points for each query")

copies = np.repeat(points_px[None, None, None], HEIGHT * WIDTH, axis=2)  # (1, 1, 2400, 24, 2)
unbiased, _ = attend(q, k, v, None, config.scale)
same, _ = attend_at_points(query.reshape(1, DIM, -1), x, copies, params, heads=1)
np.testing.assert_allclose(same, merge_heads(unbiased, (HEIGHT * WIDTH,)), atol=1e-10)

# %% [markdown]
# ## 8. Why the bias is interpolated
#
# The scores $q \cdot k$ do not depend on the position of a key. Window attention adds a position bias from a table: a
# number $\hat B$ for every displacement of a key from its query, in whole pixels. Our points are not at whole pixels,
# so their displacements are *between* the entries. Rounding is possible. But then the bias would stay constant while a
# point moves, and jump when the point crosses half a pixel. With rounding, a small move would not change the bias, so
# the bias would give the point no gradient.
#
# So the table is read in the same way as the photograph, with the same $\phi$:
#
# $$ B_{mn} = \phi\bigl(\hat B;\ q_m - \tilde p_n + (H - 1,\ W - 1)\bigr). $$
#
# **Claim** (`dat_ref.ops.bias.table_bias`). Between entries the bias is continuous and has a slope. At whole pixels it
# equals an entry, so the table of window attention is a special case.

# %% alt="Positions that the nose reads in the bias table; one close up; two curves" plot=true live="bias"
table = params["position_bias"]["table"]
nose = QUERIES["the nose"]
reading_at = table_positions(points, table.shape[1:], SIZE, config.convention)[0, 0, nose[0] * WIDTH + nose[1]]

steps = np.linspace(-3, 3, 601)
sliding = np.stack([np.full_like(steps, nose[0] - 12), nose[1] - 12 + steps], axis=-1)  # a key, 12 up and 12 left
geometry = {"query_size": SIZE, "convention": config.convention}
slid = table_bias(table, from_pixels(sliding[None, None], SIZE, config.convention), **geometry)[0, 0]
slid = slid[nose[0] * WIDTH + nose[1]]
rounded = table[0, HEIGHT - 1 + 12, np.rint(WIDTH - 1 + 12 - steps).astype(int)]

figure, (whole, close, along) = plt.subplots(1, 3, figsize=(8.8, 2.4), width_ratios=[1.25, 1, 1.1])
whole.imshow(table[0], cmap=style.FIELD)
whole.scatter(*reading_at.T[::-1], s=9, color=ORANGE, lw=0)
whole.set(xticks=[0, WIDTH - 1, 2 * WIDTH - 2], yticks=[0, HEIGHT - 1, 2 * HEIGHT - 2])
whole.set(xticklabels=["-59", "0", "59"], yticklabels=["-39", "0", "39"], title="positions that the nose reads")
entry = np.floor(reading_at[shown]).astype(int)
close.imshow(table[0], cmap=style.FIELD, vmin=table[0][tuple(entry)] - 0.1, vmax=table[0][tuple(entry)] + 0.1)
for row in range(entry[0] - 1, entry[0] + 3):
    for column in range(entry[1] - 1, entry[1] + 3):
        close.text(column, row - 0.33, f"{table[0, row, column]:.3f}", ha="center", va="center", size=7)
close.scatter(*reading_at[shown][::-1], s=40, color=ORANGE, ec="white", zorder=4)
close.set(xlim=(entry[1] - 1.5, entry[1] + 2.5), ylim=(entry[0] + 2.5, entry[0] - 1.5), xticks=[], yticks=[])
close.set_title("one of these positions")
along.plot(steps, rounded, color=style.HAIRLINE, lw=1.6, label="rounded", drawstyle="steps-mid")
along.plot(steps, slid, color=BLUE, lw=1.8, label="interpolated")
along.set(xlabel="displacement, pixels", title="bias of a moving key")
along.legend(loc="upper left")
plt.show()

# %%
on_a_pixel = table_bias(table, from_pixels(np.array([[[[21.0, 23.0]]]]), SIZE, config.convention), **geometry)
np.testing.assert_allclose(
    on_a_pixel[0, 0, nose[0] * WIDTH + nose[1], 0], table[0, 39 + nose[0] - 21, 59 + nose[1] - 23]
)
assert (np.diff(slid) > 0).all()  # a nearer key always has a larger bias ...
assert (np.diff(rounded) == 0).mean() > 0.98  # ... with rounding, a small step rarely changes it

# %% [markdown]
# So a point gets its gradient by two paths: through the features that it reads, and through the bias table. The second
# path is easily forgotten in a port; [gradients by hand](../04_gradients_by_hand/) shows the consequence.
#
# ## 9. Softmax and weighted mean
#
# $$ z = \operatorname{softmax}\Bigl(\frac{q\,\tilde k^{\top}}{\sqrt d} + B\Bigr)\,\tilde v, \qquad
# \tilde k = \tilde x W_k,\quad \tilde v = \tilde x W_v . $$
#
# **Claim** (`dat_ref.ops.attention.attend`). A repainted pixel is a weighted mean of the readings. The weights sum to
# one, and both terms, color and position, affect them. The figure shows the terms for the query at the nose, each key
# in the color of its reading.

# %% alt="Bars for 24 keys, each in the color that it reads: color term, position term, weight; then the mixture"
number = nose[0] * WIDTH + nose[1]
content = (q @ k.swapaxes(2, 3))[0, 0, number] * config.scale
terms = {"color: $q\\tilde k^\\top\\!/\\sqrt{d}$": content - content.max(), "position: $B$": bias[0, 0, number]}
shares = attention[0, 0, number]

figure, panels = plt.subplots(1, 4, figsize=(8.8, 2.2), width_ratios=[1, 1, 1, 0.5])
for axes, (name, values) in zip(panels, {**terms, "weight": shares}.items()):
    axes.bar(range(24), values, color=paint, ec=style.QUIET, lw=0.3, width=0.85)
    axes.set(xticks=[], xlabel="24 keys", title=name)
painted = as_paint((shares @ v[0, 0])[:, None])[0]
original = as_paint(x[0, :, nose[0], nose[1]][:, None])[0]
for height, (name, color) in enumerate({"output": painted, "original": original}.items()):
    panels[3].add_patch(Rectangle((0, height), 1, 0.8, color=color))
    panels[3].text(0.5, height + 0.4, name, ha="center", va="center", size=8, color="white")
panels[3].set(xlim=(0, 1), ylim=(-0.1, 1.9), xticks=[], yticks=[])
panels[3].spines[:].set_visible(False)
plt.show()

# %%
np.testing.assert_allclose(attention.sum(axis=-1), 1)
np.testing.assert_allclose(softmax(content + bias[0, 0, number]), shares)
for name, alone in {"color only": softmax(content), "position only": softmax(bias[0, 0, number])}.items():
    print(f"{name}: {np.abs(alone - shares).sum() / 2:.0%} of the attention goes to other keys")
    assert np.abs(alone - shares).sum() / 2 > 0.05

# %% [markdown]
# ## 10. The whole layer
#
# The last step is the output projection $y = z W_o$. Here it passes the colors through unchanged.
# `dat_ref.DeformableAttention` computes all these steps in one call, and `return_trace=True` also returns every
# intermediate by name.
#
# **Claim.** The steps above and the single call give the same result. Moving the points helps: with moved points the
# error is less than a third of the error on the grid. It is also smaller than with *all* 2400 pixels as keys. With so
# many keys the mean dilutes the rare colors, and these fixed weights cannot restore them.
#
# With zero offsets the 24 keys are clearly worse than all 2400. So the number of keys alone decides little; their
# positions matter when the grid reads only 4 % of the map.

# %% alt="The cat and three repaintings with their errors: from all pixels, from the grid, from the moved points"
layer = dat_ref.DeformableAttention(config, params)
y, trace = layer(x, return_trace=True)
pictures = {
    "the map": x[0],
    "from 2400 keys: every pixel": (full @ flat).T.reshape(3, *SIZE),
    "from 24 keys at the reference points": dat_ref.DeformableAttention(config, untrained)(x)[0],
    "from 24 moved keys": y[0],
}
error_of = {name: np.square(picture[:3] - colors).sum(axis=0).mean() for name, picture in pictures.items()}

figure, panels = plt.subplots(2, 2, figsize=(8.2, 6.0))
for axes, (name, picture) in zip(panels.ravel(), pictures.items()):
    axes.imshow(as_paint(picture[:3].reshape(3, -1)).reshape(*SIZE, 3), interpolation="nearest")
    axes.set(xticks=[], yticks=[], title=name)
    axes.set_xlabel(f"mean squared error {1000 * error_of[name]:.1f} ‰" if error_of[name] else "")
    axes.spines[:].set_visible(False)
plt.show()

# %%
np.testing.assert_allclose(trace.points_px[0, 0].reshape(-1, 2), points_px)
np.testing.assert_allclose(trace.attention, attention)
np.testing.assert_allclose(y, linear(merge_heads(attended, SIZE), **params["output"]), atol=1e-12)
_, all_pixels, on_the_grid, with_moved = error_of.values()
assert with_moved < on_the_grid / 3
assert with_moved < all_pixels < on_the_grid
variety = {name: picture[:3].var(axis=(1, 2)).sum() for name, picture in pictures.items()}  # variance of the colors
assert variety["from 2400 keys: every pixel"] < variety["from 24 moved keys"] < variety["the map"]

# %% [markdown]
# ## 11. How the points learned
#
# The training data do not say where the eyes are. A point reads four pixels, and the repainted picture has errors. The
# gradient of the error with respect to the *position* gives the direction in which the reading improves. After two
# hundred steps the network has filters that detect in which direction a useful color is.
#
# **Claim** (`dat_ref.layer.deformable_layer_vjp`). The error decreases although only the offset network is trained,
# and no offset ever exceeds its maximum. Many coordinates end *on* a row or column of pixels, far more than by chance.
# The loss has creases along those lines, and a crease can be a local minimum; [gradients by
# hand](../04_gradients_by_hand/) moves a point across one.
#
# This result is for one photograph and one layer: the network was trained and tested on the same picture. [Notebook
# 07](../07_where_it_looks/) trains a layer on many pictures and tests it on new ones, next to a control without
# offsets.

# %% alt="Paths of the 24 points over the cat from the grid to their final positions; the error falls with the steps"
figure, (axes, fall) = plt.subplots(1, 2, figsize=(8.8, 3.1), width_ratios=[1.35, 1])
on_photo(axes, "paths of 24 points in 200 steps")
for point in range(24):
    axes.plot(*walk[:, point].T[::-1], color="white", lw=1.1, alpha=0.9)
axes.scatter(*walk[0].T[::-1], s=14, color="white", ec=style.INK, lw=0.6, zorder=3)
axes.scatter(*points_px.T[::-1], s=30, color=ORANGE, ec="white", lw=0.9, zorder=4)
fall.plot(1000 * errors, color=BLUE, lw=1.6)
fall.set(yscale="log", yticks=[1, 2, 5], xlabel="step", title="mean squared error, ‰")
fall.yaxis.set_major_formatter("{x:g}")
fall.minorticks_off()
plt.show()

# %%
assert errors[-1] < errors[0] / 3
assert np.abs(walk - reference_px.reshape(-1, 2)).max() <= STRIDE
on_a_line = (np.abs(points_px - points_px.round()) < 0.05).mean()
print(f"{on_a_line:.0%} of the coordinates are within 0.05 pixels of a row or column; 10% by chance")
assert on_a_line > 0.2
for name in ("query", "key", "value", "output", "position_bias"):
    assert params[name] is untrained[name]

# %% [markdown]
# ## Three questions
#
# **Why do all queries share the keys?** Because fetching features is expensive: 24 shared points are read once, 24
# points of each query 2400 times. Each query still decides by its softmax weights which points it uses. *(Section 7)*
#
# **What does $s$ do?** It limits the offsets: a point can move at most $s/2$ key cells in each direction. With $s = 1$
# the points divide the map among them. With $s = 2$ a point can move as far as the reference points of its neighbors.
# *(Section 5)*
#
# **Why is the bias interpolated?** Because moved points are between pixels, and so are their displacements. With
# rounding, a small move would not change the bias, so the bias would give no gradient. *(Section 8)*
#
# A full layer has several heads and groups of points, and all its weights are trained; it has no other parts. Next:
# [coordinates](../02_coordinates/), about errors of half a pixel, or [the spec](../../spec/), equation by equation.

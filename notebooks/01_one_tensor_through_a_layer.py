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
# You know attention: queries ask, keys answer, a softmax mixes values. **Deformable attention changes one thing: where
# the keys come from.** This notebook follows one photograph through one layer and looks at every step. At its end
# three questions should be easy: why all queries share their keys, what the number $s$ does, and why the position bias
# is interpolated.
#
# To see anything the layer needs a task that a person can judge by eye. Ours: **paint the photograph again, having
# read it in only 24 places.** Each of its 2400 pixels is to become a mixture of these 24 readings. So the readings are
# a palette, and attention mixes the paint.
#
# Each section makes a claim, names the function of `dat_ref` that it is about, draws it, and ends with an assertion.

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
    """Show the photograph in pixels of the map, so that a point of the map is drawn where it lies."""
    axes.imshow(dim(photo) if dark else photo, extent=(-0.5, WIDTH - 0.5, HEIGHT - 0.5, -0.5))
    axes.set(xticks=[], yticks=[], title=title)
    axes.spines[:].set_visible(False)


def star(axes, pixel):
    axes.scatter(pixel[1], pixel[0], marker="*", s=150, color=style.QUERY, ec="white", lw=0.9, zorder=6)


# %% [markdown]
# ## 1. The simple picture, and where it fails
#
# In plain attention every pixel asks every pixel. Say that pixels attend to what has their own color $a$, and a little
# more if it is near. One short line does that, with $\beta$ a sharpness and $B$ a bias that falls with the distance:
#
# $$ A_{mn} = \operatorname{softmax}_n \bigl(-\beta\, |a_m - a_n|^2 + B_{mn}\bigr). $$
#
# The matrix has 2400 × 2400 entries, though the photograph shows fur, two eyes, a nose and a blurred room. A usual
# cure is a **window**: ask only the pixels of your own square. It is cheap, and it is decided before anybody has
# looked. The eye's window knows of the nose as little as of the other eye.
#
# **Claim.** Those 2400 rows are nearly all mixtures of a few: 24 directions carry 98 % of what the matrix holds. So 24
# keys could do, for everybody, *if they lay in the right places*.

# %%
BETA, NEAR = 60.0, 30.0  # sharpness; how far "near" goes, in pixels
flat = colors.reshape(3, -1).T  # (2400, 3)
places = np.stack(np.divmod(np.arange(HEIGHT * WIDTH), WIDTH), axis=1)  # (2400, 2)


def squared_distances(one, other):
    return np.square(one[:, None] - other[None]).sum(axis=-1)


everyone = softmax(-BETA * squared_distances(flat, flat) - squared_distances(places, places) / (2 * NEAR**2))
strength = np.linalg.svd(everyone[::4], compute_uv=False) ** 2  # every fourth query will do
carried = np.cumsum(strength) / strength.sum()

figure, panels = plt.subplots(2, 2, figsize=(8.2, 5.5))
for axes, (name, pixel) in zip(panels.ravel(), QUERIES.items()):
    on_photo(axes, f"{name} asks everybody", dark=True)
    row = everyone[pixel[0] * WIDTH + pixel[1]].reshape(SIZE)
    axes.imshow(row / row.max(), cmap=style.HEAT, extent=(-0.5, WIDTH - 0.5, HEIGHT - 0.5, -0.5))
    window = [10 * (place // 10) - 0.5 for place in pixel]
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
    xlabel="directions",
    title="share of the matrix that they carry",
)
plt.show()

# %%
assert carried[23] > 0.98
eye, other_eye = QUERIES["an eye"], (17, 41)
row = everyone[eye[0] * WIDTH + eye[1]].reshape(SIZE)
assert row[other_eye] > 50 / row.size  # the other pupil gets more than fifty times an even share ...
assert eye[1] // 10 != other_eye[1] // 10  # ... and lies in another window (white squares)
assert eye[0] // 10 != QUERIES["the nose"][0] // 10  # as does the nose

# %% [markdown]
# ## 2. Queries
#
# $$ q = x W_q $$
#
# The map $x$ has 16 channels: the three of color (0 is grey), in a fourth the squared length $|a|^2$, the others
# empty. That is enough to write the weights down by hand. A dot product is not a distance, but
#
# $$
# -|a - b|^2 = 2\,a \cdot b - |b|^2 - |a|^2 ,
# $$
#
# and softmax does not see $|a|^2$, which is the same for all keys. So the query $(2\beta a,\ -\beta)$ and the key
# $(b,\ |b|^2)$ compare colors. The query's other 12 channels hold random mixtures of color. No key answers them. They
# are for the network of section 4, which looks at queries too.
#
# **Claim.** With these four channels the dot products of `dat_ref.ops.basic.linear`'s queries and keys are the
# attention of section 1.

# %%
DIM, STRIDE = 16, 10
config = dat_ref.DeformableAttentionConfig(
    dim=DIM, heads=1, groups=1, stride=STRIDE, kernel_size=STRIDE, offset_range=2.0, size=SIZE
)
x = np.concatenate([colors, np.square(colors).sum(axis=0, keepdims=True), np.zeros((DIM - 4, *SIZE))])[None]


def weights_by_hand(seed=0):
    """Return a layer that compares colors and passes them on; its points start on the grid."""
    params = dat_ref.init_params(config, seed, offsets="zero_offset", dtype=np.float64)
    sharpness = BETA / config.scale
    mixtures = np.random.default_rng(seed).standard_normal((DIM - 4, 3))
    query = {"weight": np.zeros((DIM, DIM)), "bias": np.zeros(DIM)}
    query["weight"][:3, :3], query["bias"][3] = 2 * sharpness * np.eye(3), -sharpness  # (2βa, -β)
    query["weight"][4:, :3] = sharpness * mixtures
    passing = {"weight": np.diag([1.0] * 4 + [0.0] * (DIM - 4)), "bias": np.zeros(DIM)}  # (b, |b|²), and as it is
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
compared = softmax(content - squared_distances(places, places) / (2 * NEAR**2))
np.testing.assert_allclose(compared, everyone, atol=1e-12)

# %% [markdown]
# ## 3. Reference points
#
# Lay a coarse grid over the map, a point for every $r \times r$ pixels. Here $r = 10$: four rows of six points, each
# in the middle of its cell. They are the places where one would read if one knew nothing of the picture.
#
# **Claim.** `dat_ref.ops.grid.reference_points` are the centers of the cells. They do not depend on the photograph.

# %%
keys = key_grid_size(SIZE, config.kernel_size, STRIDE, config.convention)
reference = reference_points(keys, config.convention)  # (4, 6, 2), from -1 to 1
reference_px = to_pixels(reference, SIZE, config.convention)  # the same in pixels of the map


def cells(axes):
    for y in range(0, HEIGHT + 1, STRIDE):
        axes.axhline(y - 0.5, color="white", lw=0.5, alpha=0.6)
    for at in range(0, WIDTH + 1, STRIDE):
        axes.axvline(at - 0.5, color="white", lw=0.5, alpha=0.6)


figure, axes = plt.subplots(figsize=(4.9, 3.3))
on_photo(axes, "24 cells of 10 × 10 pixels, and a reference point in each")
cells(axes)
axes.scatter(*reference_px.reshape(-1, 2).T[::-1], s=26, color="white", ec=style.INK, lw=0.8, zorder=4)
plt.show()

# %%
rows, columns = 10 * np.arange(4) + 4.5, 10 * np.arange(6) + 4.5  # 4.5: the middle of pixels 0 … 9
np.testing.assert_allclose(reference_px, np.stack(np.meshgrid(rows, columns, indexing="ij"), axis=-1))

# %% [markdown]
# Half a pixel more or less would be wrong here, and both released codes are: that is the [next
# notebook](../02_coordinates/), and [a page of its own](../../conventions/).
#
# ## 4. Where to look instead
#
# None of the 24 points reads the black of a pupil or the red of the nose. A small network, the same at every cell,
# looks at the queries *around a reference point* and says how far the point should move:
#
# $$ \Delta = W_2\ \mathrm{GELU}\bigl(\mathrm{LayerNorm}(\mathrm{DWConv}_{k \times k,\ \text{stride } r}(q))\bigr). $$
#
# With $k = r$ it sees just its own cell. Sixteen filters, one for each channel, turn the cell into 16 numbers, and
# $W_2$ turns those into two: down and right.
#
# This network is the one part of the layer that we cannot write down by hand. So it learns, here and now: 200 steps of
# gradient descent on the error of the painted photograph. Everything else stays as it is.


# %%
def painting_error(y):
    """Return the mean squared error of the painted colors, a pixel, and its gradient."""
    difference = np.where(np.arange(DIM)[:, None, None] < 3, y - x, 0.0)
    return np.square(difference).sum() / (HEIGHT * WIDTH), 2 * difference / (HEIGHT * WIDTH)


def learn(params, steps=200, rate=0.03):
    """Train the offset network alone; return the parameters, the errors, and where the points went."""
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
# **Claim.** `dat_ref.ops.offsets.offset_network` makes a point's offset of the queries in that point's own cell, and
# of nothing else. For the cell below:

# %%
CELL = (3, 3)  # row, column: the cell with the nose
filters = params["offset_network"]
normed, activated = (part[0, :, CELL[0], CELL[1]] for part in (network.normed, network.activated))
parts = filters["pointwise"]["weight"] * activated  # (2, 16): what each filter adds to (Δy, Δx)

figure, (where, bars, summed) = plt.subplots(1, 3, figsize=(8.8, 2.4), width_ratios=[1.2, 1, 1.1])
on_photo(where, "the network looks at one cell ...")
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
summed.set(xlim=(0, DIM + 2), xticks=[], xlabel="filter by filter", title="... that add up to two")
plt.show()

# %%
assert offset_padding(SIZE, config.kernel_size, STRIDE, config.convention) == ((0, 0), (0, 0))  # cells, side by side
cell = query[0, :, 10 * CELL[0] : 10 * CELL[0] + 10, 10 * CELL[1] : 10 * CELL[1] + 10]
filtered = (filters["depthwise"]["weight"][:, 0] * cell).sum(axis=(1, 2)) + filters["depthwise"]["bias"]
by_hand = filters["pointwise"]["weight"] @ gelu(layer_norm(filtered.reshape(1, -1, 1, 1), **filters["norm"])).ravel()
np.testing.assert_allclose(by_hand, raw[0, :, CELL[0], CELL[1]])

# %% [markdown]
# ## 5. The leash: what s does
#
# $\Delta$ could be anything. So it is squashed, and $s$ says how far a point may go:
#
# $$ \tilde p = p + \tfrac{s}{2} \cdot \text{pitch} \cdot \tanh \Delta, $$
#
# with the pitch the distance from one reference to the next. **$s$ is the width of a square around the reference,
# counted in cells**, and the point stays in it. With $s = 1$ the squares are the cells: they tile the map, and no two
# points can ever meet. With $s = 2$, the released value, a square ends at the neighbors' references, and each place
# can be reached by four points. With $s = 0$ nothing moves.
#
# **Claim** (`dat_ref.ops.offsets.bound_offsets`). No component of an offset exceeds $s/2$ cells. Squares of $s = 1$
# cover each pixel once, those of $s = 2$ each inner pixel four times.

# %%
raw_offsets = raw.reshape(1, 1, 2, *keys).transpose(0, 1, 3, 4, 2)  # (1, 1, 4, 6, 2), (y, x) last
updated = {}
followed = CELL[0] * keys[1] + CELL[1]  # the number of the point with the orange square
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
within = {s: np.abs(places[:, None] - reference_px.reshape(-1, 2)).max(axis=2) < s / 2 * STRIDE for s in (1, 2)}
assert (within[1].sum(axis=1) == 1).all()
inner = ((places >= 5) & (places < np.array(SIZE) - 5)).all(axis=1)
assert (within[2].sum(axis=1)[inner] == 4).all()

# %% [markdown]
# How $s$ and its relatives behave, and why DAT++ let go of the leash: [Offsets, their range and
# groups](../03_offsets_range_and_groups/).
#
# ## 6. Reading between the pixels
#
# A moved point $\tilde p$ hardly ever hits a pixel. So it reads the four around it, the nearer the heavier:
#
# $$ \tilde x = \phi(x;\ \tilde p) = \sum_r g(\tilde p_y, r_y)\, g(\tilde p_x, r_x)\, x[r], \qquad
# g(a, b) = \max(0,\ 1 - |a - b|). $$
#
# Rounding to the nearest pixel would read nearly the same, but nothing could be learned: move the point a little and
# the reading stays what it was. The interpolated one changes with every step, and says which way is better.
#
# **Claim** (`dat_ref.ops.sampling.bilinear_sample`). A reading is a mean of four pixels, and its slope is not zero. On
# the right the whole palette: what the grid reads, and what the moved points read.

# %%
points_px = updated[2.0]
readings = {
    "on the grid": bilinear_sample(x, reference_px.reshape(1, -1, 2)),  # (1, 16, 24)
    "points moved": bilinear_sample(x, points_px[None]),
}
shown = np.abs(points_px % 1 - [0.3, 0.6]).max(axis=1).argmin()  # one that lies well between the pixels
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
    axes.set(xticks=np.arange(0.5, 5), yticks=np.arange(0.5, 3), title=f"24 readings, {name}")
    axes.tick_params(length=0, labelbottom=False, labelleft=False)
    axes.grid(color="white", lw=2.5)
    axes.spines[:].set_visible(False)
plt.show()

# %%
by_hand = sum(weight * x[0, :, row, column] for (row, column), weight in four.items())
np.testing.assert_allclose(readings["points moved"][0, :, shown], by_hand)
np.testing.assert_allclose(sum(four.values()), 1)
assert (np.rint(points_px) == np.rint(points_px + [1e-3, 0])).all(axis=1).mean() > 0.9  # rounded, nearly none would
nudged = bilinear_sample(x, points_px[None] + [1e-3, 0])
assert (np.abs(nudged - readings["points moved"])[0, :3].max(axis=0) > 0).all()  # every reading answers to a nudge
for name in ("an eye", "the nose"):  # a pupil's black and the nose's red are found by moving, not on the grid
    wanted = colors[(slice(None), *QUERIES[name])]
    on_grid, found = (np.square(reading[0, :3].T - wanted).sum(axis=1).min() for reading in readings.values())
    assert found < on_grid / 3

# %% [markdown]
# ## 7. Why all queries share the keys
#
# Now comes the design decision. We have 24 points, found by looking at 24 cells. They are **not** the points of some
# query: all 2400 queries get the same ones. Why not give each query points of its own, as deformable convolution and
# Deformable DETR do?
#
# Because reading is what costs. Shared points are read once: $N_s C$ numbers. Points of each query are read once *for
# each query*: $HW N_s C$. And once keys are shared, what is left is plain attention, a matrix product.
#
# What is given up: two queries cannot send the same point to different places. What is not given up: each query still
# decides by itself *which of the points matter to it*.
#
# **Claim.** Sharing saves a factor of $HW = 2400$ in reading, and it is not another operation: hand every query a copy
# of the shared points, and `dat_ref.peers.per_query` returns the same numbers.

# %%
sampled = readings["points moved"].reshape(1, DIM, *keys)  # (1, 16, 4, 6): no axis of queries
k, v = (split_heads(linear(sampled, **params[name]), 1) for name in ("key", "value"))  # (1, 1, 24, 16)
points = from_pixels(points_px[None, None], SIZE, config.convention)  # (1, 1, 24, 2), from -1 to 1
bias = table_bias(params["position_bias"]["table"], points, query_size=SIZE, convention=config.convention)
attended, attention = attend(q, k, v, bias, config.scale)  # (1, 1, 2400, 16), (1, 1, 2400, 24)

figure, panels = plt.subplots(1, 3, figsize=(8.8, 2.1))
paint = as_paint(sampled.reshape(DIM, -1))
for axes, (name, pixel) in zip(panels, QUERIES.items()):
    on_photo(axes, f"{name} mixes", dark=True)
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
assert own == 2 * HEIGHT * WIDTH * 4 * 25 * DIM  # 25 of each query, a kernel of 5 × 5, for keys and for values
print(f"numbers read: {shared:,} with 24 shared points, {own:,} with 25 points of each query")

copies = np.repeat(points_px[None, None, None], HEIGHT * WIDTH, axis=2)  # (1, 1, 2400, 24, 2)
unbiased, _ = attend(q, k, v, None, config.scale)
same, _ = attend_at_points(query.reshape(1, DIM, -1), x, copies, params, heads=1)
np.testing.assert_allclose(same, merge_heads(unbiased, (HEIGHT * WIDTH,)), atol=1e-10)

# %% [markdown]
# ## 8. Why the bias is interpolated
#
# Attention does not know where a key lies. In a window one tells it with a table: a number $\hat B$ for every
# displacement of a key from its query, in whole pixels. Our points are not on whole pixels, so their displacements
# fall *between* the entries. One could round. But then the bias would stay the same while a point moves, and jump when
# the point crosses half a pixel. A point that is a little too far away would never be told.
#
# So the table is read like the photograph, with the same $\phi$:
#
# $$ B_{mn} = \phi\bigl(\hat B;\ q_m - \tilde p_n + (H - 1,\ W - 1)\bigr). $$
#
# **Claim** (`dat_ref.ops.bias.table_bias`). Between entries the bias is continuous and has a slope. On whole pixels it
# is an entry: the table of a window is the special case.

# %%
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
whole.set(xticklabels=["-59", "0", "59"], yticklabels=["-39", "0", "39"], title="where the nose reads the table")
entry = np.floor(reading_at[shown]).astype(int)
close.imshow(table[0], cmap=style.FIELD, vmin=table[0][tuple(entry)] - 0.1, vmax=table[0][tuple(entry)] + 0.1)
for row in range(entry[0] - 1, entry[0] + 3):
    for column in range(entry[1] - 1, entry[1] + 3):
        close.text(column, row - 0.33, f"{table[0, row, column]:.3f}", ha="center", va="center", size=7)
close.scatter(*reading_at[shown][::-1], s=40, color=ORANGE, ec="white", zorder=4)
close.set(xlim=(entry[1] - 1.5, entry[1] + 2.5), ylim=(entry[0] + 2.5, entry[0] - 1.5), xticks=[], yticks=[])
close.set_title("one of these places")
along.plot(steps, rounded, color=style.HAIRLINE, lw=1.6, label="rounded", drawstyle="steps-mid")
along.plot(steps, slid, color=BLUE, lw=1.8, label="interpolated")
along.set(xlabel="pixels", title="the bias of a key that slides by")
along.legend(loc="upper left")
plt.show()

# %%
on_a_pixel = table_bias(table, from_pixels(np.array([[[[21.0, 23.0]]]]), SIZE, config.convention), **geometry)
np.testing.assert_allclose(
    on_a_pixel[0, 0, nose[0] * WIDTH + nose[1], 0], table[0, 39 + nose[0] - 21, 59 + nose[1] - 23]
)
assert (np.diff(slid) > 0).all()  # nearer is always better ...
assert (np.diff(rounded) == 0).mean() > 0.98  # ... and when rounded, a small step nearly always changes nothing

# %% [markdown]
# So a point is told where to go twice: by the colors that it reads, and by the table. The second path is easily
# forgotten, and [a gradient by hand](../04_gradients_by_hand/) shows what then happens.
#
# ## 9. Softmax, and the mixture
#
# $$ z = \operatorname{softmax}\Bigl(\frac{q\,\tilde k^{\top}}{\sqrt d} + B\Bigr)\,\tilde v, \qquad
# \tilde k = \tilde x W_k,\quad \tilde v = \tilde x W_v . $$
#
# **Claim** (`dat_ref.ops.attention.attend`). A painted pixel is a mixture of the readings: shares add up to one, and
# both terms have a say. Below, what the nose adds up, key by key in the color of its reading.

# %%
number = nose[0] * WIDTH + nose[1]
content = (q @ k.swapaxes(2, 3))[0, 0, number] * config.scale
terms = {"color: $q\\tilde k^\\top\\!/\\sqrt{d}$": content - content.max(), "place: $B$": bias[0, 0, number]}
shares = attention[0, 0, number]

figure, panels = plt.subplots(1, 4, figsize=(8.8, 2.2), width_ratios=[1, 1, 1, 0.5])
for axes, (name, values) in zip(panels, {**terms, "share": shares}.items()):
    axes.bar(range(24), values, color=paint, ec=style.QUIET, lw=0.3, width=0.85)
    axes.set(xticks=[], xlabel="24 keys", title=name)
painted = as_paint((shares @ v[0, 0])[:, None])[0]
original = as_paint(x[0, :, nose[0], nose[1]][:, None])[0]
for height, (name, color) in enumerate({"the mixture": painted, "the pixel": original}.items()):
    panels[3].add_patch(Rectangle((0, height), 1, 0.8, color=color))
    panels[3].text(0.5, height + 0.4, name, ha="center", va="center", size=8, color="white")
panels[3].set(xlim=(0, 1), ylim=(-0.1, 1.9), xticks=[], yticks=[])
panels[3].spines[:].set_visible(False)
plt.show()

# %%
np.testing.assert_allclose(attention.sum(axis=-1), 1)
np.testing.assert_allclose(softmax(content + bias[0, 0, number]), shares)
for name, alone in {"color alone": softmax(content), "place alone": softmax(bias[0, 0, number])}.items():
    print(f"{name}: {np.abs(alone - shares).sum() / 2:.0%} of the shares would go elsewhere")
    assert np.abs(alone - shares).sum() / 2 > 0.05

# %% [markdown]
# ## 10. The whole layer
#
# One projection $y = z W_o$ is left, and here it passes colors on as they are. The sections up to here are what
# `dat_ref.DeformableAttention` does in one call; `return_trace=True` hands out every intermediate by its name.
#
# **Claim.** The steps above and the one call give the same numbers. And the points were worth moving: the same 24
# readings, moved, leave less than a third of the error. They do better than *all* 2400 pixels as keys, since a mean of
# so many washes the rare colors out, and with these weights nothing can bring them back.

# %%
layer = dat_ref.DeformableAttention(config, params)
y, trace = layer(x, return_trace=True)
pictures = {
    "the map": x[0],
    "from 2400 keys: everybody": (everyone @ flat).T.reshape(3, *SIZE),
    "from 24 keys on the grid": dat_ref.DeformableAttention(config, untrained)(x)[0],
    "from 24 moved keys": y[0],
}
off_by = {name: np.square(picture[:3] - colors).sum(axis=0).mean() for name, picture in pictures.items()}

figure, panels = plt.subplots(2, 2, figsize=(8.2, 6.0))
for axes, (name, picture) in zip(panels.ravel(), pictures.items()):
    axes.imshow(as_paint(picture[:3].reshape(3, -1)).reshape(*SIZE, 3), interpolation="nearest")
    axes.set(xticks=[], yticks=[], title=name)
    axes.set_xlabel(f"mean squared error {1000 * off_by[name]:.1f} ‰" if off_by[name] else "")
    axes.spines[:].set_visible(False)
plt.show()

# %%
np.testing.assert_allclose(trace.points_px[0, 0].reshape(-1, 2), points_px)
np.testing.assert_allclose(trace.attention, attention)
np.testing.assert_allclose(y, linear(merge_heads(attended, SIZE), **params["output"]), atol=1e-12)
_, everybody, on_the_grid, with_moved = off_by.values()
assert with_moved < on_the_grid / 3
assert with_moved < everybody < on_the_grid
variety = {name: picture[:3].var(axis=(1, 2)).sum() for name, picture in pictures.items()}  # of colors
assert variety["from 2400 keys: everybody"] < variety["from 24 moved keys"] < variety["the map"]

# %% [markdown]
# ## 11. How the points learned
#
# Nobody told the network what an eye is. A point reads four pixels; the painted picture is wrong here and there; the
# gradient of the error with respect to the *position* says in which direction these four pixels get better. Two
# hundred such steps, and the network has found filters by which a cell says "down and to the left, there is
# something".
#
# **Claim** (`dat_ref.layer.deformable_layer_vjp`). The error falls although only the offset network learns, and the
# points stay on their leashes all the way. A curiosity: many coordinates come to rest *on* a row or column of pixels,
# far more than chance would put there. The error has creases along those lines, and a crease can be the floor of a
# valley; [gradients by hand](../04_gradients_by_hand/) walks across one.

# %%
figure, (axes, fall) = plt.subplots(1, 2, figsize=(8.8, 3.1), width_ratios=[1.35, 1])
on_photo(axes, "24 walks from the grid, 200 steps long")
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
print(f"{on_a_line:.0%} of the coordinates lie within 0.05 pixels of a row or column; chance would put 10% there")
assert on_a_line > 0.2
for name in ("query", "key", "value", "output", "position_bias"):
    assert params[name] is untrained[name]

# %% [markdown]
# ## Three questions
#
# **Why are the keys shared?** Because reading costs: 24 points for everybody are read once, 24 points for each query
# 2400 times. Which of them matter is still each query's own affair. *(Section 7)*
#
# **What does $s$ do?** It is a leash: the width, in cells, of the square that a point stays in. One: the points divide
# the map among them. Two: they may come to where their neighbor started. *(Section 5)*
#
# **Why is the bias interpolated?** Because moved points lie between pixels, and so do their displacements. Rounded,
# the bias would neither know nor tell a point that it moved. *(Section 8)*
#
# A real layer has several heads, groups of points, and learns all of its weights; nothing else is added. From here:
# [coordinates](../02_coordinates/), where half a pixel is at stake, or [the spec](../../spec/), equation by equation.

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
# # Offsets, their range and groups
#
# The offset network predicts an offset for each point. The paper limits the offsets by $s$: a point can move at most
# $s/2$ key cells in each direction. DAT++ has no such limit. Both work. In the paper's own ablation the accuracy
# hardly changes between $s = 1$ and $s = 12$, and drops at $s = 14$.
#
# This notebook examines the limit, the behavior of points without a limit, and a second parameter, the number of
# groups.
#
# Each section makes a claim, names the function of `dat_ref` that it concerns, draws a figure, and ends with
# assertions.

# %%
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.collections import LineCollection, PolyCollection

import dat_ref
from dat_ref import Convention, DeformableAttentionConfig, OffsetBound, viz
from dat_ref.cli.photo import load_photo, normalise, resize
from dat_ref.complexity import attention_terms, total
from dat_ref.data import photograph_path
from dat_ref.layer import LayerTrace, deformable_layer, deformable_layer_vjp, deformable_shapes
from dat_ref.ops.attention import split_heads
from dat_ref.ops.basic import linear
from dat_ref.ops.bias import table_bias
from dat_ref.ops.coverage import coverage
from dat_ref.ops.grid import reference_points, to_pixels
from dat_ref.ops.offsets import bound_offsets, offset_network
from dat_ref.ops.sampling import bilinear_sample, bilinear_sample_vjp
from dat_ref.params import count
from dat_ref.train import AdamW, scheduled_rate
from dat_ref.viz import style
from dat_ref.viz.artists import dim

plt.rcParams.update(style.SETTINGS)
plt.rcParams.update({"figure.dpi": 110, "figure.constrained_layout.use": True})
BLUE, ORANGE, GREEN, PINK = style.GROUP_COLORS[:4]

HEIGHT, WIDTH = SIZE = (28, 42)
photo = load_photo(photograph_path("rocket"))
CONVENTION = Convention.CELL_CENTER


def on_photo(axes, title="", margin=0.0):
    """Show the photograph in pixel coordinates of the map, with a margin."""
    axes.imshow(photo, extent=(-0.5, WIDTH - 0.5, HEIGHT - 0.5, -0.5))
    axes.set(xticks=[], yticks=[], title=title, facecolor=style.MARGIN)
    axes.set(xlim=(-0.5 - margin, WIDTH - 0.5 + margin), ylim=(HEIGHT - 0.5 + margin, -0.5 - margin))
    axes.spines[:].set_visible(False)


def bounded_px(raw, bound, s=2.0):
    """Return the points for raw offsets (B, 1, Hk, Wk, 2), in pixels of the map."""
    reference = reference_points(raw.shape[2:4], CONVENTION)
    _, points = bound_offsets(raw, reference, bound, offset_range=s, convention=CONVENTION)
    return to_pixels(points, SIZE, CONVENTION)


# %% [markdown]
# ## 1. Four bounds on a point
#
# We give one point raw offsets $\Delta$ in all directions, on circles of increasing radius. The bound determines the
# image of the circles.
#
# | bound | point | used by |
# |---|---|---|
# | `TANH_CELLS` | $\tilde p = p + \tfrac s2 \cdot \text{pitch} \cdot \tanh \Delta$ | the paper; DAT with $s = 2$ |
# | `CLAMP` | $\tilde p = \min(1, \max(-1,\ p + \Delta))$ | DAT++ |
# | `TANH_COORDINATES` | $\tilde p = \tanh(p + \Delta)$ | 2022 code, an option |
# | `RAW` | $\tilde p = p + \Delta$ | 2022 code, an option |
#
# **Claim** (`dat_ref.ops.offsets.bound_offsets`). The first bound keeps a point near its reference point, the next two
# keep it on the map, and the last does not limit it. The third moves a point even if $\Delta = 0$, because
# $\tanh p \neq p$.

# %% alt="Points pulled in all directions under four bounds: in squares, to the border, without end" live="offsets"
STRENGTHS = (0.1, 0.2, 0.4, 0.8, 1.6)
KEYS = (2, 3)
angle = np.linspace(0, 2 * np.pi, 241)
circles = np.stack([np.sin(angle), np.cos(angle)], axis=-1)  # (241, 2), (Δy, Δx)
images = {}
BOUNDS = (OffsetBound.TANH_CELLS, OffsetBound.CLAMP, OffsetBound.TANH_COORDINATES, OffsetBound.RAW)
figure, panels = plt.subplots(2, 2, figsize=(8.2, 6.0))
for axes, bound in zip(panels.ravel(), BOUNDS):
    raw = np.stack([strength * circles for strength in (0.0, *STRENGTHS)]).reshape(-1, 1, 1, 1, 2)
    points = bounded_px(np.broadcast_to(raw, (len(raw), 1, *KEYS, 2)), bound)
    images[bound] = points.reshape(len(STRENGTHS) + 1, len(angle), 6, 2)
    on_photo(axes, bound.name, margin=6)
    for key, color in enumerate((BLUE, ORANGE, GREEN, PINK, *style.GROUP_COLORS[4:6])):
        for strength in range(1, len(STRENGTHS) + 1):
            axes.plot(*images[bound][strength, :, key].T[::-1], color=color, lw=1.1)
        axes.plot(*images[bound][0, 0, key][::-1], "o", color="white", mec=color, ms=4)
plt.show()

# %%
reference_px = to_pixels(reference_points(KEYS, CONVENTION), SIZE, CONVENTION).reshape(6, 2)
pitch = np.array([HEIGHT / 2, WIDTH / 3])
assert (np.abs(images[OffsetBound.TANH_CELLS] - reference_px) < pitch).all()  # s = 2: one cell in each direction
for bound in (OffsetBound.CLAMP, OffsetBound.TANH_COORDINATES):
    assert ((images[bound] >= -0.5) & (images[bound] <= np.array(SIZE) - 0.5)).all()
assert (images[OffsetBound.RAW] < -0.5).any()
for bound, image in images.items():
    unmoved = np.allclose(image[0], reference_px)  # Δ = 0
    assert unmoved == (bound is not OffsetBound.TANH_COORDINATES)

# %% [markdown]
# ## 2. For s > 1, points can change their order
#
# Connect neighboring points to a mesh. While each point stays in its own cell, the mesh is stretched and compressed,
# but a point that started above another stays above it. When the squares of two points overlap, the mesh can fold.
#
# **Claim.** For $s \le 1$ no offsets can change the order of two points. For $s > 1$ they can. In the figure, the mesh
# cells that random offsets have folded are filled.

# %% alt="A mesh of points over a photograph for four values of s: no cell is folded up to 1, many are at 2 and 4"
rng = np.random.default_rng(3)
GRID = (8, 12)
raw = rng.normal(scale=1.2, size=(1, 1, *GRID, 2))


def mesh_cells(points):
    """Return the corners of every cell of a mesh (Hk, Wk, 2), counterclockwise or clockwise: (N, 4, 2)."""
    corners = [points[:-1, :-1], points[:-1, 1:], points[1:, 1:], points[1:, :-1]]
    return np.stack(corners, axis=2).reshape(-1, 4, 2)


def is_folded(cells):
    """Return the cells (N, 4, 2) in which two neighbors have changed their vertical or horizontal order."""
    upper_left, upper_right, lower_right, lower_left = cells.swapaxes(0, 1)
    columns = (upper_left[:, 0] > lower_left[:, 0]) | (upper_right[:, 0] > lower_right[:, 0])
    rows = (upper_left[:, 1] > upper_right[:, 1]) | (lower_left[:, 1] > lower_right[:, 1])
    return columns | rows


figure, panels = plt.subplots(2, 2, figsize=(8.2, 5.7))
folded = {}
for axes, s in zip(panels.ravel(), (0.5, 1.0, 2.0, 4.0)):
    net = bounded_px(raw, OffsetBound.TANH_CELLS, s)[0, 0]
    folded[s] = is_folded(mesh_cells(net))
    on_photo(axes, f"s = {s:g}: {folded[s].sum()} of {folded[s].size} folded")
    lines = [*net, *net.swapaxes(0, 1)]
    axes.add_collection(PolyCollection(list(mesh_cells(net)[folded[s]][..., ::-1]), fc=ORANGE, alpha=0.5, lw=0))
    axes.add_collection(LineCollection([line[:, ::-1] for line in lines], colors="white", linewidths=0.7))
    axes.plot(*net.reshape(-1, 2).T[::-1], ".", color="white", ms=3)
plt.show()

# %%
hardest = 50 * rng.choice([-1.0, 1.0], size=(400, 1, *GRID, 2))  # tanh Δ = ±1
for s in (0.5, 1.0):
    net = bounded_px(hardest, OffsetBound.TANH_CELLS, s)[:, 0]
    above, below = net[:, :-1, :, 0].max(axis=2), net[:, 1:, :, 0].min(axis=2)  # neighboring rows of points
    left, right = net[:, :, :-1, 1].max(axis=1), net[:, :, 1:, 1].min(axis=1)  # neighboring columns
    assert (above <= below + 1e-9).all()
    assert (left <= right + 1e-9).all()
    assert not folded[s].any()
assert 0 < folded[2.0].sum() < folded[4.0].sum()

# %% [markdown]
# Folding is harmless: attention treats the keys as a set, and softmax does not depend on their order. It only means
# that the index of a point no longer determines its relative position.
#
# ## 3. Offsets on a blank map
#
# The last layer of the offset network, $W_2$, has no bias, "to avoid a compulsory shift": without evidence a point
# should not move. A blank map, with the same color everywhere, contains no evidence.
#
# But $W_2$ follows a layer norm, which scales any input to variance one. A blank window gives 16 different numbers,
# and after the norm they are as large as those of any other window. So the points move. All windows are equal, so all
# offsets are equal.
#
# **Claim.** On a blank map all points have the same offset, and it is about as long as the offsets on a photograph.
# Omitting the last bias does not prevent a compulsory shift. Initializing $W_2$ to zero does
# (`init_params(..., offsets="zero_offset")`).

# %% alt="Offsets on a photograph and on a blank map, where all are equal; their lengths for 20 seeds are alike"
small = resize(photo, SIZE).transpose(2, 0, 1)[None]
DIM = 16
config = DeformableAttentionConfig(dim=DIM, heads=1, stride=7, kernel_size=7, size=SIZE)
spread = np.random.default_rng(0).normal(size=(DIM, 3))
scenes = {"a blank map": np.full_like(small, 0.3), "the photograph": small}


def initial_offsets(colors, seed, offsets="released"):
    """Return the offsets of an untrained layer, in pixels: (4, 6, 2)."""
    params = dat_ref.init_params(config, seed, offsets=offsets, dtype=np.float64)
    _, trace = deformable_layer(linear(colors, spread), params, config)
    return (trace.points_px - trace.reference_px)[0, 0]


figure, panels = plt.subplots(1, 3, figsize=(8.8, 2.3), width_ratios=[1, 1, 0.8])
centers = to_pixels(reference_points((4, 6), CONVENTION), SIZE, CONVENTION)
for axes, (name, colors) in zip(panels, scenes.items()):
    steps = 3 * initial_offsets(colors, seed=1)
    axes.imshow(np.clip(colors[0].transpose(1, 2, 0), 0, 1), extent=(-0.5, WIDTH - 0.5, HEIGHT - 0.5, -0.5))
    axes.quiver(
        centers[..., 1], centers[..., 0], steps[..., 1], steps[..., 0], color="white", angles="xy", scale_units="xy",
        scale=1, width=0.007,
    )  # fmt: skip
    axes.set(xticks=[], yticks=[], title=name, xlabel="offsets, drawn 3 × longer")
lengths = {
    name: np.array([np.linalg.norm(initial_offsets(colors, seed), axis=-1).mean() for seed in range(20)])
    for name, colors in scenes.items()
}
for column, (lengths_of, color) in enumerate(zip(lengths.values(), (ORANGE, BLUE))):
    panels[2].scatter(column + np.linspace(-0.25, 0.25, 20), lengths_of, s=12, color=color, lw=0)
panels[2].set(xlim=(-0.6, 1.6), ylim=(0, None), title="mean offset, 20 seeds, pixels")
panels[2].set_xticks([0, 1], scenes)
plt.show()

# %%
for seed in range(20):
    steps = initial_offsets(scenes["a blank map"], seed).reshape(-1, 2)
    np.testing.assert_allclose(
        steps, steps[:1].repeat(24, axis=0), atol=1e-12
    )  # windows of 7 × 7 do not touch the border
    assert np.linalg.norm(steps[0]) > 0.1
    assert not initial_offsets(scenes["a blank map"], seed, "zero_offset").any()
ratio = lengths["a blank map"].mean() / lengths["the photograph"].mean()
print(f"offsets on the blank map are {ratio:.2f} times as long as on the photograph")
assert 0.7 < ratio < 1.5

# %% [markdown]
# ## 4. How large should s be?
#
# The [first notebook](../01_one_tensor_through_a_layer/) trained an offset network to repaint a photograph from 24
# readings. Here is the same layer for a photograph of a night sky, with six values of $s$ and three seeds. Most of the
# 24 cells are blank blue.
#
# The stride is 7. The points with zero offsets read one pixel of each cell of 7 × 7, which is 2 % of the map
# (`dat_ref.ops.coverage`). So offsets can help here. At stride 1 or 2 the grid reads every pixel, and offsets
# can help little.
#
# **Claim.** Small values of $s$ work equally well: a better color is nearby. The largest value is worse than no
# offsets at all. The reason is that points *leave the map*. Blank cells have equal queries and therefore equal
# offsets, so a step that improves one of them moves all. Outside the map every reading is zero, and so is the gradient
# through the features. Only the bias still gives a gradient, and it does not depend on the image.


# %% alt="Points after training for s = 1, 8, 16: more and more outside the map; the error of six values of s"
def painter(s, seed=0, beta=60.0, near=21.0):
    """Return the configuration and the parameters of the layer of the first notebook, for a given s."""
    layer = replace(config, offset_range=s)
    params = dat_ref.init_params(layer, seed, offsets="zero_offset", dtype=np.float64)
    query = {"weight": np.zeros((DIM, DIM)), "bias": np.zeros(DIM)}
    sharpness = beta / layer.scale
    query["weight"][:3, :3], query["bias"][3] = 2 * sharpness * np.eye(3), -sharpness
    query["weight"][4:, :3] = sharpness * np.random.default_rng(seed).standard_normal((DIM - 4, 3))
    passing = {"weight": np.diag([1.0] * 4 + [0.0] * (DIM - 4)), "bias": np.zeros(DIM)}
    dy, dx = np.meshgrid(np.arange(1 - HEIGHT, HEIGHT), np.arange(1 - WIDTH, WIDTH), indexing="ij")
    params |= {"query": query, "key": passing, "value": passing, "output": passing}
    return layer, params | {"position_bias": {"table": -(dy**2 + dx**2)[None] / (2 * near**2)}}


def paint(s, seed, steps=60, rate=0.03):
    """Train the offset network; return the last error divided by the first, and the final points."""
    layer, params = painter(s, seed)
    centered = small - 0.5
    x = np.concatenate(
        [centered, np.square(centered).sum(axis=1, keepdims=True), np.zeros((1, DIM - 4, *SIZE))], axis=1
    )
    optimizer = AdamW(weight_decay=0.0)
    state, errors = optimizer.init(params["offset_network"]), []
    for step in range(steps + 1):
        y, trace = deformable_layer(x, params, layer)
        difference = np.where(np.arange(DIM)[:, None, None] < 3, y - x, 0.0)
        errors.append(np.square(difference).sum() / (HEIGHT * WIDTH))
        if step < steps:
            _, grads = deformable_layer_vjp(2 * difference / (HEIGHT * WIDTH), trace, params, layer)
            now = scheduled_rate(step, steps, rate, warmup_steps=10)
            network, state = optimizer.step(params["offset_network"], grads["offset_network"], state, now)
            params = {**params, "offset_network": network}
    return errors[-1] / errors[0], trace.points_px[0, 0].reshape(-1, 2)


RANGES = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
runs = {s: [paint(s, seed) for seed in range(3)] for s in RANGES}
error = {s: np.array([ratio for ratio, _ in runs[s]]) for s in RANGES}


def share_outside(points):
    return np.any((points < -0.5) | (points > np.array(SIZE) - 0.5), axis=1).mean()


lost = {s: np.array([share_outside(points) for _, points in runs[s]]) for s in RANGES}

figure, panels = plt.subplots(2, 2, figsize=(8.2, 5.8))
*panels, axes = panels.ravel()
for panel, s in zip(panels, (1.0, 8.0, 16.0)):
    points = runs[s][1][1]
    on_photo(panel, f"s = {s:g}: {lost[s][1]:.0%} outside the map", margin=13)
    walks = np.stack([centers.reshape(-1, 2), points], axis=1)[..., ::-1]
    panel.add_collection(LineCollection(walks, colors=[(0.65, 0.65, 0.65, 0.9)], linewidths=0.7))
    panel.scatter(*points.T[::-1], s=11, color=ORANGE, lw=0, zorder=3)
axes.axhline(1, color=style.QUIET, lw=0.8, ls=(0, (4, 3)))
axes.text(0.5, 1.1, "zero offsets", size=7.5, color=style.QUIET)
for s in RANGES:
    axes.scatter([s] * 3, error[s], s=16 + 90 * lost[s], color=BLUE, alpha=0.8, lw=0)
axes.set(xscale="log", yscale="log", xticks=RANGES, xticklabels=[f"{s:g}" for s in RANGES], xlabel="s")
axes.set(yticks=[0.5, 1, 2, 5], yticklabels=["½", "1", "2", "5"], title="final / initial error, three seeds each")
axes.minorticks_off()
plt.show()

# %%
for s in RANGES:
    ratios = f"{error[s].min():.2f} to {error[s].max():5.2f}"
    print(f"s = {s:4g}: final / initial error {ratios}, points outside {lost[s].mean():4.0%}")
assert all(error[s].max() < 0.9 for s in (0.5, 1.0, 2.0))  # moving helps for every small s
assert round(coverage(SIZE, config.stride, CONVENTION), 3) == 0.02
assert lost[0.5].max() == lost[1.0].max() == 0  # s ≤ 1 cannot leave the map
assert np.median(error[16.0]) > 1  # worse than zero offsets
assert lost[16.0].mean() > lost[8.0].mean() / 2 > lost[2.0].mean()
outside = np.array([[[-1.0, 9.0], [12.5, WIDTH + 3.0]]])  # at least a pixel outside the map
assert not bilinear_sample(small, outside).any()
assert not bilinear_sample_vjp(np.ones((1, 3, 2)), small, outside + [-1e-9, 0]).points_px.any()
assert all((lost[s][error[s] > 1] > 0).all() for s in RANGES)  # runs worse than zero offsets have lost points

# %% [markdown]
# This is one photograph and one small layer. A larger $s$ also means larger steps, because the output of the network
# is multiplied by $s/2$. But the shape agrees with the paper's curve: almost constant over a wide range, then a drop.
#
# DAT++ has no such limit. The clamp keeps its points on the map, and a clamped point [has no gradient along the
# clamped axis](../04_gradients_by_hand/).
#
# ## 5. The initialization of the released models
#
# Neither release starts with zero offsets: the offset network has ordinary random weights. With a limit of one cell
# ($s = 2$) this moves the points little, without a limit it moves them far.
#
# **Claim** (`dat_ref.init_params`). After initialization the mean offset of DAT is less than half a key cell, that of
# DAT++ more than a whole cell. With `offsets="zero_offset"` the points of DAT start at their reference points.
#
# A target gives a point a gradient only from nearby: from within half its size plus one pixel of the map
# (`dat_ref.ops.coverage.capture_radius`). So use `offsets="zero_offset"` when $s/2$ times the stride is more than one
# pixel.

# %% alt="Initial offsets of DAT and of DAT++ on a portrait; bars by stage: below half a cell, above one cell"
portrait = load_photo(photograph_path("astronaut"))
image = normalise(resize(portrait, (224, 224)))


def initial_traces(name, seed=0, offsets="released"):
    """Run an untrained backbone on the photograph; return the trace of the first deformable layer of each stage."""
    backbone = dat_ref.config(name)
    model = dat_ref.DAT(backbone, dat_ref.init_params(backbone, seed, offsets=offsets))
    traces = {}
    for step in model.walk(image):
        if isinstance(step.trace.attention, LayerTrace):
            traces.setdefault(step.stage + 1, step.trace.attention)
    return traces


def mean_offset(trace):
    """Return the mean length of an offset, in key cells."""
    cell = trace.x.shape[2] / trace.points.shape[2]
    return float(np.linalg.norm(trace.points_px - trace.reference_px, axis=-1).mean() / cell)


initial = {name: initial_traces(name) for name in ("dat_tiny", "dat_pp_tiny")}
figure, (*panels, bars) = plt.subplots(1, 3, figsize=(8.8, 2.9), width_ratios=[1, 1, 0.9])
for axes, (name, traces), color in zip(panels, initial.items(), (BLUE, ORANGE)):
    trace = traces[3]
    axes.imshow(dim(portrait), extent=(-0.5, 13.5, 13.5, -0.5))
    before, updated = (part[0, 0].reshape(-1, 2) for part in (trace.reference_px, trace.points_px))
    axes.add_collection(LineCollection(np.stack([before, updated], axis=1)[..., ::-1], colors="white", linewidths=0.7))
    axes.scatter(*before.T[::-1], s=6, color="white", lw=0, zorder=3)
    axes.scatter(*updated.T[::-1], s=14, color=color, ec="white", lw=0.4, zorder=4, clip_on=False)
    axes.set(xticks=[], yticks=[], title=f"{name}, stage 3, group 1", xlim=(-0.5, 13.5), ylim=(13.5, -0.5))
    axes.spines[:].set_visible(False)
    stages = list(traces)
    shift = 0.2 if name == "dat_pp_tiny" else -0.2
    bars.bar(
        np.array(stages) + shift, [mean_offset(traces[stage]) for stage in stages], width=0.36, color=color, label=name
    )
bars.axhline(1, color=style.QUIET, lw=0.8, ls=(0, (4, 3)))
bars.set(xticks=[1, 2, 3, 4], xlabel="stage", title="mean initial offset, key cells")
bars.legend(loc="upper left")
bars.set_ylim(0, 2.1)
plt.show()

# %%
assert all(mean_offset(trace) < 0.5 for trace in initial["dat_tiny"].values())
assert all(mean_offset(trace) > 1 for trace in initial["dat_pp_tiny"].values())
assert all(mean_offset(trace) == 0 for trace in initial_traces("dat_tiny", offsets="zero_offset").values())

# %% [markdown]
# ## 6. Groups: several grids of points
#
# With a single grid, all heads read at the same positions. Therefore the channels are split into $G$ groups. Each
# group has its own grid of points, predicted from its own channels, and it reads its own channels there. The weights
# of the offset network are shared; only its inputs differ.
#
# **Claim** (`dat_ref.ops.offsets.offset_network`). If the queries of one group change, its points move and those of
# the other groups do not. The figure shows the three grids of a layer of dat_tiny with random weights. It shows
# geometry, nothing is learned.

# %% alt="A portrait with the three point grids of a layer of dat_tiny, one color for each group"
layer = next(block.attention for block in dat_ref.config("dat_tiny").stages[2] if block.attention.kind == "deformable")
layer = replace(layer, stride=2)  # 7 × 7 points, few enough to see
params = dat_ref.init_params(layer, seed=0, dtype=np.float64)
features = initial["dat_tiny"][3].x.astype(np.float64)  # input of the layer: (1, 384, 14, 14)
_, trace = deformable_layer(features, params, layer)
viz.draw_points(portrait, trace, label=f"G = {layer.groups}")


# %%
def offsets_of(query):
    in_groups = query.reshape(layer.groups, layer.group_dim, *query.shape[2:])
    raw, _ = offset_network(in_groups, params["offset_network"], stride=2, padding=((4, 4), (4, 4)))
    return raw  # (G, 2, Hk, Wk)


changed = trace.query.copy()
changed[:, layer.group_dim : 2 * layer.group_dim] += np.random.default_rng(0).normal(size=(1, layer.group_dim, 14, 14))
difference = np.abs(offsets_of(changed) - offsets_of(trace.query)).max(axis=(1, 2, 3))
assert (difference > 0.01).tolist() == [False, True, False]
assert difference[0] == difference[2] == 0

# %% [markdown]
# ## 7. Keys mix the groups
#
# According to the paper, the heads of a group use their own points. The code reads $C / G$ channels at the points of
# each group, and then multiplies *all* channels by one dense $W_k$ and one $W_v$. So the keys of every head are a
# mixture of the readings of all groups, at $G$ different positions of the image. Only the position bias is separate
# for each group.
#
# **Claim.** If the points of one group move, the keys of all heads change. With a block-diagonal $W_k$, one block per
# group, only the keys of its own heads would change. The position bias changes only in its own heads, in both cases.


# %% alt="Change of the heads when one group moves: in all heads as released, in its own with separate keys" plot=true
def keys_and_bias(key, points):
    """Return k (heads, Ns, d) and the bias (heads, H·W, Ns) for a key projection and points (1, G, Hk, Wk, 2)."""
    groups, flat = layer.groups, points.reshape(1, layer.groups, -1, 2)
    maps = features.reshape(groups, layer.group_dim, 14, 14)
    sampled = bilinear_sample(maps, to_pixels(flat, (14, 14), layer.convention)[0]).reshape(1, layer.dim, -1)
    table = params["position_bias"]["table"]
    bias = table_bias(table, flat, query_size=(14, 14), convention=layer.convention)
    return split_heads(linear(sampled, **key), layer.heads)[0], bias[0]


def changes(key):
    """Return the relative change of the keys and of the bias of each head when one group moves: (G, heads) each."""
    found = []
    for group in range(layer.groups):
        updated = trace.points.copy()
        updated[:, group] += 0.1
        pairs = zip(keys_and_bias(key, updated), keys_and_bias(key, trace.points))
        found.append([np.linalg.norm(new - old, axis=(1, 2)) / np.linalg.norm(old, axis=(1, 2)) for new, old in pairs])
    return np.array(found).swapaxes(0, 1)


blocks = np.kron(np.eye(layer.groups), np.ones((layer.group_dim, layer.group_dim)))
dense, bias_changes = changes(params["key"])
block_diagonal, _ = changes({"weight": params["key"]["weight"] * blocks, "bias": params["key"]["bias"]})

figure, panels = plt.subplots(1, 3, figsize=(8.8, 1.7), sharey=True)
titles = ("keys, as released", "keys, block-diagonal $W_k$", "position bias")
for axes, found, title in zip(panels, (dense, block_diagonal, bias_changes), titles):
    axes.imshow(found / found.max(), cmap=style.FIELD, vmin=0, vmax=1, aspect="auto")
    axes.set(xticks=[1.5, 5.5, 9.5], xticklabels=["heads 1-4", "5-8", "9-12"], yticks=range(3), title=title)
    axes.set_yticklabels([f"group {group + 1}" for group in range(3)])
    axes.tick_params(length=0)
    axes.vlines([3.5, 7.5], -0.5, 2.5, color="white", lw=2)
    axes.hlines([0.5, 1.5], -0.5, 11.5, color="white", lw=2)
    axes.spines[:].set_visible(False)
panels[0].set_ylabel("moved group")
plt.show()

# %%
own = np.kron(np.eye(3), np.ones((1, 4))).astype(bool)  # (G, heads): the heads of each group
assert dense.min() > 0.01  # every head depends on every group
for found in (block_diagonal, bias_changes):
    assert found[own].min() > 0.01
    assert found[~own].max() == 0

# %% [markdown]
# ## 8. The cost of groups
#
# Groups are free: there are more points, but each point reads fewer channels.
#
# **Claim** (`dat_ref.complexity.attention_terms`). The numbers of multiply-adds and of gathered values do not depend
# on $G$, exactly. The number of points grows in proportion to $G$. The number of parameters decreases a little,
# because one small network serves all groups.

# %% alt="Against the number of groups: multiply-adds are constant, points rise, parameters fall slightly" plot=true
GROUPS = (1, 2, 3, 4, 6, 12)
grouped = {groups: replace(layer, groups=groups) for groups in GROUPS}
costs = {groups: total(attention_terms(1, (14, 14), config)) for groups, config in grouped.items()}
sizes = {groups: count(deformable_shapes(config)) for groups, config in grouped.items()}

figure, panels = plt.subplots(1, 3, figsize=(8.8, 1.9))
shown = {
    "multiply-adds, millions": [costs[groups].macs / 1e6 for groups in GROUPS],
    "points": [49 * groups for groups in GROUPS],
    "parameters, thousands": [sizes[groups] / 1e3 for groups in GROUPS],
}
for axes, (title, values), color in zip(panels, shown.items(), (BLUE, ORANGE, GREEN)):
    axes.plot(GROUPS, values, color=color, lw=1.6, marker="o", ms=4)
    axes.set(xticks=GROUPS, xlabel="groups", ylim=(0, 1.15 * max(values)), title=title)
plt.show()

# %%
assert len({(cost.macs, cost.gathers) for cost in costs.values()}) == 1
assert sizes[1] > sizes[12] > 0.95 * sizes[1]
network = layer.kernel_size**2 + 3 + 2  # per channel: kernel, bias, two norm parameters, two outputs
assert sizes[1] - sizes[12] == (layer.dim - layer.dim // 12) * network

# %% [markdown]
# ## What to remember
#
# - A point can move at most $s/2$ key cells in each direction. For $s \le 1$ points keep their order; for larger $s$
#   the mesh can fold.
# - Small values of $s$ cost little. With large values, the points of blank regions can leave the map together, and
#   then no gradient from the image brings them back.
# - Omitting the last bias does not keep points in place on a blank map. Zero initialization does.
# - Offsets can help only where the grid misses something: at stride 1 and 2 it reads every pixel, at stride 7 it reads
#   2 %.
# - Groups are several grids at the cost of one. Their readings are mixed by $W_k$ and $W_v$.
#
# Next: [the gradient that moves the points](../04_gradients_by_hand/).

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
# # What attention figures show
#
# Figures of attention are persuasive, but an untrained network produces similar ones. This notebook separates three
# things: **geometry**, which any weights show; **learned behavior**, on a small task with a known answer and a
# control; and **your model**, for which the last section has the code.
#
# Each section makes a claim, names the function of `dat_ref` that it concerns, draws a figure, and ends with
# assertions.

# %%
import os
import tempfile
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Rectangle

import dat_ref
from dat_ref import OffsetBound, viz
from dat_ref.checkpoints import detect_preset, load_params, official_state, read_state, save_state
from dat_ref.cli.photo import input_size, load_photo, normalise, resize
from dat_ref.data import photograph_path, photographs
from dat_ref.layer import deformable_layer, deformable_layer_vjp
from dat_ref.ops.basic import linear, linear_vjp
from dat_ref.ops.coverage import coverage, fixed_grid_bound, read_pixels
from dat_ref.train import AdamW, cross_entropy_vjp, scheduled_rate
from dat_ref.viz import style

plt.rcParams.update(style.SETTINGS)
plt.rcParams.update({"figure.dpi": 110, "figure.constrained_layout.use": True})
BLUE, ORANGE, GREEN, PINK = style.GROUP_COLORS[:4]

# %% [markdown]
# ## 1. From the map to the photograph
#
# The points of a layer are in pixels of *its map*, where 0 is the center of the first pixel. Map and photograph cover
# the same area, border to border. So the distance from the border is scaled:
#
# $$ \text{on the photograph} = (p + \tfrac12)\,\frac{\text{photograph}}{\text{map}} - \tfrac12 , $$
#
# each axis with its own ratio, $y$ first. Without the halves, every mark is wrong by half a map cell: eight pixels for
# a stage-3 map. With $y$ and $x$ exchanged, the figure still looks plausible.
#
# **Claim** (`dat_ref.viz.to_image_px`). Take a dark photograph with one bright patch, and a map of its local means.
# The brightest pixel of the map is marked on the patch, to within half a cell.

# %% alt="One bright patch and three marks: to_image_px within half a cell, the one with exchanged axes far off"
night = np.zeros((96, 160))
patch = (70, 33)  # y, x
night[patch[0] - 3 : patch[0] + 4, patch[1] - 3 : patch[1] + 4] = 1
averages = night.reshape(6, 16, 10, 16).mean(axis=(1, 3))  # (6, 10)
brightest = np.unravel_index(averages.argmax(), averages.shape)
marks = {
    "to_image_px": viz.to_image_px(np.array(brightest), (6, 10), night.shape),
    "without the halves": np.array(brightest) * 16.0,
    "y and x exchanged": viz.to_image_px(np.array(brightest)[::-1], (6, 10), night.shape),
}

figure, axes = plt.subplots(figsize=(5.2, 3.0))
axes.imshow(night, cmap="gray", vmax=1.4)
for (name, (y, x)), color in zip(marks.items(), (GREEN, ORANGE, PINK)):
    axes.plot(x, y, "+", color=color, ms=13, mew=2)
    axes.annotate(name, (x, y), xytext=(9, 7), textcoords="offset points", color=color, size=8.5)
axes.set(xticks=np.arange(-0.5, 160, 16), yticks=np.arange(-0.5, 96, 16), xticklabels=[], yticklabels=[])
axes.grid(color="white", lw=0.3, alpha=0.3)
axes.tick_params(length=0)
plt.show()

# %%
error = {name: np.abs(mark - patch).max() for name, mark in marks.items()}
assert error["to_image_px"] <= 8  # half of a cell of 16
assert error["without the halves"] > 1
assert error["y and x exchanged"] > 16
np.testing.assert_allclose(
    viz.to_image_px([[-0.5, -0.5], [5.5, 9.5]], (6, 10), night.shape), [[-0.5, -0.5], [95.5, 159.5]]
)

# %% [markdown]
# ## 2. Random weights show geometry
#
# The figure shows `dat_tiny` with random weights on a photograph, stage 3. Points have moved, circles differ in size
# and in color. Nothing is learned.
#
# **Claim** (`dat_ref.viz.key_importance`). The importance of a key is the attention that it receives from all queries.
# With random weights every key receives between half and one and a half times the attention of a uniform distribution.

# %% alt="A photograph with circles of nearly equal size at all points: random weights prefer no key"
photo = load_photo(photograph_path("chelsea"))
SIZE = input_size(photo.shape[:2], 224)
image = normalise(resize(photo, SIZE))


def traces_of(model, stage=3):
    """Return the traces of the last block of a stage, which is deformable, and of the block before it."""
    blocks = [step.trace.attention for step in model.walk(image) if step.stage == stage - 1]
    return blocks[-1], blocks[-2]


untrained = dat_ref.DAT(dat_ref.config("dat_tiny"), dat_ref.init_params(dat_ref.config("dat_tiny"), seed=0))
deformable, window = traces_of(untrained)
viz.draw_key_importance(photo, deformable, label="dat_tiny, random weights, stage 3")

# %%
groups, keys = deformable.points.shape[1], deformable.attention.shape[3]
importance = viz.key_importance(deformable.attention, groups)[0]  # (G, Ns)
uniform = importance.sum(axis=1, keepdims=True) / keys
np.testing.assert_allclose(importance.sum(axis=1), deformable.attention.shape[2], rtol=1e-5)  # one per query
print(f"importance / uniform: {(importance / uniform).min():.2f} to {(importance / uniform).max():.2f}")
assert (importance / uniform).max() < 1.5
assert (importance / uniform).min() > 0.5

# %% [markdown]
# ## 3. Comparison with window attention
#
# The previous block uses windows of 7 × 7. The figure shows, for three queries, the attention through points and the
# attention in the window.
#
# **Claim** (`dat_ref.viz.deformable_query_attention`, `window_query_attention`). All queries read the same points,
# which cover the map from border to border. In the window no key is more than six cells away, and none of the three
# queries is in the window of another.

# %% alt="Three queries: the points that all of them read across the photograph, and their separate windows"
map_size = deformable.x.shape[2:]
cells = [(5, 6), (6, 14), (12, 19)]  # (y, x) of the map
through_points = [viz.deformable_query_attention(deformable, cell) for cell in cells]
in_window = [viz.window_query_attention(window, cell) for cell in cells]
viz.draw_attention(
    photo,
    np.array(cells, dtype=float),
    through_points,
    in_window,
    map_size=map_size,
    label="dat_tiny, random weights, stage 3",
)

# %%
for one, other in zip(through_points, through_points[1:]):
    np.testing.assert_array_equal(one.keys_px, other.keys_px)
covered = np.ptp(through_points[0].keys_px, axis=0) / np.array(map_size)
assert (covered > 0.9).all()
for cell, attended in zip(cells, in_window):
    assert np.abs(attended.keys_px - cell).max() <= 6
    assert not any((attended.keys_px == other).all(axis=1).any() for other in cells if other != cell)

# %% [markdown]
# ## 4. A task that needs offsets
#
# A picture is a gray crop of a photograph of 16 × 16 pixels. It contains a **white spot** and, in most cases, a
# **colored spot** of 3 × 3 pixels. The task is to name the color: one of four, or "none". The white spot is a
# distractor: it is equally salient and carries no information.
#
# The network is one deformable layer and a linear classifier. Two choices make the offsets necessary, and they can be
# checked before any training (`dat_ref.ops.coverage`):
#
# - **Stride 8.** The four points with zero offsets read 6.25 % of the map. They miss more than half of the colored
#   spots. At stride 1 or 2 they would read every pixel, the layer would equal average pooling of its cells, and
#   offsets could not help much.
# - **No other path.** Nothing mixes neighboring pixels before the layer. The classifier sees the mean output over the
#   outermost pixels, where no spot is placed. So all information about the color comes through the four keys.
#
# Let $h$ be the share of spot positions at which a fixed point reads some pixel of the spot. Without offsets no
# classifier can be right more often than $h + (1 - h)/5$ on average. The **control** is the same network without
# offsets, trained in the same way. In the figure its squares are the pixels that it reads; they hit or miss the
# colored spot. The circles are the moved points, with areas in proportion to their attention.
#
# The positions of the spots are not used in training, only the labels.
#
# **Claim** (`dat_ref.layer.deformable_layer_vjp`, `dat_ref.ops.coverage.fixed_grid_bound`). On new pictures the
# control does not exceed the bound: it is right on nearly all colored spots that its fixed points hit, and on nearly
# none of the others. The network with offsets is right on most of the others too. Its points move to the colored spot,
# and they are on the white spot less often than with zero offsets.

# %%
SIDE, DIM, STRIDE, SPOT = 16, 16, 8, 3  # side of a picture, channels, stride, side of a spot
PALETTE = np.array([[0.9, 0.15, 0.1], [0.1, 0.7, 0.2], [0.15, 0.3, 0.95], [0.95, 0.8, 0.1]])
grays = []
for name in photographs():
    picture = load_photo(photograph_path(name))
    shape = [round(length * 3 * SIDE / min(picture.shape[:2])) for length in picture.shape[:2]]
    grays.append(resize(picture, (shape[0], shape[1])) @ np.array([0.299, 0.587, 0.114]))
differences = np.random.default_rng(0).normal(size=(DIM - 3, 3))
differences -= differences.mean(axis=1, keepdims=True)  # color differences: zero on gray
lift = 2 * np.concatenate([np.eye(3), differences])  # 3 colors → 16 channels


def draw_pictures(rng, count):
    """Return pictures (B, 3, 16, 16), labels (4: no color) and corners of the spots (B, 2, 2), colored first."""
    pictures = np.empty((count, SIDE, SIDE, 3))
    corners, labels = rng.integers(1, SIDE - SPOT, (count, 2, 2)), rng.integers(0, 5, count)
    for picture, (colored, white), label in zip(pictures, corners, labels):
        gray = grays[rng.integers(len(grays))]
        top, left = (rng.integers(0, length - SIDE + 1) for length in gray.shape)
        picture[:] = gray[top : top + SIDE, left : left + SIDE, None]
        while np.abs(white - colored).max() <= SPOT:  # apart, with at least a pixel between them
            white[:] = rng.integers(1, SIDE - SPOT, 2)
        for (y, x), color in zip((white, colored), (np.ones(3), *PALETTE[label : label + 1])):
            picture[y : y + SPOT, x : x + SPOT] = color
    return pictures.transpose(0, 3, 1, 2), labels, corners


with_offsets = dat_ref.DeformableAttentionConfig(dim=DIM, heads=1, stride=STRIDE, kernel_size=STRIDE, size=(SIDE, SIDE))
without_offsets = replace(with_offsets, offset_bound=OffsetBound.NONE)
BORDER = np.ones((SIDE, SIDE), bool)
BORDER[1:-1, 1:-1] = False  # the outermost pixels: a spot is never there


def classify(params, layer, pictures):
    """Return logits (B, 5), the trace of the layer, and its mean output over the border (B, 16, 1)."""
    y, trace = deformable_layer(linear(pictures - 0.5, lift).astype(np.float32), params["layer"], layer)
    pooled = y[:, :, BORDER].mean(axis=2, keepdims=True)
    return linear(pooled, **params["head"])[:, :, 0], trace, pooled


def learn(layer, steps=600, batch=24, rate=0.01, seed=0):
    """Train a layer and a linear classifier; return their parameters."""
    head = {"weight": np.zeros((5, DIM), np.float32), "bias": np.zeros(5, np.float32)}
    params = {"layer": dat_ref.init_params(layer, seed, offsets="zero_offset"), "head": head}
    optimizer, rng = AdamW(weight_decay=0.01), np.random.default_rng(seed)
    state = optimizer.init(params)
    for step in range(steps):
        pictures, labels, _ = draw_pictures(rng, batch)
        logits, trace, pooled = classify(params, layer, pictures)
        grad_logits = cross_entropy_vjp(1.0, logits, labels)[:, :, None]
        grad_head = linear_vjp(grad_logits, pooled, **params["head"])
        grad_y = (grad_head.x[..., None] * BORDER / BORDER.sum()).astype(np.float32)
        _, grads = deformable_layer_vjp(grad_y, trace, params["layer"], layer)
        now = scheduled_rate(step, steps, rate, warmup_steps=20)
        params, state = optimizer.step(params, {"layer": grads, "head": grad_head.params}, state, now)
    return params


# %% alt="Small gray pictures with a colored and a white spot: fixed points miss it, moved points lie on it"
control, learned = learn(without_offsets), learn(with_offsets)
pictures, labels, corners = draw_pictures(np.random.default_rng(99), 1000)  # none of them used for training
fixed_logits = classify(control, without_offsets, pictures)[0]
logits, trace, _ = classify(learned, with_offsets, pictures)

read = read_pixels((SIDE, SIDE), STRIDE)  # (16, 16) bool: pixels that the points read with zero offsets
allowed = read[1:-1, 1:-1]
hit_rate = np.lib.stride_tricks.sliding_window_view(allowed, (SPOT, SPOT)).any(axis=(2, 3)).mean()
bound = fixed_grid_bound(hit_rate, 5)
right = {"without offsets": fixed_logits.argmax(axis=1) == labels, "with offsets": logits.argmax(axis=1) == labels}
colored = labels < 4
hits = np.array([read[y : y + SPOT, x : x + SPOT].any() for y, x in corners[:, 0]])
shown = {
    "missed": np.flatnonzero(colored & ~hits)[0],
    "missed again": np.flatnonzero(colored & ~hits)[1],
    "hit": np.flatnonzero(colored & hits)[0],
    "no color": np.flatnonzero(~colored)[0],
}

figure, rows = plt.subplots(2, 4, figsize=(8.8, 4.6))
for row, (name, is_right) in zip(rows, right.items()):
    for axes, (case, number) in zip(row, shown.items()):
        axes.imshow(pictures[number].transpose(1, 2, 0), interpolation="nearest")
        before, after = (part[number, 0].reshape(-1, 2) for part in (trace.reference_px, trace.points_px))
        if name == "without offsets":
            for y, x in before:
                axes.add_patch(Rectangle((x - 1, y - 1), 2, 2, fill=False, ec="white", lw=1.2))
        else:
            axes.plot(*np.stack([before, after]).transpose(2, 0, 1)[::-1], color="white", lw=0.8)
            shares = trace.attention[number, 0, BORDER.ravel()].mean(axis=0)
            axes.scatter(*after.T[::-1], s=160 * shares, color=ORANGE, ec="white", lw=0.6, zorder=3)
        axes.set(
            xticks=[], yticks=[], title=f"{case}: {'correct' if is_right[number] else 'wrong'}", facecolor=style.MARGIN
        )
        axes.set(xlim=(-2.5, SIDE + 1.5), ylim=(SIDE + 1.5, -2.5))
        axes.spines[:].set_visible(False)
    row[0].set_ylabel(name)
plt.show()


# %%
def share_on(points_px, spots):
    """Return the share of pictures in which a point is on the spot."""
    offset = points_px.reshape(len(spots), -1, 2) - (spots[:, None] - 0.5)  # from the outer corner of the spot
    return ((offset >= 0) & (offset <= SPOT)).all(axis=2).any(axis=1).mean()


accuracy = {name: is_right.mean() for name, is_right in right.items()}
print(f"the points with zero offsets read {read.mean():.1%} of the map and hit {hit_rate:.0%} of the spots")
print(f"bound without offsets {bound:.1%}; measured " + ", ".join(f"{k} {v:.1%}" for k, v in accuracy.items()))
for name, is_right in right.items():
    hit, missed = is_right[colored & hits].mean(), is_right[colored & ~hits].mean()
    print(f"{name}: {hit:.0%} of the colors right where the fixed points hit, {missed:.0%} where they miss")
    assert hit > 0.9
    assert missed > 0.5 if name == "with offsets" else missed < 0.1
assert read.mean() == coverage((SIDE, SIDE), STRIDE) == 0.0625
assert accuracy["without offsets"] < bound + 0.05  # sampling error of 1000 pictures: 0.03 (two standard deviations)
assert accuracy["with offsets"] > bound + 0.15
for spot, name in enumerate(("colored", "white")):
    on = [share_on(part[colored], corners[colored, spot]) for part in (trace.reference_px, trace.points_px)]
    print(f"a point on the {name} spot: {on[0]:.0%} of the pictures with zero offsets, {on[1]:.0%} with offsets")
    assert on[1] > on[0] + 0.25 if name == "colored" else on[1] < on[0]

# %% [markdown]
# ## 5. Is an important key necessary?
#
# The circles in section 4 have similar sizes: the four keys receive similar attention. But are they equally important
# for the answer? A direct test is an ablation: remove keys, and let the softmax redistribute their attention among the
# others:
#
# $$ z_m = \frac{\sum_{n\ \text{kept}} A_{mn}\, v_n}{\sum_{n\ \text{kept}} A_{mn}} . $$
#
# **Claim** (`dat_ref.viz.key_importance`). The most important key receives less than twice the attention of the least
# important one. But removing the most important key removes more than 40 % of the correct answers, and removing the
# least important key hardly any. So for this model the order of importance agrees with the effect on the answer, and
# the size of the circles understates the effect. This is a measurement on one model, not a property of attention.


# %% alt="Accuracy falls steeply when important keys are removed first, hardly otherwise; attention by rank" plot=true
def right_with(kept):
    """Return the accuracy on pictures with a colored spot when only some of the keys are kept, (B, Ns) bool."""
    weights = (attention * kept[:, None]).astype(np.float64)  # (B, M, Ns)
    weights /= weights.sum(axis=2, keepdims=True) + 1e-30
    z = (weights @ trace.v[:, 0]).mean(axis=1)[:, :, None]  # (B, C, 1): mean over the queries
    predictions = linear(linear(z, **learned["layer"]["output"]), **learned["head"])[:, :, 0].argmax(axis=1)
    return (predictions == labels)[colored].mean()


attention = trace.attention[:, 0, BORDER.ravel()]  # (B, M, 4): the queries that the classifier uses
importance = viz.key_importance(attention[:, None])[:, 0]  # (B, 4)
rank = np.argsort(np.argsort(-importance, axis=1), axis=1)  # 0 is the most important
curves = {
    "most important first": [right_with(rank >= removed) for removed in range(4)],
    "least important first": [right_with(rank < 4 - removed) for removed in range(4)],
}

figure, (axes, received) = plt.subplots(1, 2, figsize=(8.8, 2.6))
for (name, values), color in zip(curves.items(), (ORANGE, BLUE)):
    axes.plot(range(4), values, color=color, lw=1.8, marker="o", ms=4, label=name)
axes.set(xlabel="keys removed, of 4", title="accuracy, colored spots", ylim=(0, 1.05), xticks=range(4))
axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
axes.legend(loc="lower left")
shares = -np.sort(-importance, axis=1)[colored].mean(axis=0) / BORDER.sum()
received.bar(range(1, 5), shares, color=BLUE, width=0.7)
received.axhline(1 / 4, color=style.QUIET, lw=0.8, ls=(0, (4, 3)))
received.text(4.4, 1 / 4 + 0.01, "uniform attention", ha="right", size=8, color=style.QUIET)
received.set(xlabel="rank of the key", title="attention received", xticks=range(1, 5))
plt.show()

# %%
first, last = curves.values()
print(f"all keys {first[0]:.0%}, without the most important {first[1]:.0%}, without the least important {last[1]:.0%}")
assert shares[0] < 2 * shares[3]
assert first[0] == last[0] > 0.75
assert first[1] < 0.6 * first[0]
assert last[1] > 0.95 * last[0]
assert all(low <= high + 0.02 for low, high in zip(first, last))

# %% [markdown]
# ## 6. Your model
#
# With released weights the same figures show what a model learned from ImageNet. The weight files are not part of this
# project. Download one from the links in the repository of its authors, and pass its path:
#
# ```bash
# DAT_CHECKPOINT=dat_tiny_in1k_224.pth jupyter lab notebooks/07_where_it_looks.py
# dat-ref explain photo.jpg --model dat_tiny --checkpoint dat_tiny_in1k_224.pth
# ```
#
# No code in the file is executed. The release and the model are detected from the names and shapes of the arrays.
# Missing, unexpected or mis-shaped arrays are reported.
#
# **Claim** (`dat_ref.checkpoints`). The cell below loads a file with released names and draws it. If no file is given,
# it first writes the random weights under released names and reads them back, with the same result.


# %% alt="A photograph with a circle at each key of stage 4, larger for more attention, with random weights"
def model_from(path):
    """Return the name of the released model in a file, and the model."""
    name, config = detect_preset(read_state(path))
    params, report = load_params(path, config)
    assert report.complete, report
    return name, dat_ref.DAT(config, params)


given = os.environ.get("DAT_CHECKPOINT")
with tempfile.TemporaryDirectory() as folder:
    path = Path(given or folder) / ("" if given else "random.npz")
    if not given:
        save_state(path, official_state(untrained.params, untrained.config))
    name, model = model_from(path)
yours, _ = traces_of(model, stage=4)
what = f"{name}, {Path(given).name if given else 'random weights, read from a file'}"
viz.draw_key_importance(photo, yours, label=f"{what}, stage 4")

# %%
assert name in dat_ref.PRESETS
if not given:
    before, _ = traces_of(untrained, stage=4)
    np.testing.assert_array_equal(yours.attention, before.attention)
    np.testing.assert_array_equal(yours.points_px, before.points_px)

# %% [markdown]
# ## What to remember
#
# - A map position belongs at $(p + \frac12) \cdot \text{ratio} - \frac12$ on the photograph, $y$ first. Test this with
#   a bright patch.
# - Moved points and circles of different sizes are no evidence of learning. Compare with uniform attention and with
#   random weights.
# - Offsets can only recover what the fixed points miss. Compute the coverage first, and always train the control
#   without offsets. At stride 8 the points find what the fixed grid misses; at stride 1 or 2 nothing is missed.
# - Measure by ablation whether an important key is necessary, for each model.
#
# Next: [in your own model](../08_in_your_own_model/).

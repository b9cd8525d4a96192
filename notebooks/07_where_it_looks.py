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
# # Where it looks
#
# Pictures of attention are persuasive, and that is the trouble with them. A network that has learned nothing makes
# fine ones too. So this notebook draws three things and keeps them apart: **geometry**, which any weights show; **what
# was learned**, on a small task where we know the answer; and **your model**, for which the last section has the code.
#
# Each section makes a claim, names the function of `dat_ref` that it is about, draws it, and ends with an assertion.

# %%
import os
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import dat_ref
from dat_ref import viz
from dat_ref.checkpoints import detect_preset, load_params, official_state, read_state, save_state
from dat_ref.cli.photo import input_size, load_photo, normalise, resize
from dat_ref.data import photograph_path, photographs
from dat_ref.layer import deformable_layer, deformable_layer_vjp
from dat_ref.ops.basic import linear, linear_vjp
from dat_ref.train import AdamW, cross_entropy, cross_entropy_vjp, scheduled_rate
from dat_ref.viz import style

plt.rcParams.update(style.SETTINGS)
plt.rcParams.update({"figure.dpi": 110, "figure.constrained_layout.use": True})
BLUE, ORANGE, GREEN, PINK = style.GROUP_COLORS[:4]

# %% [markdown]
# ## 1. A point of the map on the photograph
#
# Before anything is drawn: a layer's points are in pixels of *its map*, where 0 is the center of the first pixel. Map
# and photograph cover the same ground, border to border. So what scales is the distance from the border,
#
# $$ \text{on the photograph} = (p + \tfrac12)\,\frac{\text{photograph}}{\text{map}} - \tfrac12 , $$
#
# each axis with its own ratio, $y$ first. Forget the halves and every mark is off by half a cell of the map: eight
# pixels on a stage-3 map. Exchange $y$ and $x$ and the picture still looks plausible.
#
# **Claim** (`dat_ref.viz.to_image_px`). A dark photograph with one bright patch, a map of its averages: the brightest
# pixel of the map is marked on the patch, to within half a cell.

# %%
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
off = {name: np.abs(mark - patch).max() for name, mark in marks.items()}
assert off["to_image_px"] <= 8  # half of a cell of 16
assert off["without the halves"] > 1
assert off["y and x exchanged"] > 16
np.testing.assert_allclose(
    viz.to_image_px([[-0.5, -0.5], [5.5, 9.5]], (6, 10), night.shape), [[-0.5, -0.5], [95.5, 159.5]]
)

# %% [markdown]
# ## 2. Seeded weights show geometry
#
# Here is `dat_tiny` with random weights, on a photograph, stage 3. Points have moved, circles differ in size, colors
# are warm. Nothing was learned.
#
# **Claim** (`dat_ref.viz.key_importance`). The importance of a key is the attention that it receives from all queries.
# With seeded weights no key gets much more than an even share, and none much less.

# %%
photo = load_photo(photograph_path("chelsea"))
SIZE = input_size(photo.shape[:2], 224)
image = normalise(resize(photo, SIZE))


def traces_of(model, stage=3):
    """Return the traces of a stage's last block, which is deformable, and of the one before it."""
    blocks = [step.trace.attention for step in model.walk(image) if step.stage == stage - 1]
    return blocks[-1], blocks[-2]


untrained = dat_ref.DAT(dat_ref.config("dat_tiny"), dat_ref.init_params(dat_ref.config("dat_tiny"), seed=0))
deformable, window = traces_of(untrained)
viz.draw_key_importance(photo, deformable, label="dat_tiny, seeded weights, stage 3")

# %%
groups, keys = deformable.points.shape[1], deformable.attention.shape[3]
importance = viz.key_importance(deformable.attention, groups)[0]  # (G, Ns)
even = importance.sum(axis=1, keepdims=True) / keys
np.testing.assert_allclose(importance.sum(axis=1), deformable.attention.shape[2], rtol=1e-5)  # each query gives one
print(f"importance, in even shares: {(importance / even).min():.2f} to {(importance / even).max():.2f}")
assert (importance / even).max() < 1.5
assert (importance / even).min() > 0.5

# %% [markdown]
# ## 3. Beside Swin's
#
# The block before it attends in windows of 7 × 7. Three queries, what they see through points, and what in their
# window.
#
# **Claim** (`dat_ref.viz.deformable_query_attention`, `window_query_attention`). All queries see the same points, from
# border to border. No query sees further than six cells in its window, and two of the three cannot see each other.

# %%
map_size = deformable.x.shape[2:]
cells = [(5, 6), (6, 14), (12, 19)]  # (y, x) of the map: the eyes' height, the other eye, the room
through_points = [viz.deformable_query_attention(deformable, cell) for cell in cells]
in_window = [viz.window_query_attention(window, cell) for cell in cells]
viz.draw_attention(
    photo,
    np.array(cells, dtype=float),
    through_points,
    in_window,
    map_size=map_size,
    label="dat_tiny, seeded weights, stage 3",
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
# ## 4. Something learned
#
# Now a task with a known answer. A crop of a photograph, grey; on it a **colored spot** and a **white spot**; which
# color? There are four, and the fifth answer is: none, there is only the white one. The network is one deformable
# layer and a linear classifier on its mean, nothing else, so all it knows comes through 16 readings on a map of 16 ×
# 16. The spots are small, and the grid often misses them. The white one is a decoy: it stands out as much, and says
# nothing.
#
# Nobody tells the points where the spots are. There is a label, a loss, a gradient.
#
# **Claim** (`dat_ref.layer.deformable_layer_vjp`). After 200 steps, in pictures that were never seen, a point lies on
# the colored spot nearly always; on the white one less often than before anything was learned. Where there is no
# colored spot all points make the same step, as [on a blank map](../03_offsets_range_and_groups/).

# %%
SIDE, DIM, SPOT = 16, 16, 1.4  # pixels, channels, width of a spot
PALETTE = np.array([[0.9, 0.15, 0.1], [0.1, 0.7, 0.2], [0.15, 0.3, 0.95], [0.95, 0.8, 0.1]])
greys = []
for name in photographs():
    picture = load_photo(photograph_path(name))
    shape = [round(length * 3 * SIDE / min(picture.shape[:2])) for length in picture.shape[:2]]
    greys.append(resize(picture, (shape[0], shape[1])) @ np.array([0.299, 0.587, 0.114]))
differences = np.random.default_rng(0).normal(size=(DIM - 3, 3))
differences -= differences.mean(axis=1, keepdims=True)  # between colors: zero where all is grey
lift = 2 * np.concatenate([np.eye(3), differences])  # 3 colors → 16 channels


def draw_pictures(rng, count):
    """Return pictures (B, 3, 16, 16), labels (4: no color), and where the spots are: (B, 2, 2), colored one first."""
    pictures = np.empty((count, SIDE, SIDE, 3))
    places, labels = np.empty((count, 2, 2), dtype=int), rng.integers(0, 5, count)
    for number in range(count):
        grey = greys[rng.integers(len(greys))]
        top, left = (rng.integers(0, length - SIDE + 1) for length in grey.shape)
        pictures[number] = grey[top : top + SIDE, left : left + SIDE, None]
        while True:
            places[number] = rng.integers(1, SIDE - 1, (2, 2))
            if np.abs(places[number, 0] - places[number, 1]).max() > 4 * SPOT:
                break
        spots = [*PALETTE[labels[number] : labels[number] + 1], np.ones(3)]  # no colored one where the label is 4
        for (y, x), color in zip(places[number, ::-1], spots[::-1]):
            near_y, near_x = (np.exp(-np.square(np.arange(SIDE) - at) / (2 * SPOT**2)) for at in (y, x))
            opacity = np.outer(near_y, near_x)[..., None]
            pictures[number] = (1 - opacity) * pictures[number] + opacity * color
    return pictures.transpose(0, 3, 1, 2), labels, places


layer = dat_ref.DeformableAttentionConfig(dim=DIM, heads=1, stride=4, kernel_size=8, size=(SIDE, SIDE))


def classify(params, pictures):
    """Return logits (B, 5), the layer's output and trace, and what is classified: the mean over the map."""
    y, trace = deformable_layer(linear(pictures - 0.5, lift).astype(np.float32), params["layer"], layer)
    pooled = y.mean(axis=(2, 3))[:, :, None]  # (B, 16, 1)
    return linear(pooled, **params["head"])[:, :, 0], y, trace, pooled


def learn(params, steps=200, batch=24, rate=0.01, seed=0):
    optimizer, rng, losses = AdamW(weight_decay=0.01), np.random.default_rng(seed), []
    state = optimizer.init(params)
    for step in range(steps):
        pictures, labels, _ = draw_pictures(rng, batch)
        logits, y, trace, pooled = classify(params, pictures)
        grad_logits = cross_entropy_vjp(1.0, logits, labels)[:, :, None]
        head = linear_vjp(grad_logits, pooled, **params["head"])
        grad_y = np.broadcast_to(head.x[..., None] / SIDE**2, y.shape).astype(np.float32)
        _, grads = deformable_layer_vjp(grad_y, trace, params["layer"], layer)
        now = scheduled_rate(step, steps, rate, warmup_steps=20)
        params, state = optimizer.step(params, {"layer": grads, "head": head.params}, state, now)
        losses.append(float(cross_entropy(logits, labels)))
    return params, losses


start = {
    "layer": dat_ref.init_params(layer, seed=0, offsets="zero_offset"),
    "head": {"weight": np.zeros((5, DIM), np.float32), "bias": np.zeros(5, np.float32)},
}
learned, losses = learn(start)
pictures, labels, places = draw_pictures(np.random.default_rng(99), 400)  # none of them seen before
logits, _, trace, _ = classify(learned, pictures)

figure, rows = plt.subplots(2, 7, figsize=(8.8, 2.8))
for row, params in zip(rows, (start, learned)):
    shown = classify(params, pictures[:7])[2]
    for number, axes in enumerate(row):
        axes.imshow(pictures[number].transpose(1, 2, 0), interpolation="nearest")
        before, after = (part[number, 0].reshape(-1, 2) for part in (shown.reference_px, shown.points_px))
        axes.plot(*np.stack([before, after]).transpose(2, 0, 1)[::-1], color="white", lw=0.6)
        shares = shown.attention[number, 0].mean(axis=0)
        axes.scatter(*after.T[::-1], s=260 * shares, color=ORANGE, ec="white", lw=0.6, zorder=3)
        axes.set(xticks=[], yticks=[], xlim=(-2.5, SIDE + 1.5), ylim=(SIDE + 1.5, -2.5), facecolor=style.MARGIN)
        axes.spines[:].set_visible(False)
rows[0, 0].set_ylabel("before")
rows[1, 0].set_ylabel("after")
plt.show()


# %%
def share_read(points_px, spots):
    """Return in how many pictures a point lies on the spot: within 1.4 pixels on both axes."""
    distance = np.abs(points_px.reshape(len(spots), -1, 2) - spots[:, None]).max(axis=2)
    return (distance <= SPOT).any(axis=1).mean()


right = (logits.argmax(axis=1) == labels).mean()
print(f"right on {right:.0%} of {len(labels)} new pictures")
colored = labels < 4
for spot, name in enumerate(("colored", "white")):
    grid, updated = (share_read(part[colored], places[colored, spot]) for part in (trace.reference_px, trace.points_px))
    print(f"a point on the {name} spot: in {grid:.0%} of the pictures on the grid, in {updated:.0%} moved")
    assert (updated > 0.9 and updated > 2 * grid) if name == "colored" else updated < 0.9 * grid
assert right > 0.95
steps = (trace.points_px - trace.reference_px)[:, 0].reshape(len(labels), -1, 2)
scatter = np.linalg.norm(steps - steps.mean(axis=1, keepdims=True), axis=2).mean(axis=1)  # around the common step
print(
    f"off the common step: {scatter[colored].mean():.2f} pixels with a colored spot, "
    f"{scatter[~colored].mean():.2f} without one"
)
assert scatter[~colored].mean() < 0.5 * scatter[colored].mean()

# %% [markdown]
# ## 5. Does importance matter?
#
# Large circles lie on the spot. But do they *matter*? How much attention a key receives is one thing, what the answer
# would be without it another. So take keys away, and let the softmax share their attention among those that are left:
#
# $$ z_m = \frac{\sum_{n\ \text{left}} A_{mn}\, v_n}{\sum_{n\ \text{left}} A_{mn}} . $$
#
# **Claim** (`dat_ref.viz.key_importance`). Keys taken away from the most important on, the answers go wrong. From the
# least important on, three quarters can go and hardly an answer changes. Here importance can be trusted. That is a
# fact about this model, measured, and not about attention.


# %%
def right_with(kept):
    """Return the share of colored pictures that are classified right with some of the keys, (B, Ns) of booleans."""
    weights = (trace.attention[:, 0] * kept[:, None]).astype(np.float64)  # (B, M, Ns)
    weights /= weights.sum(axis=2, keepdims=True) + 1e-30
    z = (weights @ trace.v[:, 0]).mean(axis=1)[:, :, None]  # (B, C, 1): a mean over the queries
    predictions = linear(linear(z, **learned["layer"]["output"]), **learned["head"])[:, :, 0].argmax(axis=1)
    return (predictions == labels)[colored].mean()


importance = viz.key_importance(trace.attention)[:, 0]  # (B, 16)
rank = np.argsort(np.argsort(-importance, axis=1), axis=1)  # 0 is the most important
curves = {
    "the most important first": [right_with(rank >= gone) for gone in range(16)],
    "the least important first": [right_with(rank < 16 - gone) for gone in range(16)],
}

figure, (axes, received) = plt.subplots(1, 2, figsize=(8.8, 2.6))
for (name, values), color in zip(curves.items(), (ORANGE, BLUE)):
    axes.plot(range(16), values, color=color, lw=1.8, marker="o", ms=4, label=name)
axes.set(xlabel="keys taken away, of 16", title="right answers", ylim=(0, 1.05), xticks=[0, 4, 8, 12, 15])
axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
axes.legend(loc="lower left")
shares = -np.sort(-importance, axis=1)[colored].mean(axis=0) / SIDE**2
received.bar(range(1, 17), shares, color=BLUE, width=0.7)
received.axhline(1 / 16, color=style.QUIET, lw=0.8, ls=(0, (4, 3)))
received.text(16.4, 1 / 16 + 0.004, "even share", ha="right", size=8, color=style.QUIET)
received.set(xlabel="rank of the key", title="attention received", xticks=[1, 4, 8, 12, 16])
plt.show()

# %%
first, last = curves.values()
assert first[0] == last[0] > 0.95
assert first[12] < 0.5
assert last[12] > 0.9
assert all(low <= high + 0.02 for low, high in zip(first, last))

# %% [markdown]
# ## 6. Your model
#
# With a released file the same figures show what a model learned from ImageNet. The files are not part of this
# project; get one from the links in its authors' repository, and say where it is:
#
# ```bash
# DAT_CHECKPOINT=dat_tiny_in1k_224.pth jupyter lab notebooks/07_where_it_looks.py
# dat-ref explain photo.jpg --model dat_tiny --checkpoint dat_tiny_in1k_224.pth
# ```
#
# Nothing in the file is executed. Which release and which of the eight models it is, is read from its names and
# shapes; an array that is missing, left over or of another shape is reported, not passed over.
#
# **Claim** (`dat_ref.checkpoints`). The cell below loads a file with released names and draws it. Where you have none,
# it writes the seeded weights under released names first, and reads those back: the same road, and the same numbers.


# %%
def model_from(path):
    """Return the name of the released model that a file is of, and the model."""
    name, config = detect_preset(read_state(path))
    params, report = load_params(path, config)
    assert report.complete, report
    return name, dat_ref.DAT(config, params)


given = os.environ.get("DAT_CHECKPOINT")
with tempfile.TemporaryDirectory() as folder:
    path = Path(given or folder) / ("" if given else "seeded.npz")
    if not given:
        save_state(path, official_state(untrained.params, untrained.config))
    name, model = model_from(path)
yours, _ = traces_of(model, stage=4)
what = f"{name}, {Path(given).name if given else 'seeded weights, by way of a file'}"
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
# - Marks belong at $(p + \frac12) \cdot \text{ratio} - \frac12$, $y$ first. Test it with a bright patch.
# - Points that moved and circles of many sizes are no evidence of learning. Even shares are the measure.
# - A small task with a known answer shows that points do find what matters, by gradient alone.
# - Whether importance means influence is a question to ask of each model: take the key away.
#
# Next: [in your own model](../08_in_your_own_model/).

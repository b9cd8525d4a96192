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
# # What it learned
#
# Do offsets help? That depends on what a layer without them misses. This notebook runs the trained network that ships,
# `dat_spot`, in NumPy. By the law of coverage it needs its offsets: without them it would miss most objects. We look at
# its points, take the offsets away, and compare with networks that were trained without them.
#
# [Objects on photographs](../../experiments/objects/) has all tables, five seeds with offsets, and the command that
# trains them. Each section makes a claim, names the function of `dat_ref` that it is about, draws it, and ends with an
# assertion.

# %%
import matplotlib.pyplot as plt
import numpy as np

from dat_ref import viz
from dat_ref.cli import spot
from dat_ref.data import network_card
from dat_ref.ops.coverage import capture_radius, coverage, fixed_grid_bound, hit_rate
from dat_ref.ops.sampling import bilinear_sample
from dat_ref.scenes import Scenes
from dat_ref.viz import style

plt.rcParams.update(style.SETTINGS)
plt.rcParams.update({"figure.dpi": 110, "figure.constrained_layout.use": True})
BLUE, ORANGE, GREEN, PINK = style.GROUP_COLORS[:4]

# %% [markdown]
# ## 1. A scene knows where its object is
#
# A photograph, one of eight objects on it or none, and a mask: the pixels that the object covers by at least half.
#
# **Claim** (`dat_ref.scenes.Scenes`). The position of the object is uniform, and each kind is as frequent as *nothing*.
# So a network cannot know where to look before it has looked.

# %% alt="Six scenes: photographs with one small drawn object each, somewhere, and its name"
scenes = Scenes("find", "held_out", size=160, objects="pictures")
shown = [scenes[number] for number in (0, 1, 2, 4, 8, 9)]

figure, panels = plt.subplots(1, 6, figsize=(9.6, 1.9))
for axes, scene in zip(panels, shown):
    axes.imshow(scene.image)
    if len(scene.masks):
        axes.contour(scene.masks[0], [0.5], colors=["white"], linewidths=1)
    axes.set_title(scenes.classes[scene.label], fontsize=8.5)
    axes.axis("off")
plt.show()

# %%
many = [Scenes("find", "held_out", size=16, objects="pictures")[number] for number in range(900)]
centers = np.array([scene.objects[0].center for scene in many if scene.objects]) / 15
counts = np.bincount([scene.label for scene in many], minlength=9)
print(
    f"{np.mean(centers[:, 1] < 0.5):.0%} of the objects are in the left half, {np.mean(centers[:, 0] < 0.5):.0%} above"
)
assert np.abs((centers < 0.5).mean(0) - 0.5).max() < 0.1
assert np.abs(counts / 900 - 1 / 9).max() < 0.04

# %% [markdown]
# ## 2. What a fixed grid can know
#
# `dat_spot` has a map of 40 × 40 positions and a key grid of stride 10: a key for every 100 positions. A key with zero
# offsets reads four of them.
#
# **Claim** (`dat_ref.ops.coverage.hit_rate`). A key grid without offsets reads all positions at strides 1 and 2, and
# misses a small target more often the larger the stride. With $h$ the share of targets that it hits, nothing that reads
# the keys can name one of $K$ kinds more often than $h + (1 - h)/K$. No training is needed to know this.

# %% alt="Highest accuracy of a fixed grid against the size of the target: lower for larger strides" plot=true
strides = (2, 4, 6, 8, 10)
targets = range(1, 10)
bounds = {r: [fixed_grid_bound(hit_rate((40, 40), r, (t, t)), classes=9) for t in targets] for r in strides}

figure, axes = plt.subplots(figsize=(6.4, 2.8))
for stride, values in bounds.items():
    axes.plot(targets, values, "o-", ms=4, label=f"stride {stride}, reads {coverage((40, 40), stride):.0%}")
axes.set(xlabel="side of the target, positions of the map", ylabel="highest accuracy", ylim=(0, 1.05))
axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()

# %%
assert all(value == 1 for value in bounds[2])
assert all(np.diff(values).min() >= 0 for values in bounds.values())
assert all(bounds[4][t] >= bounds[10][t] for t in range(9))
print(f"target of 4 × 4 positions at stride 10: at most {bounds[10][3]:.0%}")

# %% [markdown]
# ## 3. The network that ships moves its points to the objects
#
# Six scenes that it has not seen. It was trained with a loss on the class at every position; no label says where the
# objects are.
#
# **Claim** (`dat_ref.cli.spot.look`). On most scenes a point is on the object, a reference point seldom is. It
# receives several times its share of the attention. On an empty scene all points of a group make nearly the same shift.

# %% alt="Scenes with reference points as rings and moved points as circles; most objects have a circle on them"
panels = [spot.look_at_scene(number) for number in spot.SCENES]  # with none to six objects, all of different kinds
viz.draw_scenes(
    [viz.ScenePanel(each.picture, each.trace, ", ".join(each.objects) or "empty") for each in panels],
    title="Points after the offsets",
    caption="Rings: reference points. Area of a circle: the attention that its point receives.",
)

# %%
looked = []
for number in range(48):
    scene = scenes[number]
    kinds = [placed.kind for placed in scene.objects]
    looked.append(spot.look(f"scene {number}", scene.image / 255, scene.masks, kinds, scene.image))
single = [each for each in looked if each.objects]
moved = np.mean([each.points_on_objects > 0 for each in single])
reference = np.mean([each.reference_points_on_objects > 0 for each in single])
share = np.mean([each.points_on_objects / each.points for each in single])
attention = np.mean([each.attention_on_objects for each in single])
print(f"a point is on the object in {moved:.0%} of the scenes, a reference point in {reference:.0%}")
print(f"{share:.1%} of the points are on the object, and receive {attention:.0%} of the attention")
assert moved > reference + 0.4
assert attention > 3 * share

# %% [markdown]
# ## 4. Take the offsets away
#
# The same weights and the same scenes, with zero offsets.
#
# **Claim** (`dat_ref.cli.spot.load_network`). The answer depends on the offsets: with zero offsets the probability of a
# correct answer falls by more than 30 points. What the network says instead is mostly *nothing*: it does not see the
# object.

# %% alt="Probability of the right answer, scene by scene: high with offsets, much lower without" plot=true
right = [
    [each.answers[each.objects[0]] for each in single],
    [each.answers_zero_offsets[each.objects[0]] for each in single],
]

figure, axes = plt.subplots(figsize=(6.4, 2.4))
order = np.argsort(right[0])
axes.bar(range(len(single)), np.array(right[0])[order], color=BLUE, width=0.4, label="offsets of the network")
axes.bar(np.arange(len(single)) + 0.4, np.array(right[1])[order], color=ORANGE, width=0.4, label="zero offsets")
axes.set(xlabel="scene with one object", ylabel="probability of its kind", xticks=[])
axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
plt.show()

# %%
nothing = np.mean([each.answers_zero_offsets["nothing"] for each in single])
print(f"probability of the right kind: {np.mean(right[0]):.0%}, with zero offsets {np.mean(right[1]):.0%}")
print(f"probability of nothing with zero offsets: {nothing:.0%}")
assert np.mean(right[0]) - np.mean(right[1]) > 0.3
assert nothing > 0.3

# %% [markdown]
# ## 5. How far a target pulls a point
#
# A point follows the gradient of the sample at it: the difference of the pixels that it reads.
#
# **Claim** (`dat_ref.ops.coverage.capture_radius`). A target changes this gradient only within half its side plus one
# position, along each axis. A point farther away gets no pull from it. This is why `dat_spot` starts with zero offsets:
# the released initialization would move points by several positions in a random direction.

# %% alt="A sample and its gradient against the position: zero outside the capture radius" plot=true
side = 5
line = np.zeros((1, 1, 1, 41))
line[..., 18:23] = 1.0  # a target of 5 positions, its center at 20
places = np.arange(8, 32, 0.05)
points = np.stack([np.zeros_like(places), places], axis=-1)[None]
samples = bilinear_sample(line, points).ravel()
pull = np.gradient(samples, places)
radius = capture_radius(side)

figure, axes = plt.subplots(figsize=(6.4, 2.2))
axes.plot(places - 20, samples, color=BLUE, label="sample")
axes.plot(places - 20, pull, color=ORANGE, label="its gradient")
axes.axvspan(-radius, radius, color="0.9", lw=0)
axes.set(xlabel="position of the point relative to the center of the target")
axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()

# %%
far = np.abs(places - 20) > radius + 0.1
assert np.allclose(pull[far], 0)
assert np.abs(pull[np.abs(places - 20) < radius - 0.1]).max() > 0.5
print(f"a target of {side} positions pulls points within {radius:g} positions of its center")

# %% [markdown]
# ## 6. Trained without offsets
#
# Taking offsets away from a network that relies on them is not a fair comparison. A network trained without them could
# have found another way. So three controls were trained in the same way: no offsets, average pooling of the key cells,
# and four times the keys.
#
# **Claim** (`dat_ref.peers.replace_attention`). With offsets every seed is far more accurate than without, and more
# accurate than with four times the keys, at half their cost. Average pooling is nearly as accurate as offsets: it
# reads every position, so it misses nothing either, and an object of this size shows in the mean of its cell.

# %% alt="Accuracy of several seeds by layer: offsets and average pooling high, a fixed grid far below" plot=true
accuracies = network_card()["accuracies"]
figure, axes = plt.subplots(figsize=(6.4, 2.0))
for row, values in enumerate(accuracies.values()):
    axes.plot(values, [row] * len(values), "o", color=style.GROUP_COLORS[row], ms=6, alpha=0.8)
axes.set_yticks(range(len(accuracies)), list(accuracies))
axes.set(xlim=(0, 1), ylim=(len(accuracies) - 0.5, -0.5), xlabel="accuracy on held-out scenes; a dot for each seed")
plt.show()

# %%
for arm, values in accuracies.items():
    print(f"{arm:16}", *(f"{value:.1%}" for value in values))
assert min(accuracies["offsets"]) > max(accuracies["more keys"])
assert min(accuracies["offsets"]) - max(accuracies["no offsets"]) > 0.3
assert abs(np.mean(accuracies["offsets"]) - np.mean(accuracies["average pooling"])) < 0.05

# %% [markdown]
# ## What to remember
#
# - Offsets matter where the fixed grid misses the target. Compute the bound before you train.
# - At strides 1 and 2 it misses nothing: there a layer without offsets equals average pooling.
# - Compare with networks trained without offsets: with nothing in their place, with more keys, with average pooling.
#   The last one misses nothing either, and here it is nearly as good.
# - Start with zero offsets where the stride is large.

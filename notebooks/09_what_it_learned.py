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
# The article says three things of DAT's points, in pictures: they contract onto the objects, they are denser there in
# deeper stages, and separate groups go to separate objects. And it says that the offsets make the network better. A
# picture is no measurement, so this notebook measures: on small networks, trained on scenes whose objects' masks are
# known, several seeds each.
#
# The scripts of `dat_ref.experiments` trained and measured them; their files ship, and the figures below are drawn from
# those. [What was found](../../experiments/) has all tables and the commands. Each section makes a claim, names the
# function of `dat_ref` that it is about, draws it, and ends with an assertion. Section 2 runs the network that ships,
# in NumPy.

# %%
import matplotlib.pyplot as plt
import numpy as np

from dat_ref import viz
from dat_ref.cli.scene import explain_scene
from dat_ref.experiments import figures, load_results
from dat_ref.experiments.measures import interval, welch_difference
from dat_ref.experiments.models import BASE, MULTI_OBJECT, NO_OFFSETS
from dat_ref.experiments.pages import peers
from dat_ref.experiments.pages.formatting import accuracy, difference, names_in_part, significant_sign
from dat_ref.experiments.pages.points import (
    background_attention,
    density,
    distance_gain,
    layer_values,
    layers,
    points_gain,
    separation,
)
from dat_ref.scenes import KINDS, Scenes
from dat_ref.scenes.measures import received
from dat_ref.viz import style

plt.rcParams.update(style.SETTINGS)
plt.rcParams.update({"figure.dpi": 110, "figure.constrained_layout.use": True})
BLUE, ORANGE, GREEN, PINK = style.GROUP_COLORS[:4]

study, attention_maps = load_results("study"), load_results("attention_maps")


def percent(found):
    """Return a mean with its 95 % interval."""
    return f"{100 * found['mean']:.1f} ± {100 * found['half_width']:.1f} %"


# %% [markdown]
# ## 1. A scene knows where its object is
#
# A photograph, an object placed on it, a mask: the pixels that are at least half the object's. A scene follows from its
# number, so whoever asks sees the same one, and there is no end to them.
#
# **Claim** (`dat_ref.scenes.Scenes`). The object can be anywhere: over many scenes its middle is spread evenly, so a
# network cannot know where to look before it has looked. Kinds are equally frequent, and colour tells nothing.

# %%
scenes = Scenes("which", "held_out", size=96)
shown = [scenes[number] for number in (5, 7, 12, 19, 23, 31)]

figure, panels = plt.subplots(1, 6, figsize=(9.6, 1.9))
for axes, scene in zip(panels, shown):
    axes.imshow(scene.image)
    axes.contour(scene.masks[0], [0.5], colors=["white"], linewidths=1)
    axes.set_title(scenes.classes[scene.label], fontsize=8.5)
    axes.axis("off")
plt.show()

# %%
many = Scenes("which", "held_out", size=16)
middles = np.array([many[number].objects[0].center for number in range(400)]) / 15
radii = np.array([many[number].objects[0].radius for number in range(400)]) / 15
share_left = np.mean(middles[:, 1] < 0.5)
print(f"{share_left:.0%} of the objects are in the left half, {np.mean(middles[:, 0] < 0.5):.0%} in the upper half")
assert abs(share_left - 0.5) < 0.1
assert all(abs(np.mean([many[n].label == kind for n in range(400)]) - 1 / 8) < 0.06 for kind in range(len(KINDS)))

# %% [markdown]
# ## 2. The network that ships looks at the object
#
# `dat_nano` names the object rightly on more than 97 of 100 scenes that it has not seen. Below, the last deformable
# layer of its second stage on six of them: dots are points, a color for each group, larger where all queries together
# attend more.
#
# **Claim** (`dat_ref.cli.scene.explain_scene`). On scenes that it has not seen, attention lies on the object far more
# often than chance would have it; the points themselves hardly do.

# %%
explained = [explain_scene(number) for number in range(24)]

figure, panels = plt.subplots(1, 6, figsize=(9.6, 2.1))
for axes, found in zip(panels, explained):
    trace, side = found.explanation.trace, len(found.scene.image)
    places = viz.to_image_px(trace.points_px[0], trace.x.shape[2:], (side, side))  # (G, Hk, Wk, 2)
    axes.imshow(found.scene.image, alpha=0.75)
    for group, weights, color in zip(places, received(trace), (BLUE, ORANGE)):
        y, x = group.reshape(-1, 2).T
        axes.scatter(x, y, s=3 + 260 * weights.reshape(-1), color=color, lw=0.3, ec="white")
    axes.contour(found.scene.masks[0], [0.5], colors=["white"], linewidths=1)
    axes.set_title(f"{max(found.answers, key=found.answers.get)}\nattention {found.attended:.0%}", fontsize=8)
    axes.set(xlim=(-0.5, side - 0.5), ylim=(side - 0.5, -0.5))
    axes.axis("off")
plt.show()

# %%
shares = {
    "points on the object": interval(np.array([found.on_object for found in explained])),
    "points at rest": interval(np.array([found.at_rest for found in explained])),
    "attention on the object": interval(np.array([found.attended for found in explained])),
}
for name, found in shares.items():
    print(f"{name:24} {percent(found)}")
assert shares["attention on the object"]["mean"] > 5 * shares["points on the object"]["mean"]
assert shares["points on the object"]["mean"] < 2 * shares["points at rest"]["mean"]

# %% [markdown]
# ## 3. Points and attention, while a network learns
#
# A small network with three deformable layers, trained eight times. After some steps its weights were kept, and the
# share of its points on the object measured: blue. The dashed line is the undeformed grid. Orange is the attention that
# the points on the object get, all queries together.
#
# Points that move to where objects are more often, whatever the scene, would come to lie on more of them, too. So there
# is a second thing to compare with: how many of a scene's points lie on the object of *another* scene.
#
# **Claim** (`dat_ref.experiments.attention_maps.point_metrics`). In every layer more points lie on the object than at
# rest, and more than on another scene's: they do go to it, as the article shows. It is three or four points in a
# hundred, and with some seeds none; most points end up farther from it than they were. Attention finds the object
# sooner and more: in the first layer most of it lies there.

# %%
figures.draw_training(attention_maps["training"][BASE])

# %%
points = attention_maps["points"][BASE]
for layer in layers({"attention_maps": attention_maps}):
    shares = {
        name: interval(np.array(layer_values(points, layer, name))) for name in ("points", "reference", "by_chance")
    }
    print(layer, *(f"{name} {percent(found)}" for name, found in shares.items()), sep=",  ")
    assert significant_sign(points_gain(points, layer)) > 0
    assert significant_sign(points_gain(points, layer, "by_chance")) > 0
    assert significant_sign(distance_gain(points, layer)) > 0
first = layers({"attention_maps": attention_maps})[0]
assert np.mean(layer_values(points, first, "attention")) > 0.5

# %% [markdown]
# The same table for the networks whose offsets, groups or bounds were changed is on
# [Do the points move to the objects?](../../experiments/points/) The points of the second stage are not denser than
# those of the first, as far as eight seeds tell.

# %%
denser = {stage: interval(np.array(density(points, stage))) for stage in ("stage 1", "stage 2")}
print({stage: f"{each['mean']:.2f} ± {each['half_width']:.2f}" for stage, each in denser.items()})
change = interval(np.subtract(density(points, "stage 2"), density(points, "stage 1")))
assert significant_sign(change) == 0

# %% [markdown]
# ## 4. Separate groups for separate objects?
#
# The same network, trained twice as long on scenes with one to four objects. Each object falls to the group whose
# point is nearest. If groups divided the objects among themselves, two objects of one scene would fall to different
# groups more often than two objects of different scenes do.
#
# **Claim** (`dat_ref.experiments.attention_maps.separation_rate`). They do not: in no layer do two objects of a scene
# fall to different groups more often than chance would have it.

# %%
groups = attention_maps["multi_object_groups"][BASE + MULTI_OBJECT]
figure, axes = plt.subplots(figsize=(7.4, 2.2))
for row, layer in enumerate(groups["0"]):
    observed = [run[layer]["nearest"]["observed"] for run in groups.values()]
    chance = [run[layer]["nearest"]["by_chance"] for run in groups.values()]
    axes.plot(observed, [row] * len(observed), "o", color=BLUE, ms=6)
    axes.plot(chance, [row] * len(chance), "|", color=style.INK, ms=15)
axes.plot([], [], "o", color=BLUE, label="two objects of one scene")
axes.plot([], [], "|", color=style.INK, ms=12, label="by chance")
axes.set_yticks(range(len(groups["0"])), list(groups["0"]))
axes.set(xlim=(0.3, 0.7), ylim=(2.5, -0.5), xlabel="share of pairs that fall to different groups; a dot for each seed")
axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
plt.show()

# %%
for layer in groups["0"]:
    more = separation(groups, layer, "nearest")
    print(f"{layer}: {100 * more['mean']:+.1f} ± {100 * more['half_width']:.1f} in 100 pairs more than by chance")
assert all(significant_sign(separation(groups, layer, "nearest")) <= 0 for layer in groups["0"])

# %% [markdown]
# ## 5. Do the offsets help?
#
# The same network with its offsets changed: off, starting at exactly zero, with a smaller or a larger range $s$,
# clamped to the map as in DAT++. Dots are seeds, bars the 95 % interval of their mean.
#
# **Claim** (`dat_ref.OffsetBound`). On these scenes, with this network, that offsets help was not shown: without them
# it is as accurate, as far as eight seeds tell. A range that lets points go two key cells ($s = 4$) harms it. And the
# network that ships, whose range that is, has a baseline trained without offsets, which is the better one of the two.

# %%
offsets = [BASE, *names_in_part(study, "offsets")]
figures.draw_accuracies(study, offsets)

# %%
for name in offsets[1:]:
    change = difference(study, name, BASE)
    print(f"{name:12} {percent(accuracy(study, name))}, {100 * change['mean']:+.1f} ± {100 * change['half_width']:.1f}")
assert significant_sign(difference(study, BASE, NO_OFFSETS)) == 0
assert significant_sign(difference(study, "s = 4", BASE)) < 0
both = [[run["accuracy"] for run in study["runs"][name].values()] for name in (BASE, NO_OFFSETS)]
print("with offsets minus without, seed by seed:", *(f"{100 * (one - other):+.1f}" for one, other in zip(*both)))
assert max(np.subtract(*both)) > 0.1
assert min(np.subtract(*both)) < -0.05
baseline = load_results("no_offset_baseline")
print("the network that ships:", percent(baseline["accuracy"]))
print("its baseline without offsets:", percent(baseline["baseline"]))
assert significant_sign(baseline["difference"]) < 0

# %% [markdown]
# Seeds of the same network lie twenty points of accuracy apart. Anyone who shows one run of each can show what they
# like: a seed with which offsets gain much, or one with which they lose much. And the baseline is one run.
#
# ## 6. Who finds the object from afar
#
# Queries beside the object: how far they attend, and how much of their attention lies on it.
#
# **Claim** (`dat_ref.experiments.attention_maps.attention_metrics`). In the first layer they find it several times as
# often as with shifted windows, over twice the distance. The same network without offsets does too: it is the keys that
# all queries share that make it possible, not that they move.

# %%
figure, panels = plt.subplots(1, 3, figsize=(9.4, 2.9), sharey=True)
for axes, layer in zip(panels, layers({"attention_maps": attention_maps})):
    for (name, runs), color in zip(attention_maps["attention"].items(), style.GROUP_COLORS):
        found = [run[layer]["from_elsewhere"] for run in runs.values()]
        axes.plot([f["distance"] for f in found], [f["foreground"] for f in found], "o", color=color, ms=5, label=name)
    axes.set(title=layer, xlabel="how far attention goes, pixels")
panels[0].set_ylabel("share of it on the object")
panels[2].legend(loc="upper left", bbox_to_anchor=(1, 1))
plt.show()

# %%
ours, no_offsets, windows = (
    background_attention({"attention_maps": attention_maps}, first, name)
    for name in (BASE, NO_OFFSETS, "shifted_window")
)
for name, found in (("deformable", ours), ("without offsets", no_offsets), ("shifted windows", windows)):
    print(f"{first}, {name}: {percent(interval(found))}")
assert significant_sign(welch_difference(ours, windows)) > 0
assert significant_sign(welch_difference(no_offsets, windows)) > 0
assert significant_sign(welch_difference(ours, no_offsets)) == 0

# %% [markdown]
# ## 7. Another attention in its place
#
# All three layers replaced by a peer with as many keys of a query, or as near to that as the peer comes.
#
# **Claim** (`dat_ref.peers.replace_attention`). On these scenes four times as many keys, the whole map, are worth most.
# Deformable convolution, with three times the parameters, and the two forms that give every query points of its own,
# Deformable DETR's attention and the naive one, are more accurate than deformable attention; the DAT-DCN layer of the
# article is less. Windows, neighborhoods and the pyramid are not told apart from it.

# %%
figures.draw_accuracies(study, peers.names(study))

# %%
for side, names in peers.sides(study).items():
    print({1: "more accurate", 0: "not told apart", -1: "less accurate"}[side], *names)
found = {side: {name.strip("`") for name in names} for side, names in peers.sides(study).items()}
assert found[1] == {"multi_head", "deform_conv", "ms_deform", "per_query"}
assert found[-1] == {"dat_dcn"}
assert found[0] == {"window", "shifted_window", "neighborhood", "pyramid", "ms_deform_dot"}

# %% [markdown]
# ## What to remember
#
# - Points do go to the object, a few in a hundred more than by chance; attention finds it far more surely.
# - Shared keys let a far query see the object. That is so without offsets, too.
# - Measure against the grid at rest, and over seeds. One network shows what one network does.
# - These are toys: what is not found here may well be there in a large network on photographs. The scripts are there to
#   look for it: `python -m dat_ref.experiments.study --help`.

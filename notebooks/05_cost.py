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
# # Cost
#
# "Linear complexity" is claimed for many attention layers and measured for few. Timing does not settle the question,
# because it depends on the machine, the kernel and the load. Here nothing is timed. Every cost is *counted* twice: by
# a formula, and by observing the code while it runs. The two counts must agree exactly. Then the formula is also valid
# for sizes that are too large to run.
#
# Two results may surprise. In stages 3 and 4 the released models need *more* multiply-adds for their attention than
# plain attention would. The offset network, which the paper estimates at 6 %, costs 0.6 %.
#
# The reference is [the page on cost](../../cost/). Each section makes a claim, names the function of `dat_ref` that it
# concerns, draws a figure, and ends with assertions.

# %%
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Rectangle

import dat_ref
from dat_ref import DeformableAttentionConfig, WindowAttentionConfig
from dat_ref.block import block
from dat_ref.cli.photo import load_photo, normalise, resize
from dat_ref.complexity import (
    PUBLISHED,
    attention_terms,
    backbone_cost,
    block_cost,
    count,
    doubling,
    growth,
    measure_allocation,
    retained_bytes,
    total,
)
from dat_ref.data import photograph_path
from dat_ref.layer import deformable_layer
from dat_ref.ops.coverage import coverage
from dat_ref.peers import ATTENTIONS, REPLACEMENTS, MultiHeadAttentionConfig, PerQueryAttentionConfig, matched_peer
from dat_ref.viz import style
from dat_ref.viz.artists import dim

plt.rcParams.update(style.SETTINGS)
plt.rcParams.update({"figure.dpi": 110, "figure.constrained_layout.use": True})
BLUE, ORANGE, GREEN, PINK, SKY, YELLOW, BROWN, GRAY = style.GROUP_COLORS

# A layer of stage 3 of dat_tiny, with the stride of the paper's example
layer = DeformableAttentionConfig(dim=384, heads=12, groups=3, stride=2, kernel_size=5, size=(14, 14))
photo = load_photo(photograph_path("astronaut"))

# %% [markdown]
# ## 1. Counting the operations of a layer
#
# A multiply-add is a product that is added to a sum. Six parts of a layer contain multiply-adds:
#
# $$
# \underbrace{2 HW N_s C}_{\text{attention}} + \underbrace{2 HW C^2}_{\text{query, output}} +
# \underbrace{2 N_s C^2}_{\text{key, value}} + \underbrace{(k^2 + 2) N_s C}_{\text{offset network}} +
# \underbrace{4 N_s C}_{\text{sampling}} + \underbrace{4 HW N_s M}_{\text{bias}}
# $$
#
# `dat_ref.complexity.count` runs a function on arrays that record every operation. It does not use the formula or the
# names of the terms. It only records which function was active.
#
# **Claim.** The recorded operations equal the formula exactly, term by term.

# %% alt="Multiply-adds of a layer, by part: 80.7 million at stride 2, 149.3 million at stride 1" plot=true
backbone = dat_ref.config("dat_tiny")
features = dat_ref.DAT(backbone, dat_ref.init_params(backbone, seed=0)).forward_intermediates(
    normalise(resize(photo, (224, 224)))
)[2]  # (1, 384, 14, 14), from a photograph
params = dat_ref.init_params(layer, seed=0)
ran = count(deformable_layer, features, params, layer)
terms = attention_terms(1, (14, 14), layer)

TERM_COLORS = {
    "query and output": GRAY,
    "key and value": style.HAIRLINE,
    "attention": BLUE,
    "offset network": ORANGE,
    "bias": GREEN,
    "sampling": PINK,
}
figure, axes = plt.subplots(figsize=(9.6, 1.9))
for row, config in enumerate((layer, replace(layer, stride=1))):
    start = 0
    for name, color in TERM_COLORS.items():
        amount = attention_terms(1, (14, 14), config)[name].macs / 1e6
        axes.barh(
            row, amount, left=start, color=color, height=0.6, ec="white", lw=0.6, label=name if row == 0 else None
        )
        start += amount
    axes.text(start + 1, row, f"{start:.1f} M", va="center", size=8.5)
axes.set(yticks=[0, 1], yticklabels=["stride 2: 49 keys", "stride 1: 196 keys"], xlabel="millions of multiply-adds")
axes.invert_yaxis()
axes.tick_params(axis="y", length=0)
figure.legend(loc="outside upper center", ncols=6, handlelength=1, columnspacing=1.2)
plt.show()

# %%
by_function = {
    "attention": "attend",
    "offset network": "offset_network",
    "bias": "table_bias",
    "sampling": "_sample_groups",
}
for name, function in by_function.items():
    assert ran.within(function).macs == terms[name].macs
rest = ran.macs - ran.within(*by_function.values()).macs  # the four projections
assert rest == terms["query and output"].macs + terms["key and value"].macs
assert ran.macs == total(terms).macs
assert ran.gathers == total(terms).gathers
for name, term in terms.items():
    print(f"{name:17} {term.macs:>11,}")

# %% [markdown]
# ## 2. A misplaced decimal point
#
# The paper's own example has $H = W = 14$, $N_s = 49$, $C = 384$, $k = 5$. It gives 79.63 M for attention and
# projections, and 5.08 M, about 6 %, for the offset network.
#
# **Claim.** The first number is correct. The second is too large by a factor of ten:
# $27 \cdot 49 \cdot 384 = 508\,032$. Moving the points is nearly free, and the paper understates this advantage.

# %% alt="Squares with areas of the costs: 79.63 million, 5.08 as published, and 0.51, the correct one" plot=true
three = sum(terms[name].macs for name in ("attention", "query and output", "key and value"))
network = terms["offset network"].macs
figure, axes = plt.subplots(figsize=(6.4, 2.5))
squares = (("attention and projections", three, BLUE), ("offset network, published", 5.08e6, style.HAIRLINE))
left = 0.0
for name, amount, color in (*squares, ("correct", network, ORANGE)):
    side = (amount / 1e6) ** 0.5  # area: multiply-adds
    axes.add_patch(Rectangle((left, 0), side, side, color=color))
    axes.text(left, -0.5, f"{name}\n{amount / 1e6:.2f} M", size=8.5, va="top")
    left += max(side, 6.5) + 1.2
axes.set(xlim=(0, left), ylim=(-2.6, 9.2), aspect="equal", xticks=[], yticks=[])
axes.spines[:].set_visible(False)
plt.show()

# %%
assert round(three / 1e6, 2) == 79.63
assert network == (5**2 + 2) * 49 * 384 == 508_032
assert ran.within("offset_network").macs == network  # also counted, not only by formula
assert round(5_080_000 / network) == 10

# %% [markdown]
# ## 3. Gathers: reads at computed addresses
#
# Multiply-adds are cheap in matrix products. A read at an address that depends on the data, a *gather*, is not: each
# interpolated value needs four of them. Sharing the keys saves this cost.
#
# **Claim** (`dat_ref.complexity.count`). A layer with 49 shared points reads 196 pixels, for all 196 queries together.
# With 49 points for each query it reads 196 times as many, and twice that if keys and values are read separately. Each
# read fetches all channels.


# %% alt="Pixels that 49 shared points read, and that 49 points for each query read; the values gathered, in bars"
def readings(points_px):
    """Return the number of reads of each pixel of a 14 × 14 map by points (..., 2); a point reads four pixels."""
    times = np.zeros((16, 16), dtype=int)  # with a border for points outside
    for y, x in np.clip(np.floor(points_px.reshape(-1, 2)).astype(int) + 1, 0, 14):
        times[y : y + 2, x : x + 2] += 1
    return times[1:-1, 1:-1]


own = PerQueryAttentionConfig(dim=384, heads=12, kernel_size=7)
passes = {}
for config in (layer, own):
    _, trace = ATTENTIONS[type(config)].forward(features, dat_ref.init_params(config, seed=0), config)
    passes[config] = readings(trace.points_px[0, 0] if config is layer else trace.points_px)

figure, panels = plt.subplots(1, 3, figsize=(9.2, 2.7), width_ratios=[1, 1, 0.9])
for axes, (config, times) in zip(panels, passes.items()):
    axes.imshow(dim(resize(photo, (224, 224))), extent=(-0.5, 13.5, 13.5, -0.5))
    axes.imshow(times / times.max(), cmap=style.HEAT, alpha=0.8, extent=(-0.5, 13.5, 13.5, -0.5))
    name = "shared points" if config is layer else "points per query"
    axes.set(xticks=[], yticks=[], title=f"{name}: at most {times.max()} reads")
amounts = {"shared": count(deformable_layer, features, params, layer).within("_sample_groups").gathers}
amounts["points per query"] = count(
    ATTENTIONS[PerQueryAttentionConfig].forward, features, dat_ref.init_params(own, seed=0), own
).gathers
panels[2].bar(list(amounts), list(amounts.values()), color=(BLUE, ORANGE), width=0.6)
panels[2].set(yscale="log", ylim=(1e3, 3e8), title="values gathered")
for column, amount in enumerate(amounts.values()):
    panels[2].text(column, amount * 1.3, f"{amount:,}", ha="center", size=8.5)
plt.show()

# %%
assert amounts["shared"] == 4 * 49 * 384
assert amounts["points per query"] == 2 * 196 * amounts["shared"]
assert passes[layer].sum() <= 4 * 49 < 4 * 49 * 196  # fewer at the border

# %% [markdown]
# ## 4. Growth, counted while the code runs
#
# A cost proportional to $\text{side}^p$ is multiplied by $2^p$ when the side of the map doubles. Linear in the number
# of pixels means $p = 2$, quadratic means $p = 4$.
#
# **Claim** (`dat_ref.complexity.growth`). Deformable attention is linear *with a fixed number of keys* and quadratic
# *with a fixed stride*. The exponents of the attention term are from executed layers. Dots are executed layers, lines
# are formulas.

# %% alt="Multiply-adds of attention against the side of the map: slopes of linear and quadratic growth" plot=true
SMALL = DeformableAttentionConfig(dim=12, heads=2, groups=1, stride=2, kernel_size=3, size=(8, 8))
SIDES = doubling(8, 2)
systems = {
    "plain attention": (lambda side: MultiHeadAttentionConfig(12, 2), GRAY),
    "DAT, stride 2": (lambda side: SMALL, BLUE),
    "DAT, 16 keys": (lambda side: replace(SMALL, stride=side // 4), ORANGE),
    "window 4 × 4": (lambda side: WindowAttentionConfig(12, 2, window_size=4), GREEN),
}


def counted_attention(config, side):
    """Run a layer on noise and return the multiply-adds inside `attend`."""
    x = np.random.default_rng(0).normal(size=(1, 12, side, side))
    forward = ATTENTIONS[type(config)].forward
    return count(forward, x, dat_ref.init_params(config, seed=0, dtype=np.float64), config).within("attend").macs


figure, axes = plt.subplots(figsize=(6.6, 3.2))
exponents = {}
for name, (config_at, color) in systems.items():
    counted = growth({side: counted_attention(config_at(side), side) for side in SIDES})
    exponents[name] = counted.exponent
    wide = doubling(8, 4)
    by_formula = [attention_terms(1, (side, side), config_at(side))["attention"].macs for side in wide]
    assert by_formula[:3] == list(counted.counts)
    axes.plot(wide, by_formula, color=color, lw=1.4)
    axes.plot(SIDES, counted.counts, "o", color=color, ms=5)
    shift = {"DAT, 16 keys": 5, "window 4 × 4": -5}.get(name, 0)
    axes.annotate(
        f"{name}: {exponents[name]:.1f}",
        (wide[-1], by_formula[-1]),
        xytext=(8, shift),
        textcoords="offset points",
        color=color,
        va="center",
    )
axes.set(xscale="log", yscale="log", xticks=doubling(8, 4), xticklabels=doubling(8, 4), xlim=(7, 420))
axes.set(xlabel="side of the map", title="multiply-adds of the attention term, with exponent")
axes.minorticks_off()
plt.show()

# %%
assert {name: round(exponent, 9) for name, exponent in exponents.items()} == {
    "plain attention": 4, "DAT, stride 2": 4, "DAT, 16 keys": 2, "window 4 × 4": 2
}  # fmt: skip

# %% [markdown]
# ## 5. The saving comes from the stride
#
# A layer with stride 1 has as many keys as plain attention, plus an offset network, sampling and an interpolated bias.
# The released DAT has stride 1 in stages 3 and 4.
#
# **Claim.** There, deformable attention needs 2 % *more* multiply-adds than plain attention on the same map. It saves
# multiply-adds from stride 2 on, and more on larger maps.
#
# The stride also determines how much of the map the points read with zero offsets (`dat_ref.ops.coverage`). At strides
# 1 and 2 they read every pixel, and the layer equals attention with average-pooled keys. So at stride 1 moving the
# points can neither save operations nor recover pixels that were missed. At stride 4 the points read 25 % of the map,
# and at stride 7 about 2 %. There the layer is much cheaper, and the offsets can matter.

# %% alt="Multiply-adds relative to plain attention: 102 % at stride 1, less at larger strides" plot=true
plain = MultiHeadAttentionConfig(384, 12, size=(14, 14))

MAPS = (14, 28, 56, 112)
ratio = {
    stride: [
        total(attention_terms(1, (side, side), replace(layer, stride=stride))).macs
        / total(attention_terms(1, (side, side), plain)).macs
        for side in MAPS
    ]
    for stride in (1, 2, 4, 7)
}

figure, axes = plt.subplots(figsize=(6.2, 2.7))
for (stride, values), color in zip(ratio.items(), (ORANGE, BLUE, GREEN, PINK)):
    axes.plot(MAPS, values, color=color, lw=1.8, marker="o", ms=4)
    axes.annotate(
        f"stride {stride}",
        (MAPS[-1], values[-1]),
        xytext=(7, 6 if stride == 1 else 0),
        textcoords="offset points",
        color=color,
        va="center",
    )
axes.axhline(1, color=style.QUIET, lw=0.8, ls=(0, (4, 3)))
axes.set(xscale="log", yscale="log", xticks=MAPS, xticklabels=MAPS, xlim=(13, 170), yticks=[0.03, 0.1, 0.3, 1])
axes.set(yticklabels=["3%", "10%", "30%", "100%"], xlabel="side of the map", title="multiply-adds / plain attention")
axes.minorticks_off()
plt.show()

# %%
in_release = [block.attention for blocks in dat_ref.config("dat_tiny").stages for block in blocks]
assert {each.stride for each in in_release if each.kind == "deformable"} == {1}
print(f"stride 1 on 14 × 14: {ratio[1][0]:.3f} times plain attention")
assert 1 < ratio[1][0] < 1.05
assert [round(coverage((56, 56), stride), 3) for stride in (1, 2, 4, 7)] == [1, 1, 0.25, 0.02]
for stride in (2, 4, 7):
    assert (np.diff(ratio[stride]) < 0).all()
    assert ratio[stride][0] < 1

# %% [markdown]
# ## 6. Memory
#
# The reference code stores every intermediate, as the released code does. Two intermediates have an entry for every
# pair of query and key: the bias and the attention.
#
# **Claim** (`dat_ref.complexity.retained_bytes`). The bytes that a pass holds equal the formula. On an image of 224
# pixels the pairs are a part of the memory. At the size used for detection, 800 × 1333, they are nine tenths of it in
# stage 1 of DAT++, and more than a gigabyte for one layer. (A kernel that does not store the pairs needs only the
# rest: see [the backends](../08_in_your_own_model/).)

# %% alt="Bytes stored by a layer for backward at three image sizes: pairs dominate the largest" plot=true
stage1 = dat_ref.config("dat_pp_tiny").stages[0][1].attention
IMAGES = {"224 × 224": (56, 56), "448 × 448": (112, 112), "800 × 1333": (200, 334)}
saved_bytes = {
    name: {term: cost.saved_bytes for term, cost in attention_terms(1, size, stage1).items()}
    for name, size in IMAGES.items()
}

figure, axes = plt.subplots(figsize=(8.6, 2.0))
for row, parts in enumerate(saved_bytes.values()):
    start = 0
    for name, color in TERM_COLORS.items():
        amount = parts[name] / 2**20
        axes.barh(
            row, amount, left=start, color=color, height=0.6, ec="white", lw=0.4, label=name if row == 0 else None
        )
        start += amount
    axes.text(start + 12, row, f"{start:,.0f} MiB", va="center", size=8.5)
axes.set(yticks=range(3), yticklabels=saved_bytes, xlabel="MiB stored for backward: one layer, one image, float32")
axes.invert_yaxis()
axes.tick_params(axis="y", length=0)
figure.legend(loc="outside upper center", ncols=6, handlelength=1, columnspacing=1.2)
plt.show()

# %%
x = np.random.default_rng(0).normal(size=(1, stage1.dim, 56, 56)).astype(np.float32)
stage1_params = dat_ref.init_params(stage1, seed=0)
measured_bytes = retained_bytes(deformable_layer(x, stage1_params, stage1), exclude=[x, stage1_params])
assert measured_bytes == sum(saved_bytes["224 × 224"].values())
pairs = {name: (parts["attention"] + parts["bias"]) / sum(parts.values()) for name, parts in saved_bytes.items()}
print(", ".join(f"{name}: pairs {share:.0%}" for name, share in pairs.items()))
assert pairs["224 × 224"] < pairs["448 × 448"] < pairs["800 × 1333"]
assert pairs["800 × 1333"] > 0.9
assert sum(saved_bytes["800 × 1333"].values()) > 2**30

whole = dat_ref.config("dat_pp_tiny").stages[0][1]
peak = measure_allocation(
    block,
    x,
    dat_ref.init_params(replace(dat_ref.config("dat_pp_tiny"), num_classes=0), 0)["stages"][0]["blocks"][1],
    whole,
).peak
assert abs(peak / block_cost(1, (56, 56), whole).peak - 1) < 0.03  # measured peak memory

# %% [markdown]
# ## 7. Whole backbones
#
# Attention is one part of a block, and a backbone has many blocks. This section splits the multiply-adds of whole
# models into their parts.
#
# **Claim** (`dat_ref.complexity.backbone_cost`). The sums agree with the published values of all eight models to 1.5
# %. The MLPs are six tenths of dat_tiny. Its four deformable layers, including sampling and bias, are an eighth.

# %% alt="Multiply-adds of dat_tiny and dat_pp_tiny, block by block, by part: the MLPs are the largest" plot=true
PARTS = {"deformable": BLUE, "local attention": SKY, "mlp": style.HAIRLINE, "rest": GRAY}


def split(part):
    """Return the multiply-adds of one part of a backbone, split into attention, MLP and rest."""
    mlp = part.terms["mlp"].macs if "mlp" in part.terms else 0
    perception = part.terms["local perception"].macs if "local perception" in part.terms else 0
    attention = part.total.macs - mlp - perception
    if part.block == 0:
        return {"rest": part.total.macs}
    return {"deformable" if part.kind == "deformable" else "local attention": attention, "mlp": mlp, "rest": perception}


figure, panels = plt.subplots(2, 1, figsize=(9.6, 3.6), height_ratios=[1, 1])
shares = {}
for axes, name in zip(panels, ("dat_tiny", "dat_pp_tiny")):
    cost = backbone_cost(1, (224, 224), dat_ref.config(name))
    sums = dict.fromkeys(PARTS, 0)
    for position, part in enumerate(cost.parts):
        bottom = 0
        for kind, amount in split(part).items():
            axes.bar(position, amount / 1e6, bottom=bottom, color=PARTS[kind], width=0.8)
            bottom += amount / 1e6
            sums[kind] += amount
    shares[name] = {kind: amount / cost.total.macs for kind, amount in sums.items()}
    assert sum(sums.values()) == cost.total.macs
    axes.set(xticks=[], title=f"{name}: {cost.total.macs / 1e9:.2f} G in total", ylabel="millions")
panels[1].set_xlabel("from patch embedding to head, block by block")
handles = [Rectangle((0, 0), 1, 1, color=color) for color in PARTS.values()]
figure.legend(handles, PARTS, loc="outside upper right", ncols=4, handlelength=1, columnspacing=1.2)
plt.show()

# %%
for name, (side, millions, billions) in PUBLISHED.items():
    cost = backbone_cost(1, (side, side), dat_ref.config(name)).total
    assert abs(cost.parameters / 1e6 / millions - 1) < 0.025
    assert abs(cost.products / 1e9 / billions - 1) < 0.015
for name, of_model in shares.items():
    print(name, ", ".join(f"{kind} {share:.0%}" for kind, share in of_model.items()))
assert round(shares["dat_tiny"]["mlp"], 1) == 0.6
assert abs(shares["dat_tiny"]["deformable"] - 1 / 8) < 0.01
assert sum(part.kind == "deformable" for part in backbone_cost(1, (224, 224), dat_ref.config("dat_tiny")).parts) == 4

# %% [markdown]
# ## 8. Ten systems, multiply-adds and gathers
#
# FLOP counters count multiply-adds only. On graphics processors gathers are also expensive, and the systems differ
# more in gathers.
#
# **Claim.** We compare ten systems with 49 keys per query, or the closest possible number. Deformable attention needs
# the fewest multiply-adds. Of the systems that move points it needs the fewest gathers, by a factor of more than 25.

# %% alt="Ten systems by multiply-adds and gathered values: deformable attention is low in both" plot=true live="cost"
NAMES = {
    "deformable": "DAT",
    "multi_head": "plain attention",
    "window": "window",
    "neighborhood": "neighborhood",
    "pyramid": "spatial reduction",
    "deform_conv": "deformable convolution",
    "ms_deform": "Deformable DETR",
    "ms_deform_dot": "DETR, dot products",
    "per_query": "per-query keys",
    "dat_dcn": "DAT-DCN",
}
peers = {"deformable": layer, **{kind: matched_peer(layer, (14, 14), kind) for kind in REPLACEMENTS if kind in NAMES}}
price = {kind: total(attention_terms(1, (14, 14), config)) for kind, config in peers.items()}

figure, axes = plt.subplots(figsize=(8.0, 3.6))
floor = 4e4  # y position of systems without gathers
NUDGES = {"dat_dcn": (7, 7), "ms_deform": (7, -7), "per_query": (7, -6), "ms_deform_dot": (7, 7)}
NUDGES |= {"window": (-8, 11), "neighborhood": (-8, -12), "pyramid": (-85, 0)}
for kind, cost in price.items():
    moves = cost.gathers > 0
    color = BLUE if kind == "deformable" else (ORANGE if moves else GRAY)
    axes.scatter(cost.macs, max(cost.gathers, floor), s=55, color=color, zorder=3, lw=0)
    axes.annotate(
        NAMES[kind],
        (cost.macs, max(cost.gathers, floor)),
        xytext=NUDGES.get(kind, (7, 0)),
        textcoords="offset points",
        color=color,
        va="center",
        size=8.5,
    )
axes.set(xscale="log", yscale="log", ylim=(2e4, 1.5e8), xlim=(4e7, 1.3e10))
axes.set(
    xlabel="multiply-adds",
    ylabel="values gathered",
    yticks=[floor, 1e6, 1e7, 1e8],
    yticklabels=["none", "1 M", "10 M", "100 M"],
)
axes.minorticks_off()
plt.show()

# %%
assert min(price, key=lambda kind: price[kind].macs) == "deformable"
movers = {kind: cost.gathers for kind, cost in price.items() if cost.gathers}
assert min(movers, key=movers.get) == "deformable"
assert sorted(movers.values())[1] > 25 * movers["deformable"]

# %% [markdown]
# ## What to remember
#
# - Count costs in two independent ways. An unchecked formula can contain a misplaced decimal point.
# - The same layer is quadratic with a fixed stride and linear with a fixed number of keys.
# - At stride 1, as released in stages 3 and 4, deformable attention costs slightly more than plain attention.
# - Sharing the keys reduces the gathers by a factor of the number of queries.
# - The memory is in the pairs of query and key, not in the points.
#
# Next: [other attention systems](../06_the_others/).

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
# # In your own model
#
# Everything before this was NumPy, written to be read. `dat_ref.torch` is the same layer, written to be used: same
# names, same parameters, same numbers. This notebook puts it into a U-Net and trains that, takes features from a
# backbone, feeds sizes that nothing was built for, and then changes *how* the layer computes (half precision, a
# compiled graph, another backend), to check each time that *what* it computes stays.
#
# The reference is [Use it in PyTorch](../../torch/). Each section makes a claim, names the function of `dat_ref` that
# it is about, draws it, and ends with an assertion. Needs PyTorch; no GPU, and nothing is compiled.

# %%
from collections import Counter

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn

import dat_ref
import dat_ref.torch as dt
from dat_ref import viz
from dat_ref.cli.photo import load_photo, normalise, resize
from dat_ref.data import photograph_path
from dat_ref.viz import style

plt.rcParams.update(style.SETTINGS)
plt.rcParams.update({"figure.dpi": 110, "figure.constrained_layout.use": True})
BLUE, ORANGE, GREEN, PINK = style.GROUP_COLORS[:4]


def tensor_of(name, size):
    """Return a photograph as a tensor (1, 3, H, W) in [0, 1]."""
    return torch.from_numpy(resize(load_photo(photograph_path(name)), size)).permute(2, 0, 1)[None].float()


def as_picture(x):
    return x[0].detach().permute(1, 2, 0).clamp(0, 1).numpy()


# %% [markdown]
# ## 1. A layer in a U-Net
#
# `DeformableAttention` takes a map and returns one of the same shape, so it goes wherever a convolution goes. The
# bottleneck of a U-Net is a good place: the map is small there, and what is needed is often far away. Two choices
# matter.
#
# - `init="zero_offset"` starts every point on its reference. In a network that already works, nothing should jump.
# - The output projection at zero makes the new branch silent at first: the network is what it was, and learns to use
#   it.
#
# The task is to remove noise; the photographs are three of those that ship, the fourth is for the test. What is
# learned in half a minute is not the point. That it is learned through the layer is.
#
# **Claim** (`dat_ref.torch.DeformableAttention`). The branch is silent at first, and wakes in three steps: in the
# first only the output projection has a gradient, in the second all but the inside of the offset network, in the third
# every parameter but the key's bias. (That one is invisible to softmax: [gradients by hand](../04_gradients_by_hand/),
# section 6.) And what the U-Net learned holds for a photograph of another size.


# %%
class UNet(nn.Module):
    """Two steps down, deformable attention at the bottom, two steps up; returns the noise that it sees."""

    def __init__(self, dim=16, attend=True):
        super().__init__()
        self.enter = nn.Conv2d(3, dim, 3, padding=1)
        self.down1 = nn.Conv2d(dim, 2 * dim, 2, stride=2)
        self.down2 = nn.Conv2d(2 * dim, 4 * dim, 2, stride=2)
        config = dat_ref.DeformableAttentionConfig(
            dim=4 * dim,
            heads=4,
            groups=2,  # two point grids, one for each half of the heads
            stride=2,  # a key for 2 × 2 pixels of the map
            size=(12, 12),  # the map that the bias table is built for
        )
        self.norm = nn.GroupNorm(1, 4 * dim)
        self.attend = dt.DeformableAttention(config, init="zero_offset", backend="blockwise")
        nn.init.zeros_(self.attend.output.weight)
        nn.init.zeros_(self.attend.output.bias)
        self.up2 = nn.ConvTranspose2d(4 * dim, 2 * dim, 2, stride=2)
        self.up1 = nn.ConvTranspose2d(4 * dim, dim, 2, stride=2)
        self.leave = nn.Conv2d(2 * dim, 3, 3, padding=1)

    def forward(self, x, use_attention=True):
        high = torch.relu(self.enter(x))
        middle = torch.relu(self.down1(high))
        low = torch.relu(self.down2(middle))
        if use_attention:
            low = low + self.attend(self.norm(low))
        middle = torch.cat((middle, torch.relu(self.up2(low))), dim=1)
        return self.leave(torch.cat((high, torch.relu(self.up1(middle))), dim=1))


SIGMA = 0.12  # of the noise
torch.manual_seed(0)
net = UNet()
crops = torch.cat([tensor_of(name, (240, 360)) for name in ("coffee", "rocket", "astronaut")])


def noisy_batch(count=8, side=48):
    """Return clean crops of the training photographs, and noise."""
    rows, columns = (torch.randint(0, length - side + 1, (count,)) for length in crops.shape[2:])
    which = torch.randint(0, len(crops), (count,))
    parts = [crops[i, :, y : y + side, x : x + side] for i, y, x in zip(which, rows, columns)]
    return torch.stack(parts), SIGMA * torch.randn(count, 3, side, side)


x, noise = noisy_batch()
with torch.no_grad():
    assert torch.equal(net(x + noise), net(x + noise, use_attention=False))  # silent at first

optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.01)
losses, reached = [], []
for step in range(90):
    x, noise = noisy_batch()
    loss = nn.functional.mse_loss(net(x + noise), noise)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
    if step < 3:
        reached.append({name for name, leaf in net.attend.named_parameters() if leaf.grad.abs().max() > 1e-9})

net.eval()
torch.manual_seed(1)
unseen = tensor_of("chelsea", (168, 252))  # another photograph, another size
noisy = unseen + SIGMA * torch.randn_like(unseen)
with torch.inference_mode():
    cleaned = noisy - net(noisy)


def psnr(one, other):
    return -10 * torch.log10(nn.functional.mse_loss(one, other)).item()


figure, (fall, *panels) = plt.subplots(1, 3, figsize=(8.8, 2.4), width_ratios=[0.9, 1.2, 1.2])
fall.plot(losses, color=BLUE, lw=1.3)
fall.axhline(SIGMA**2, color=style.QUIET, lw=0.8, ls=(0, (4, 3)))
fall.text(89, 1.06 * SIGMA**2, "as it came", ha="right", color=style.QUIET, size=8)
fall.set(yscale="log", yticks=[0.003, 0.01], yticklabels=["0.003", "0.01"], xlabel="step", title="mean squared error")
fall.minorticks_off()
for axes, (name, picture) in zip(panels, {"noisy": noisy, "cleaned": cleaned}.items()):
    axes.imshow(as_picture(picture), interpolation="nearest")
    axes.set(xticks=[], yticks=[], title=f"{name}: {psnr(picture, unseen):.1f} dB")
    axes.spines[:].set_visible(False)
plt.show()

# %%
every = {name for name, _ in net.attend.named_parameters()}
network = {name for name in every if name.startswith("offset_network") and "pointwise" not in name}
assert reached[0] == {"output.weight", "output.bias"}
assert reached[1] == every - network - {"key.bias"}
assert reached[2] == every - {"key.bias"}
assert psnr(cleaned, unseen) > psnr(noisy, unseen) + 3
assert np.mean(losses[-10:]) < 0.4 * np.mean(losses[:3])

# %% [markdown]
# ## 2. The same numbers as the spec
#
# A module is good for training, the NumPy layer for reading. They are one layer: parameters go over by name, and the
# trace of a pass has the same fields, so that all [figures](../07_where_it_looks/) work for both.
#
# **Claim** (`dat_ref.torch.as_numpy`). The trained layer of the U-Net, handed to NumPy, gives the same output and the
# same points.


# %%
def bottleneck(x):
    """Return what enters the layer."""
    return net.norm(torch.relu(net.down2(torch.relu(net.down1(torch.relu(net.enter(x)))))))


with torch.inference_mode():
    one_eye = noisy[:, :, 44:100, 54:134]
    bottleneck_input = bottleneck(one_eye)  # (1, 64, 14, 20)
    y, trace = net.attend(bottleneck_input, return_trace=True)
trace = dt.as_numpy(trace)
viz.draw_points(as_picture(one_eye - net(one_eye)), trace, label="the U-Net's bottleneck")

# %%
spec = dat_ref.DeformableAttention(net.attend.config, net.attend.to_numpy())
y_spec, trace_spec = spec(bottleneck_input.numpy(), return_trace=True)
np.testing.assert_allclose(y.numpy(), y_spec, atol=1e-5)
np.testing.assert_allclose(trace.points_px, trace_spec.points_px, atol=1e-4)
assert np.abs(trace.points_px - trace.reference_px).max() > 0.1  # and they did move

# %% [markdown]
# ## 3. A feature pyramid
#
# Detectors and segmenters want maps of several sizes. `features_only=True` gives them, `feature_info` says what they
# are, and a pyramid on top is ten lines. Photographs come as they are: no multiple of 32, no square.
#
# **Claim** (`dat_ref.torch.create_model`). For an image of any size the maps have $H/8$, $H/16$ and $H/32$ rows,
# rounded up, and a gradient from any level reaches the points of the first stage. (Seeded weights: what is drawn is
# geometry, the strongest component of each level.)


# %%
class Pyramid(nn.Module):
    """Three levels of a backbone, brought to one width and added from the top down."""

    def __init__(self, name, dim=32):
        super().__init__()
        self.backbone = dt.create_model(name, features_only=True, out_indices=(1, 2, 3), backend="blockwise")
        self.inner = nn.ModuleList(nn.Conv2d(width, dim, 1) for width in self.backbone.feature_info.channels())

    def forward(self, x):
        levels = [inner(each) for inner, each in zip(self.inner, self.backbone(x))]
        for low in (1, 0):
            levels[low] = levels[low] + nn.functional.interpolate(levels[low + 1], levels[low].shape[2:])
        return levels


def strongest(level):
    """Return the strongest component of a map (1, C, H, W), (H, W)."""
    rows = level[0].detach().flatten(1).T
    rows = rows - rows.mean(dim=0)
    return (rows @ torch.linalg.svd(rows, full_matrices=False)[2][0]).reshape(level.shape[2:]).numpy()


torch.manual_seed(0)
pyramid = Pyramid("dat_pp_tiny")
size = (203, 305)
levels = pyramid(torch.from_numpy(normalise(resize(load_photo(photograph_path("coffee")), size))))

figure, panels = plt.subplots(1, 4, figsize=(8.8, 1.8))
panels[0].imshow(as_picture(tensor_of("coffee", size)))
panels[0].set_title(f"{size[0]} × {size[1]}")
for axes, level in zip(panels[1:], levels):
    axes.imshow(strongest(level), cmap=style.FIELD, interpolation="nearest")
    axes.set_title(f"{level.shape[2]} × {level.shape[3]}")
for axes in panels:
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
plt.show()

# %%
assert pyramid.backbone.feature_info.reduction() == [8, 16, 32]
for level, reduction in zip(levels, (8, 16, 32)):
    assert level.shape[2:] == (-(-size[0] // reduction), -(-size[1] // reduction))
    first = next(leaf for name, leaf in pyramid.named_parameters() if name.endswith("pointwise.weight"))  # of stage 1
    (gradient,) = torch.autograd.grad(level.square().mean(), first, retain_graph=True)
    assert gradient.abs().max() > 0

# %% [markdown]
# ## 4. A bias table that meets another map
#
# A table is built for one size: $(2H_0 - 1) \times (2W_0 - 1)$ displacements. What does it mean on a larger map?
#
# - **Fractions** (the default): the same *part of the map*. The table stretches. Right for larger photographs of the
#   same things, 224 → 384.
# - **Pixels**: the same *distance*. Beyond the table there is nothing. Right for larger crops at the same scale.
#
# **Claim** (`bias_resolution`). On the map it was built for the two are one. On three times that map, fractions read
# the same table at three times the distance, and pixels read the same numbers at the same distance, and zero further
# out.

# %%
BUILT = (9, 9)
table = torch.from_numpy(np.random.default_rng(1).normal(size=(1, 17, 17)).cumsum(axis=2).astype(np.float32)) / 4


def bias_row(side, resolution):
    """Return the bias of keys along the middle row, for the query in the middle of a map of side², side odd."""
    middle, columns = (side - 1) / 2, torch.arange(0, side - 0.75, 0.25)
    keys = torch.stack([torch.full_like(columns, middle), columns], dim=-1)  # (y, x), in pixels
    points = dt.functional.from_pixels(keys[None, None], (side, side), dat_ref.Convention.CELL_CENTER)
    bias = dt.functional.table_bias(
        table, points, query_size=(side, side), convention=dat_ref.Convention.CELL_CENTER, resolution=resolution
    )
    return columns - middle, bias[0, 0, (side * side) // 2]


figure, panels = plt.subplots(1, 3, figsize=(8.8, 2.1), sharey=True)
cases = (
    (9, "fractions", "9 × 9, as built"),
    (27, "fractions", "27 × 27: fractions"),
    (27, "pixels", "27 × 27: pixels"),
)
for axes, (side, resolution, title), color in zip(panels, cases, (style.INK, BLUE, ORANGE)):
    distance, values = bias_row(side, resolution)
    axes.plot(distance, values, color=color, lw=1.7)
    axes.axhline(0, color=style.HAIRLINE, lw=0.6)
    axes.set(xlim=(-14, 14), xticks=[-12, -4, 0, 4, 12], xlabel="key right of the query by, pixels", title=title)
plt.show()

# %%
(near, built), (_, built_too) = bias_row(9, "fractions"), bias_row(9, "pixels")
torch.testing.assert_close(built, built_too)
far, stretched = bias_row(27, "fractions")
np.testing.assert_allclose(np.interp(3 * near.numpy(), far, stretched), built, atol=1e-4)
far, cut = bias_row(27, "pixels")
np.testing.assert_allclose(np.interp(near.numpy(), far, cut), built, atol=1e-5)
assert cut[far.abs() >= 9].abs().max() < 1e-5

# %% [markdown]
# ## 5. Half precision
#
# Under autocast the products run in bfloat16. [Coordinates must not](../02_coordinates/): a point that is stored in
# eight bits is off by a good part of a pixel. So the geometry stays in float32, and what error is left in a point is
# that of the queries from which its offset was computed.
#
# **Claim.** In the U-Net under autocast, points are float32, off by less than a hundredth of a pixel, and the cleaned
# photograph is as good to a tenth of a decibel.

# %%
with torch.inference_mode():
    whole = bottleneck(noisy)  # (1, 64, 42, 63)
    _, exact = net.attend(whole, return_trace=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = noisy - net(noisy)
        _, half_trace = net.attend(whole, return_trace=True)
off = (half_trace.points_px - exact.points_px).norm(dim=-1).flatten()
rounded = exact.points.bfloat16().float()  # what would be, were they stored in bfloat16
stored = dt.functional.to_pixels(rounded, whole.shape[2:], net.attend.config.convention)
would_be = (stored - exact.points_px).norm(dim=-1).flatten()

figure, axes = plt.subplots(figsize=(6.4, 2.3))
bins = np.geomspace(1e-6, 1, 60)
axes.hist(off, bins=bins, color=BLUE, label="points under autocast")
axes.hist(would_be, bins=bins, color=ORANGE, alpha=0.75, label="points stored in bfloat16")
axes.set(xscale="log", xlim=(1e-5, 1), yticks=[], xlabel="off by, pixels")
axes.spines["left"].set_visible(False)
axes.legend(loc="upper left")
plt.show()

# %%
print(
    f"off by {off.mean():.4f} pixels on average and {off.max():.4f} at most; "
    f"stored in bfloat16 by {would_be.mean():.3f} and {would_be.max():.3f}"
)
assert half_trace.points.dtype == torch.float32
assert half_trace.attention.dtype in (torch.float32, torch.bfloat16)
assert off.max() < 0.01 < would_be.mean()
assert abs(psnr(half, unseen) - psnr(cleaned, unseen)) < 0.1

# %% [markdown]
# ## 6. One graph
#
# `torch.compile` traces a module into a graph of operators and lets a compiler have it. Each place that cannot be
# traced breaks the graph in two. So the question to a layer is: how many graphs, and of what?
#
# A compiler is any function that takes a graph. Ours writes down what is in it and changes nothing; leave `backend`
# out, and Inductor makes machine code of the same graph, if the machine has a C++ compiler (and a minute).
#
# **Claim.** The layer is one graph, without `grid_sample` and other operators that exporters stumble over, and gives
# the same output.

# %%
graphs = []


def write_down(graph, inputs):
    graphs.append(
        Counter(
            getattr(node.target, "__name__", str(node.target))
            for node in graph.graph.nodes
            if node.op.startswith("call")
        )
    )
    return graph.forward


torch._dynamo.reset()
compiled = torch.compile(net.attend, fullgraph=True, backend=write_down)  # fullgraph: a break would be an error
with torch.no_grad():
    y_compiled = compiled(bottleneck_input.clone())
    y_plain = net.attend(bottleneck_input)

names, counts = zip(*graphs[0].most_common(16))
figure, axes = plt.subplots(figsize=(8.6, 2.6))
axes.bar(names, counts, color=BLUE, width=0.7)
axes.tick_params(axis="x", rotation=60, length=0)
axes.set(title=f"{sum(graphs[0].values())} operators in one graph: the most frequent")
plt.show()

# %%
assert len(graphs) == 1
assert not any("grid_sample" in name for name in graphs[0])
torch.testing.assert_close(y_compiled, y_plain, atol=1e-5, rtol=1e-5)

# %% [markdown]
# ## 7. Backends
#
# What the layer computes is fixed. How is a choice: written out as in the releases, by plain matrix products, some
# rows at a time, or by kernels that never write the pairs of query and key down.
#
# **Claim** (`dat_ref.torch.backends`). Every backend of this machine gives the spec's output and the spec's five
# gradients. What differs is what a pass keeps for its backward: with `"eager"` it grows with the fourth power of the
# map's side, with `"blockwise"` with the second.


# %%
def inputs(side, seed=0, dtype=torch.float32):
    """Return q, k, v, points and table of a map of side² with as many keys, two heads and one group."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, 2, side * side, 8, generator=generator, dtype=dtype) for _ in range(3))
    points = 1.8 * torch.rand(1, 1, side * side, 2, generator=generator, dtype=dtype) - 0.9
    table = torch.randn(2, 2 * side - 1, 2 * side - 1, generator=generator, dtype=dtype)
    return [leaf.requires_grad_() for leaf in (q, k, v, points, table)]


GEOMETRY = {"convention": dat_ref.Convention.CELL_CENTER}


def deviation(backend, side=9):
    """Return how far output and gradients of a backend in float32 are from the spec in float64, relative."""
    wide = inputs(side, dtype=torch.float64)
    arrays = [leaf.detach().numpy() for leaf in wide]
    y = dat_ref.deformable_attention(*arrays, query_size=(side, side), **GEOMETRY)
    cotangent = np.random.default_rng(0).normal(size=y.shape)
    expected = dat_ref.ops.attention.deformable_attention_vjp(cotangent, *arrays, query_size=(side, side), **GEOMETRY)
    leaves = [leaf.detach().float().requires_grad_() for leaf in wide]
    output = dt.deformable_attention(*leaves, query_size=(side, side), backend=backend, **GEOMETRY)
    gradients = torch.autograd.grad(output, leaves, torch.from_numpy(cotangent).float())
    pairs = zip((output, *gradients), (y, *expected))
    return [np.abs(ours.detach().numpy() - theirs).max() / np.abs(theirs).max() for ours, theirs in pairs]


def kept(backend, side):
    """Return the bytes that autograd keeps for the backward of one pass, beyond its inputs."""
    leaves, storages = inputs(side), {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        dt.deformable_attention(*leaves, query_size=(side, side), backend=backend, **GEOMETRY)
    given = {leaf.untyped_storage().data_ptr() for leaf in leaves}
    return sum(size for pointer, size in storages.items() if pointer not in given)


usable = [name for name in dt.backends() if name != "triton"]  # that one is for GPUs
deviations = {name: deviation(name) for name in usable}
MAPS = (8, 16, 32)
memory = {name: [kept(name, side) for side in MAPS] for name in usable}

figure, (axes, growth) = plt.subplots(1, 2, figsize=(8.8, 2.7))
PARTS = ("output", "∂q", "∂k", "∂v", "∂points", "∂table")
for (name, values), color in zip(deviations.items(), (GREEN, PINK, BLUE, ORANGE)):
    axes.plot(PARTS, values, "o", color=color, ms=5, alpha=0.85)
    growth.plot(MAPS, memory[name], color=color, lw=1.8, marker="o", ms=4)
    nudge = {"blockwise": 5, "cpu": -6}.get(name, 0)
    end = (MAPS[-1], memory[name][-1])
    growth.annotate(name, end, xytext=(7, nudge), textcoords="offset points", color=color, va="center")
axes.axhline(1e-5, color=style.QUIET, lw=0.8, ls=(0, (4, 3)))
axes.set(yscale="log", ylim=(1e-8, 1e-4), title="float32 against the spec, relative")
growth.set(xscale="log", yscale="log", xticks=MAPS, xticklabels=MAPS, xlim=(7, 60), xlabel="side of the map")
growth.set(title="kept for the backward, bytes")
growth.minorticks_off()
plt.show()

# %%
for name in dt.backends():
    print(f"{name}: {dt.backends()[name]}")
assert {"eager", "blockwise"} <= set(usable)
for name, values in deviations.items():
    assert max(values) < 1e-5, name
growth_of = {name: np.log2(sizes[-1] / sizes[-2]) for name, sizes in memory.items()}
assert growth_of["eager"] > 3.8
assert growth_of["blockwise"] < 2.2

# %% [markdown]
# `backend="auto"`, the default, takes the fastest that can serve. `layer.backend = "eager"` or
# `model.set_backend("eager")` asks for one by name, and where it cannot serve, a warning says why and which does.
#
# ## What to remember
#
# - It goes where a convolution goes, at any size. Start it silent: points on the grid, output at zero.
# - One parameter tree for both worlds: train in torch, look in NumPy.
# - Say what a bias table means on a larger map: fractions, or pixels.
# - Whatever is changed in *how* it is computed, check *what* against the spec. It is there for that.
#
# Next: [what it learned](../09_what_it_learned/).

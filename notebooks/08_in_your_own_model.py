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
# The previous notebooks use the NumPy code, which is written for reading. `dat_ref.torch` has the same layer for
# training and inference: same names, same parameters, same results. This notebook trains a U-Net that contains the
# layer, builds a feature pyramid on a backbone, and runs on image sizes for which nothing was built. Then it changes
# *how* the layer computes (half precision, a compiled graph, another backend) and checks each time that the *result*
# does not change.
#
# The reference is [Use it in PyTorch](../../torch/). Each section makes a claim, names the function of `dat_ref` that
# it concerns, draws a figure, and ends with assertions. This notebook needs PyTorch. It needs no GPU and compiles
# nothing.

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
# `DeformableAttention` maps a feature map to one of the same shape, so it can replace a convolution. The bottleneck of
# a U-Net is a suitable position: the map is small there, and the relevant context is often far away. Two choices
# matter.
#
# - `init="zero_offset"` starts every point at its reference point. Then the new layer does not begin with random
#   positions.
# - With the output projection initialized to zero, the new branch outputs zero: the network is unchanged at first, and
#   learns to use the branch.
#
# The task is denoising. Three of the photographs of the package are for training, the fourth is for the test. Half a
# minute of training is too short for a good denoiser. It shows that the gradients pass through the layer. It does not
# show that the offsets improve the result: with stride 2 the points read the whole map even with zero offsets
# (`dat_ref.ops.coverage`), so a large effect is not expected. [Notebook 07](../07_where_it_looks/) has an experiment
# with a control.
#
# **Claim** (`dat_ref.torch.DeformableAttention`). The branch outputs zero at first. In step 1 only the output
# projection has a gradient. In step 2 all parameters have one except the key's bias and those before the last layer of
# the offset network. In step 3 all have one except the key's bias. (Softmax is invariant to that bias: [gradients by
# hand](../04_gradients_by_hand/), section 6.) The trained U-Net also works on a photograph of another size.


# %% alt="The loss of the U-Net falls; a noisy photograph next to the denoised one, with their decibels"
class UNet(nn.Module):
    """U-Net of two levels with deformable attention in the bottleneck; predicts the noise."""

    def __init__(self, dim=16, attend=True):
        super().__init__()
        self.enter = nn.Conv2d(3, dim, 3, padding=1)
        self.down1 = nn.Conv2d(dim, 2 * dim, 2, stride=2)
        self.down2 = nn.Conv2d(2 * dim, 4 * dim, 2, stride=2)
        config = dat_ref.DeformableAttentionConfig(
            dim=4 * dim,
            heads=4,
            groups=2,  # two grids of points, one for each half of the heads
            stride=2,  # one key for 2 × 2 pixels of the map
            size=(12, 12),  # map size of the bias table
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


SIGMA = 0.12  # standard deviation of the noise
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
    assert torch.equal(net(x + noise), net(x + noise, use_attention=False))  # the branch outputs zero

optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.01)
losses, with_gradient = [], []
for step in range(90):
    x, noise = noisy_batch()
    loss = nn.functional.mse_loss(net(x + noise), noise)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
    if step < 3:
        with_gradient.append({name for name, leaf in net.attend.named_parameters() if leaf.grad.abs().max() > 1e-9})

net.eval()
torch.manual_seed(1)
unseen = tensor_of("chelsea", (168, 252))  # another photograph, another size
noisy = unseen + SIGMA * torch.randn_like(unseen)
with torch.inference_mode():
    denoised = noisy - net(noisy)


def psnr(one, other):
    return -10 * torch.log10(nn.functional.mse_loss(one, other)).item()


figure, (fall, *panels) = plt.subplots(1, 3, figsize=(8.8, 2.4), width_ratios=[0.9, 1.2, 1.2])
fall.plot(losses, color=BLUE, lw=1.3)
fall.axhline(SIGMA**2, color=style.QUIET, lw=0.8, ls=(0, (4, 3)))
fall.text(89, 1.06 * SIGMA**2, "noisy input", ha="right", color=style.QUIET, size=8)
fall.set(yscale="log", yticks=[0.003, 0.01], yticklabels=["0.003", "0.01"], xlabel="step", title="mean squared error")
fall.minorticks_off()
for axes, (name, picture) in zip(panels, {"noisy": noisy, "denoised": denoised}.items()):
    axes.imshow(as_picture(picture), interpolation="nearest")
    axes.set(xticks=[], yticks=[], title=f"{name}: {psnr(picture, unseen):.1f} dB")
    axes.spines[:].set_visible(False)
plt.show()

# %%
all_names = {name for name, _ in net.attend.named_parameters()}
network = {name for name in all_names if name.startswith("offset_network") and "pointwise" not in name}
assert with_gradient[0] == {"output.weight", "output.bias"}
assert with_gradient[1] == all_names - network - {"key.bias"}
assert with_gradient[2] == all_names - {"key.bias"}
assert psnr(denoised, unseen) > psnr(noisy, unseen) + 3
assert np.mean(losses[-10:]) < 0.4 * np.mean(losses[:3])

# %% [markdown]
# ## 2. The same results as the NumPy layer
#
# The module is for training, the NumPy layer for reading. They are the same layer: parameters are transferred by name,
# and the trace of a pass has the same fields, so all [figures](../07_where_it_looks/) work for both.
#
# **Claim** (`dat_ref.torch.as_numpy`). The NumPy layer with the trained parameters of the U-Net gives the same output
# and the same points.


# %% alt="Reference points of the U-Net's bottleneck on a denoised eye, with an arrow of each group to the moved points"
def bottleneck(x):
    """Return the input of the attention layer."""
    return net.norm(torch.relu(net.down2(torch.relu(net.down1(torch.relu(net.enter(x)))))))


with torch.inference_mode():
    one_eye = noisy[:, :, 44:100, 54:134]
    bottleneck_input = bottleneck(one_eye)  # (1, 64, 14, 20)
    y, trace = net.attend(bottleneck_input, return_trace=True)
trace = dt.as_numpy(trace)
viz.draw_points(as_picture(one_eye - net(one_eye)), trace, label="bottleneck of the U-Net")

# %%
spec = dat_ref.DeformableAttention(net.attend.config, net.attend.to_numpy())
y_spec, trace_spec = spec(bottleneck_input.numpy(), return_trace=True)
np.testing.assert_allclose(y.numpy(), y_spec, atol=1e-5)
np.testing.assert_allclose(trace.points_px, trace_spec.points_px, atol=1e-4)
assert np.abs(trace.points_px - trace.reference_px).max() > 0.1  # the points have moved

# %% [markdown]
# ## 3. A feature pyramid
#
# Detectors and segmentation models use feature maps of several sizes. `features_only=True` returns them,
# `feature_info` describes them, and a feature pyramid needs ten more lines. Images can have any size; they need not be
# square or a multiple of 32.
#
# **Claim** (`dat_ref.torch.create_model`). For an image of any size the maps have $H/8$, $H/16$ and $H/32$ rows,
# rounded up. A gradient from any level reaches the offset network of the first stage. (The weights are random. The
# figure shows the first principal component of each level: geometry, nothing learned.)


# %% alt="A photograph and three levels of its feature pyramid, from fine to coarse"
class Pyramid(nn.Module):
    """Feature pyramid: three levels of a backbone, projected to one width and added from coarse to fine."""

    def __init__(self, name, dim=32):
        super().__init__()
        self.backbone = dt.create_model(name, features_only=True, out_indices=(1, 2, 3), backend="blockwise")
        self.inner = nn.ModuleList(nn.Conv2d(width, dim, 1) for width in self.backbone.feature_info.channels())

    def forward(self, x):
        levels = [inner(each) for inner, each in zip(self.inner, self.backbone(x))]
        for low in (1, 0):
            levels[low] = levels[low] + nn.functional.interpolate(levels[low + 1], levels[low].shape[2:])
        return levels


def principal_component(level):
    """Return the first principal component of a map (1, C, H, W): (H, W)."""
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
    axes.imshow(principal_component(level), cmap=style.FIELD, interpolation="nearest")
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
# ## 4. The bias table on maps of other sizes
#
# A bias table is built for one map size: $(2H_0 - 1) \times (2W_0 - 1)$ displacements. On a larger map it can be used
# in two ways.
#
# - **Fractions** (the default): an entry belongs to a displacement as a *fraction of the map*. The table is stretched.
#   Use this for the same images at a higher resolution, 224 → 384.
# - **Pixels**: an entry belongs to a displacement in *pixels*. Outside the table the bias is zero. Use this for larger
#   crops at the same scale.
#
# **Claim** (`bias_resolution`). On the map for which the table was built, both are equal. On a map three times as
# large, fractions read the same values at three times the distance. Pixels read the same values at the same distance,
# and zero at larger distances.

# %% alt="The bias against the distance: on its own map, stretched by fractions, and cut to zero by pixels" plot=true
BUILT = (9, 9)
table = torch.from_numpy(np.random.default_rng(1).normal(size=(1, 17, 17)).cumsum(axis=2).astype(np.float32)) / 4


def bias_row(side, resolution):
    """Return the bias of keys along the center row, for the query at the center of a map of side², side odd."""
    center, columns = (side - 1) / 2, torch.arange(0, side - 0.75, 0.25)
    keys = torch.stack([torch.full_like(columns, center), columns], dim=-1)  # (y, x), in pixels
    points = dt.functional.from_pixels(keys[None, None], (side, side), dat_ref.Convention.CELL_CENTER)
    bias = dt.functional.table_bias(
        table, points, query_size=(side, side), convention=dat_ref.Convention.CELL_CENTER, resolution=resolution
    )
    return columns - center, bias[0, 0, (side * side) // 2]


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
    axes.set(xlim=(-14, 14), xticks=[-12, -4, 0, 4, 12], xlabel="key minus query, pixels", title=title)
plt.show()

# %%
(near, built), (_, built_too) = bias_row(9, "fractions"), bias_row(9, "pixels")
torch.testing.assert_close(built, built_too)
far, stretched = bias_row(27, "fractions")
np.testing.assert_allclose(np.interp(3 * near.numpy(), far, stretched), built, atol=1e-4)
far, by_pixels = bias_row(27, "pixels")
np.testing.assert_allclose(np.interp(near.numpy(), far, by_pixels), built, atol=1e-5)
assert by_pixels[far.abs() >= 9].abs().max() < 1e-5

# %% [markdown]
# ## 5. Half precision
#
# Under autocast the matrix products run in bfloat16. [Coordinates must not](../02_coordinates/): a point stored with
# eight significant bits has an error of a large part of a pixel. So the geometry stays in float32. The remaining error
# of a point comes from the queries, from which its offset is computed.
#
# **Claim.** In the U-Net under autocast, points are float32, with an error below a hundredth of a pixel. The quality
# of the denoised photograph changes by less than a tenth of a decibel.

# %% alt="Histograms of the points' errors: below a hundredth of a pixel, far below points kept in bfloat16" plot=true
with torch.inference_mode():
    whole = bottleneck(noisy)  # (1, 64, 42, 63)
    _, exact = net.attend(whole, return_trace=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = noisy - net(noisy)
        _, half_trace = net.attend(whole, return_trace=True)
error = (half_trace.points_px - exact.points_px).norm(dim=-1).flatten()
rounded = exact.points.bfloat16().float()  # points as if stored in bfloat16
stored = dt.functional.to_pixels(rounded, whole.shape[2:], net.attend.config.convention)
stored_error = (stored - exact.points_px).norm(dim=-1).flatten()

figure, axes = plt.subplots(figsize=(6.4, 2.3))
bins = np.geomspace(1e-6, 1, 60)
axes.hist(error, bins=bins, color=BLUE, label="points under autocast")
axes.hist(stored_error, bins=bins, color=ORANGE, alpha=0.75, label="points stored in bfloat16")
axes.set(xscale="log", xlim=(1e-5, 1), yticks=[], xlabel="error, pixels")
axes.spines["left"].set_visible(False)
axes.legend(loc="upper left")
plt.show()

# %%
print(
    f"error under autocast: mean {error.mean():.4f}, maximum {error.max():.4f} pixels; "
    f"stored in bfloat16: mean {stored_error.mean():.3f}, maximum {stored_error.max():.3f}"
)
assert half_trace.points.dtype == torch.float32
assert half_trace.attention.dtype in (torch.float32, torch.bfloat16)
assert error.max() < 0.01 < stored_error.mean()
assert abs(psnr(half, unseen) - psnr(denoised, unseen)) < 0.1

# %% [markdown]
# ## 6. One graph
#
# `torch.compile` traces a module into a graph of operators and passes it to a compiler. Code that cannot be traced
# breaks the graph into parts. So we check the number of graphs and the operators in them.
#
# A compiler is any function that takes a graph. Ours records the operators and changes nothing. Without the argument
# `backend`, Inductor compiles the same graph to machine code; this needs a C++ compiler and about a minute.
#
# **Claim.** The layer is one graph. It does not contain `grid_sample` and other operators that many exporters do not
# support. Its output is the same.

# %% alt="Bars of the operators in the compiled graph, the most frequent first; grid_sample is not among them" plot=true
graphs = []


def record_operators(graph, inputs):
    graphs.append(
        Counter(
            getattr(node.target, "__name__", str(node.target))
            for node in graph.graph.nodes
            if node.op.startswith("call")
        )
    )
    return graph.forward


torch._dynamo.reset()
compiled = torch.compile(net.attend, fullgraph=True, backend=record_operators)  # fullgraph: a graph break is an error
with torch.no_grad():
    y_compiled = compiled(bottleneck_input.clone())
    y_plain = net.attend(bottleneck_input)

names, counts = zip(*graphs[0].most_common(16))
figure, axes = plt.subplots(figsize=(8.6, 2.6))
axes.bar(names, counts, color=BLUE, width=0.7)
axes.tick_params(axis="x", rotation=60, length=0)
axes.set(title=f"{sum(graphs[0].values())} operators in one graph; the most frequent ones")
plt.show()

# %%
assert len(graphs) == 1
assert not any("grid_sample" in name for name in graphs[0])
torch.testing.assert_close(y_compiled, y_plain, atol=1e-5, rtol=1e-5)

# %% [markdown]
# ## 7. Backends
#
# The function that the layer computes is fixed. Several backends compute it: `"eager"` as in the released code, others
# in blocks of rows or with kernels that never store the pairs of query and key.
#
# **Claim** (`dat_ref.torch.backends`). Every backend that is available gives the output of the NumPy layer and its
# five gradients. The memory for the backward pass differs. It grows with the fourth power of the side of the map for
# `"eager"`, and with the second power for `"blockwise"`.


# %% alt="Deviations of all backends from NumPy; bytes for backward, steeper for eager than blockwise" plot=true
def inputs(side, seed=0, dtype=torch.float32):
    """Return q, k, v, points and table for a map of side² with side² keys, two heads and one group."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, 2, side * side, 8, generator=generator, dtype=dtype) for _ in range(3))
    points = 1.8 * torch.rand(1, 1, side * side, 2, generator=generator, dtype=dtype) - 0.9
    table = torch.randn(2, 2 * side - 1, 2 * side - 1, generator=generator, dtype=dtype)
    return [leaf.requires_grad_() for leaf in (q, k, v, points, table)]


GEOMETRY = {"convention": dat_ref.Convention.CELL_CENTER}


def deviation(backend, side=9):
    """Return the relative deviation of output and gradients, float32 backend against float64 NumPy."""
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


def saved_bytes(backend, side):
    """Return the bytes that autograd stores for the backward of one pass, without its inputs."""
    leaves, storages = inputs(side), {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        dt.deformable_attention(*leaves, query_size=(side, side), backend=backend, **GEOMETRY)
    given = {leaf.untyped_storage().data_ptr() for leaf in leaves}
    return sum(size for pointer, size in storages.items() if pointer not in given)


usable = [name for name in dt.backends() if name != "triton"]  # for GPUs
deviations = {name: deviation(name) for name in usable}
MAPS = (8, 16, 32)
memory = {name: [saved_bytes(name, side) for side in MAPS] for name in usable}

figure, (axes, growth) = plt.subplots(1, 2, figsize=(8.8, 2.7))
PARTS = ("output", "∂q", "∂k", "∂v", "∂points", "∂table")
for (name, values), color in zip(deviations.items(), (GREEN, PINK, BLUE, ORANGE)):
    axes.plot(PARTS, values, "o", color=color, ms=5, alpha=0.85)
    growth.plot(MAPS, memory[name], color=color, lw=1.8, marker="o", ms=4)
    nudge = {"blockwise": 5, "cpu": -6}.get(name, 0)
    end = (MAPS[-1], memory[name][-1])
    growth.annotate(name, end, xytext=(7, nudge), textcoords="offset points", color=color, va="center")
axes.axhline(1e-5, color=style.QUIET, lw=0.8, ls=(0, (4, 3)))
axes.set(yscale="log", ylim=(1e-8, 1e-4), title="relative deviation from NumPy")
growth.set(xscale="log", yscale="log", xticks=MAPS, xticklabels=MAPS, xlim=(7, 60), xlabel="side of the map")
growth.set(title="bytes stored for backward")
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
# `backend="auto"`, the default, selects the fastest backend that supports the call. `layer.backend = "eager"` or
# `model.set_backend("eager")` selects one by name. If it does not support a call, a warning gives the reason and the
# backend that is used instead.
#
# ## What to remember
#
# - The layer can replace a convolution, at any input size. Initialize it with zero offsets and a zero output
#   projection.
# - Parameters are the same in both implementations: train in PyTorch, inspect in NumPy.
# - Choose the meaning of a bias table on larger maps: fractions or pixels.
# - When the way of computing changes, compare the results with the NumPy layer.
#
# Next: [the trained network](../09_what_it_learned/).

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
# # Coordinates
#
# A deformable layer moves points, so the coordinates of the points must be defined. The paper, the 2022 code and the
# 2023 code define them in three different ways. All three train without an error message, but their weights are not
# interchangeable. The definitions differ by half a cell.
#
# This notebook measures the effect of this half cell on photographs. The definitions are on [a page of their
# own](../../conventions/).
#
# Each section makes a claim, names the function of `dat_ref` that it concerns, draws a figure, and ends with
# assertions.

# %%
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import LinearSegmentedColormap

from dat_ref import Convention
from dat_ref.cli.photo import load_photo, resize
from dat_ref.data import photograph_path, photographs
from dat_ref.ops.bias import table_bias, table_positions
from dat_ref.ops.grid import from_pixels, key_grid_size, offset_padding, reference_points, to_pixels
from dat_ref.ops.sampling import bilinear_sample
from dat_ref.viz import style
from dat_ref.viz.artists import dim

plt.rcParams.update(style.SETTINGS)
plt.rcParams.update({"figure.dpi": 110, "figure.constrained_layout.use": True})
BLUE, ORANGE, GREEN, PINK = style.GROUP_COLORS[:4]
COLORS = dict(zip(Convention, (BLUE, GREEN, ORANGE, PINK)))
CONSISTENT, RELEASED = list(Convention)[:2], list(Convention)[2:]
MISS = LinearSegmentedColormap.from_list("miss", ["#FBFBF9", "#EFA877", "#A63C00", "#3B1500"])


def photo_map(name, size):
    """Return a photograph as a map (1, 3, H, W) of that size."""
    return resize(load_photo(photograph_path(name)), size).transpose(2, 0, 1)[None]


def as_picture(maps):
    return np.clip(maps[0].transpose(1, 2, 0), 0, 1)


def bare(axes, **settings):
    axes.set(xticks=[], yticks=[], **settings)
    axes.spines[:].set_visible(False)


# %% [markdown]
# ## 1. The identity test
#
# At stride 1 there is one key per pixel. With zero offsets, key $i$ should read pixel $i$, and the layer should equal
# plain attention. The two consistent conventions satisfy this. The two released ones do not:
#
# $$
# \text{pixel of key } i = \begin{cases}
# i & \texttt{CELL\_CENTER},\ \texttt{PAPER} \\[2pt]
# i + \tfrac12 - \dfrac{i + \frac12}{H} & \texttt{CVPR2022}\text{: towards the center, by up to half a pixel} \\[6pt]
# \min(i + \tfrac12,\ H - 1) & \texttt{DATPP2023}\text{: half a pixel down and right, the last one clamped}
# \end{cases}
# $$
#
# **Claim** (`dat_ref.ops.grid.reference_points`, `to_pixels`). These formulas hold for any map size. The figure shows
# a photograph as each convention reads it with zero offsets, and the color error of each pixel.


# %% alt="A photograph as the four conventions read it at zero offset; below, the error: none twice, then along edges"
def read_positions(size, convention, keys=None):
    """Return the positions that the keys of a zero-offset layer read: (Hk, Wk, 2), in pixels."""
    reference = reference_points(keys or size, convention)
    if convention is Convention.DATPP2023:
        reference = np.clip(reference, -1, 1)  # the clamp of this convention
    return to_pixels(reference, size, convention)


def read(maps, convention):
    """Return the map that a zero-offset layer of stride 1 reads."""
    positions = read_positions(maps.shape[2:], convention)
    return bilinear_sample(maps, positions.reshape(1, -1, 2)).reshape(maps.shape)


x = photo_map("coffee", (24, 36))
figure, rows = plt.subplots(2, 4, figsize=(8.8, 3.3))
for (above, below), convention in zip(rows.T, Convention):
    seen = read(x, convention)
    above.imshow(as_picture(seen), interpolation="nearest")
    bare(above, title=convention.name)
    below.imshow(np.abs(seen - x)[0].mean(axis=0), cmap=MISS, vmin=0, vmax=0.3, interpolation="nearest")
    pixel = np.stack(np.meshgrid(*map(np.arange, x.shape[2:]), indexing="ij"), axis=-1)[1::3, 1::3]
    shift = 3 * (read_positions(x.shape[2:], convention)[1::3, 1::3] - pixel)
    if np.abs(shift).max() > 1e-9:
        below.quiver(
            pixel[..., 1], pixel[..., 0], shift[..., 1], shift[..., 0], angles="xy", scale_units="xy", scale=1,
            color=style.QUIET, width=0.006, headwidth=4,
        )  # fmt: skip
    bare(below)
rows[1, 0].set_title("color error; arrows: from pixel to reading position, 3 × longer", size=8, color=style.QUIET)
plt.show()

# %%
for size in ((24, 36), (7, 5), (2, 9)):
    for axis, length in enumerate(size):
        i = np.arange(length)
        expected = {
            Convention.CELL_CENTER: i,
            Convention.PAPER: i,
            Convention.CVPR2022: i + 0.5 - (i + 0.5) / length,
            Convention.DATPP2023: np.minimum(i + 0.5, length - 1),
        }
        for convention, positions in expected.items():
            found = np.moveaxis(read_positions(size, convention), axis, 0)[:, 0, axis]
            np.testing.assert_allclose(found, positions, atol=1e-12)
for convention in Convention:
    is_identity = np.allclose(read(x, convention), x, atol=1e-12)
    assert is_identity == (convention in CONSISTENT)

# %% [markdown]
# ## 2. Half a pixel is a shift and a blur
#
# A reading halfway between pixels is the mean of four pixels. Along one axis, the finest pattern that a map can hold
# is $(-1)^i$. At a fraction $f$ of a pixel it is read as
#
# $$ (1 - f)\,(-1)^i + f\,(-1)^{i + 1} = (1 - 2f)\,(-1)^i , $$
#
# and as zero at $f = \tfrac12$. The points can learn to move back by half a pixel. Until then, the fine detail is lost
# before the attention.
#
# **Claim.** On a checkerboard the 2023 convention reads zero everywhere except in the corner that is clamped on both
# axes. The 2022 convention keeps a factor of $|1 - 2f_y|\,|1 - 2f_x|$: one at the center, almost zero at the corners.

# %% alt="A checkerboard read by the four conventions: unchanged twice, then faded to the corners, then flat gray"
checkers = np.indices((15, 21)).sum(axis=0) % 2 * 2.0 - 1  # -1 and 1
figure, panels = plt.subplots(1, 4, figsize=(8.8, 1.9))
for axes, convention in zip(panels, Convention):
    axes.imshow(read(checkers[None, None], convention)[0, 0], cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
    bare(axes, title=convention.name)
plt.show()

# %%
readings = {convention: read(checkers[None, None], convention)[0, 0] for convention in Convention}
of_2023 = readings[Convention.DATPP2023].copy()
assert of_2023[-1, -1] == checkers[-1, -1]
of_2023[-1, -1] = 0
assert np.abs(of_2023).max() < 1e-12
fraction = [read_positions((length, 1), Convention.CVPR2022)[:, 0, 0] % 1 for length in checkers.shape]
factor = np.abs(np.outer(1 - 2 * fraction[0], 1 - 2 * fraction[1]))
np.testing.assert_allclose(np.abs(readings[Convention.CVPR2022]), factor, atol=1e-12)
assert factor[7, 10] == 1
assert max(factor[0, 0], factor[-1, -1]) < 0.01

# %% [markdown]
# ## 3. The effect depends on the size of the map
#
# On a photograph of 512 pixels, half a pixel is invisible. But attention works on small maps: 14 × 14 in stage 3 of a
# backbone and 7 × 7 in stage 4. Neighboring pixels of such maps have little in common.
#
# **Claim.** The coarser the map, the larger the error of half a pixel. We average over four photographs of 14 × 14
# pixels. The error of the 2022 convention is more than a quarter of the map's contrast, that of the 2023 convention
# nearly half. At 7 × 7 both are larger.


# %% alt="The error of both releases falls with the side of the map, and a small photograph as they read it"
def contrast_lost(maps, convention):
    """Return the error of reading a map with zero offsets, relative to the standard deviation of the map."""
    deviation = np.sqrt(np.square(maps - maps.mean(axis=(2, 3), keepdims=True)).mean())
    return np.sqrt(np.square(read(maps, convention) - maps).mean()) / deviation


SIDES = (7, 14, 28, 56, 112, 224)
lost = {
    convention: np.array(
        [[contrast_lost(photo_map(name, (side, side)), convention) for side in SIDES] for name in photographs()]
    )
    for convention in Convention
}  # (photographs, sides) each

figure, (axes, *examples) = plt.subplots(1, 4, figsize=(8.8, 2.4), width_ratios=[1.5, 1, 1, 1])
for convention, losses in lost.items():
    axes.plot(SIDES, losses.T, color=COLORS[convention], lw=0.6, alpha=0.45)
    axes.plot(SIDES, losses.mean(axis=0), color=COLORS[convention], lw=2.2, marker="o", ms=3.5)
for convention, name in zip(RELEASED + CONSISTENT[:1], ("2022", "2023", "others")):
    axes.annotate(
        name,
        (SIDES[-1], lost[convention].mean(axis=0)[-1]),
        xytext=(6, -3),
        textcoords="offset points",
        color=COLORS[convention],
    )
axes.set(xscale="log", xticks=SIDES, xticklabels=SIDES, xlabel="side of the map, pixels")
axes.set(xlim=(6, 480), ylim=(-0.01, 0.65))
axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
axes.set_title("error / contrast: 4 photographs, mean")
axes.minorticks_off()
coarse = photo_map("astronaut", (14, 14))
for axes, (name, picture) in zip(
    examples,
    {
        "14 × 14 pixels": coarse,
        "read by 2022": read(coarse, Convention.CVPR2022),
        "read by 2023": read(coarse, Convention.DATPP2023),
    }.items(),
):
    axes.imshow(as_picture(picture), interpolation="nearest")
    bare(axes, title=name)
plt.show()

# %%
for convention in CONSISTENT:
    assert lost[convention].max() < 1e-12
for convention in RELEASED:
    average = lost[convention].mean(axis=0)
    assert (np.diff(average) < 0).all()  # the finer the map, the smaller the error
    print(f"{convention.name}: " + ", ".join(f"{side}: {share:.0%}" for side, share in zip(SIDES, average)))
at_14 = {convention: lost[convention].mean(axis=0)[1] for convention in RELEASED}
assert at_14[Convention.CVPR2022] > 0.25
assert at_14[Convention.DATPP2023] > 0.4

# %% [markdown]
# A network can adapt to this error: weights trained with one geometry are valid for that geometry. Therefore `dat_ref`
# reproduces both releases exactly, errors included. For the same reason, conventions must not be mixed.
#
# ## 4. Strides: half a key cell
#
# With fewer keys than pixels, the deviation is half a *key* cell. Stage 1 of DAT++ has one key for 8 × 8 pixels. Half
# a cell is then four pixels of the map, which are sixteen pixels of the image. There is a second inconsistency: the
# padding rule that positions the windows of the offset network differs from the rule for the reference points.
#
# **Claim** (`dat_ref.ops.grid.offset_padding`). Under `CELL_CENTER` each window is centered on its reference point, to
# half a pixel. In the 2023 geometry half of the windows are more than a whole cell away from their points, and 13 of
# 49 points are clamped to the border.

# %% alt="Points of a 7 × 7 grid, tied to the windows of the offset network: together, or apart by more than a cell"
SIZE, KERNEL, STRIDE = (56, 56), 9, 8  # stage 1 of dat_pp_tiny


def window_centers(convention):
    """Return the centers of the windows of the offset network along one axis, in pixels."""
    (before, _), _ = offset_padding(SIZE, KERNEL, STRIDE, convention)
    count = key_grid_size(SIZE, KERNEL, STRIDE, convention)[0]
    return np.arange(count) * STRIDE - before + (KERNEL - 1) / 2


astronaut = dim(load_photo(photograph_path("astronaut")))
points, windows = {}, {}
for convention in Convention:
    points[convention] = read_positions(SIZE, convention, key_grid_size(SIZE, KERNEL, STRIDE, convention))
    centers = window_centers(convention)
    windows[convention] = np.stack(np.meshgrid(centers, centers, indexing="ij"), axis=-1)

figure, panels = plt.subplots(2, 2, figsize=(7.4, 7.7))
for axes, convention in zip(panels.ravel(), Convention):
    axes.imshow(astronaut, extent=(-0.5, 55.5, 55.5, -0.5))
    for window, point in zip(windows[convention].reshape(-1, 2), points[convention].reshape(-1, 2)):
        axes.plot(*np.stack([window, point]).T[::-1], color="white", lw=0.8)
        axes.plot(*window[::-1], "s", color="white", ms=3)
        axes.plot(*point[::-1], "o", color=COLORS[convention], mec="white", mew=0.6, ms=5, clip_on=False, zorder=4)
    bare(axes, title=convention.name, xlim=(-0.5, 55.5), ylim=(55.5, -0.5))
figure.supxlabel(
    "squares: centers of the windows of the offset network; dots: its points with zero offsets",
    size=8,
    color=style.QUIET,
)
plt.show()

# %%
apart = {convention: np.linalg.norm(windows[convention] - points[convention], axis=-1) for convention in Convention}
for convention, distance in apart.items():
    center = points[convention].mean(axis=(0, 1))
    print(f"{convention.name:11} window to point {distance.mean():4.1f} pixels, points centered on {center.round(1)}")
assert apart[Convention.CELL_CENTER].max() < np.hypot(0.5, 0.5) + 1e-9
assert np.median(apart[Convention.DATPP2023]) > STRIDE
assert (points[Convention.DATPP2023] == 55).any(axis=-1).sum() == 13  # a row and a column of seven
np.testing.assert_allclose(points[Convention.CELL_CENTER].mean(axis=(0, 1)), 27.5)

# %% [markdown]
# ## 5. Independence of the resolution
#
# Take the same photograph at a higher resolution, again with seven keys along each axis. The keys should stay at the
# same positions *on the photograph*. If $\pm 1$ are the centers of the outermost pixels, these positions change with
# the pixel size.
#
# **Claim.** Only under `CELL_CENTER` the position of a key on the photograph does not depend on the resolution of the
# map.

# %% alt="Positions of seven keys for growing maps: level lines for CELL_CENTER, bent ones for the others" plot=true
DOUBLES = [7 * 2**power for power in range(7)]
positions = {
    convention: np.array([(read_positions((side, side), convention, (7, 7))[:, 0, 0] + 0.5) / side for side in DOUBLES])
    for convention in Convention
}  # (sides, 7), as fractions of the photograph: 0 and 1 are its borders

figure, panels = plt.subplots(1, 4, figsize=(8.8, 2.2), sharey=True)
for axes, convention in zip(panels, Convention):
    axes.plot(DOUBLES, positions[convention], color=COLORS[convention], lw=1.4, marker="o", ms=2.5)
    axes.set(
        xscale="log", xticks=DOUBLES[::2], xticklabels=DOUBLES[::2], ylim=(1, 0), yticks=[0, 1], title=convention.name
    )
    axes.minorticks_off()
panels[0].set(ylabel="position of seven keys", yticklabels=["top", "bottom"])
figure.supxlabel("side of the map, pixels", size=8.5, color=style.QUIET)
plt.show()

# %%
travel = {convention: np.ptp(positions[convention], axis=0).max() for convention in Convention}
assert travel[Convention.CELL_CENTER] < 1e-12
assert min(travel[convention] for convention in Convention if convention is not Convention.CELL_CENTER) > 0.05

# %% [markdown]
# ## 6. Positions in the bias table
#
# A table of $(2H - 1) \times (2W - 1)$ entries has one entry for every displacement between two pixels. If the
# reference points are at pixel centers, a layer with zero offsets reads single entries, and its bias equals that of
# window attention. If they are halfway between pixels, every reading is a mean of four entries, and no entry is read
# alone.
#
# **Claim** (`dat_ref.ops.bias.table_positions`). With zero offsets the consistent conventions read whole entries, and
# all of them. The 2022 convention does not reach the border of the table. The 2023 convention reads halfway between
# entries, except for clamped points.

# %% alt="Positions in the bias table at zero offset: on all entries twice, contracted, between entries" plot=true
MAP = (7, 7)
figure, panels = plt.subplots(1, 4, figsize=(8.8, 2.5))
read_at = {}
for axes, convention in zip(panels, Convention):
    starts = from_pixels(read_positions(MAP, convention), MAP, convention).reshape(1, 1, -1, 2)
    read_at[convention] = table_positions(starts, (13, 13), MAP, convention).reshape(-1, 2).round(9)
    for line in range(13):
        axes.axhline(line, color=style.HAIRLINE, lw=0.5)
        axes.axvline(line, color=style.HAIRLINE, lw=0.5)
    axes.scatter(*np.unique(read_at[convention], axis=0).T[::-1], s=7, color=COLORS[convention], lw=0, zorder=3)
    bare(axes, title=convention.name, aspect="equal", xlim=(-0.7, 12.7), ylim=(12.7, -0.7))
figure.supxlabel(
    "crossings: the 13 × 13 entries; dots: positions that 49 queries read for 49 keys", size=8, color=style.QUIET
)
plt.show()

# %%
table = np.random.default_rng(0).normal(size=(1, 13, 13))
y, x_axis = np.divmod(np.arange(49), 7)
gathered = table[:, y[:, None] - y + 6, x_axis[:, None] - x_axis + 6]  # the lookup of window attention
for convention in Convention:
    whole = (read_at[convention] % 1 == 0).all(axis=1)
    starts = from_pixels(read_positions(MAP, convention), MAP, convention).reshape(1, 1, -1, 2)
    bias = table_bias(table, starts, query_size=MAP, convention=convention)[0]
    assert np.allclose(bias, gathered) == whole.all() == (convention in CONSISTENT)
assert len(np.unique(read_at[Convention.CELL_CENTER], axis=0)) == 13 * 13
assert read_at[Convention.CVPR2022].min() > 0.8
halves = read_at[Convention.DATPP2023] % 1
assert set(np.unique(halves)) == {0, 0.5}
assert (halves == 0.5).mean() == 6 / 7  # six of seven points on an axis are not clamped

# %% [markdown]
# ## 7. Which test detects the error?
#
# Common tests do not detect errors of this kind. We compare six ways to read a map with zero offsets: the four
# conventions, one with $y$ and $x$ exchanged, and one that divides both coordinates by the *height*, which is a real
# bug of a well-known port. We apply three tests: identity, commutation with a flip, and commutation with a
# transposition. Each test runs on a square map and on a map that is not square.
#
# **Claim.** On a map that is not square, the identity test detects every error. The transposition test detects neither
# release, on any map. On a square map no test detects the division by the wrong side.


# %% alt="Dots, six ways to read a map by three tests on two maps: filled where the error is detected" plot=true
def swapped(maps):
    positions = read_positions(maps.shape[2:], Convention.CELL_CENTER)[..., ::-1]
    return bilinear_sample(maps, positions.reshape(1, -1, 2)).reshape(maps.shape)


def divided_by_height(maps):
    positions = read_positions(maps.shape[2:], Convention.PAPER) * [1, (maps.shape[3] - 1) / (maps.shape[2] - 1)]
    return bilinear_sample(maps, positions.reshape(1, -1, 2)).reshape(maps.shape)


READERS = {convention.name: lambda maps, c=convention: read(maps, c) for convention in Convention}
READERS |= {"y and x exchanged": swapped, "both divided by height": divided_by_height}
SYMMETRIES = {
    "identity": lambda reader, maps: reader(maps) - maps,
    "flip": lambda reader, maps: reader(maps[:, :, ::-1]) - reader(maps)[:, :, ::-1],
    "transposition": lambda reader, maps: reader(maps.swapaxes(2, 3)) - reader(maps).swapaxes(2, 3),
}
noise = {shape: np.random.default_rng(0).normal(size=(1, 2, *shape)) for shape in ((7, 7), (6, 9))}
caught = {
    (reader, test, shape): np.abs(SYMMETRIES[test](READERS[reader], maps)).max() > 1e-9
    for reader in READERS
    for test in SYMMETRIES
    for shape, maps in noise.items()
}

figure, axes = plt.subplots(figsize=(8.4, 2.9))
columns = [(test, shape) for test in SYMMETRIES for shape in noise]
for row, reader in enumerate(READERS):
    for column, (test, shape) in enumerate(columns):
        is_caught = caught[reader, test, shape]
        axes.scatter(
            column, row, s=130, color=ORANGE if is_caught else "white", ec=ORANGE if is_caught else style.HAIRLINE
        )
axes.set(xlim=(-0.6, 5.6), ylim=(5.6, -0.6), yticks=range(6), yticklabels=READERS)
axes.set_xticks(range(6), [f"{test}\n{shape[0]} × {shape[1]}" for test, shape in columns])
axes.set_title("filled: the test detects the error")
axes.tick_params(length=0)
axes.spines[:].set_visible(False)
plt.show()

# %%
for reader in READERS:
    wrong = reader not in ("CELL_CENTER", "PAPER")
    assert caught[reader, "identity", (6, 9)] == wrong
for convention in Convention:
    assert not any(caught[convention.name, "transposition", shape] for shape in noise)
assert not any(caught["both divided by height", test, (7, 7)] for test in SYMMETRIES)
assert not any(caught["CVPR2022", test, shape] for test in ("flip", "transposition") for shape in noise)

# %% [markdown]
# ## 8. Rounding of coordinates
#
# Low precision also causes errors of a fraction of a pixel. A normalized coordinate near 1 has a resolution of
# $2^{-8}$ in bfloat16, independent of the map. On a map of 336 pixels (half of it is one unit), neighboring bfloat16
# coordinates are two thirds of a pixel apart.
#
# **Claim.** The error of a half-precision coordinate grows with the map. At 336 pixels, bfloat16 has errors of up to a
# third of a pixel, and float16 an eighth of that. Therefore `to_pixels` computes in float32 or wider for inputs of any
# dtype.


# %% alt="The error of a rounded coordinate grows with the map: bfloat16 to a third of a pixel" plot=true
def as_bfloat16(values):
    """Round to the 8 significant bits of bfloat16, which NumPy does not have."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


STORED = {"bfloat16": as_bfloat16, "float16": np.float16, "float32": np.float32}
MAPS = (14, 28, 56, 112, 224, 336)
largest_error = {name: [] for name in STORED}
for side in MAPS:
    exact = np.random.default_rng(side).uniform(0, side - 1, (20000, 2))
    normalised = from_pixels(exact, (side, side), Convention.CELL_CENTER)
    for name, store in STORED.items():
        back = to_pixels(store(normalised).astype(np.float64), (side, side), Convention.CELL_CENTER)
        largest_error[name].append(np.abs(back - exact).max())

figure, axes = plt.subplots(figsize=(5.6, 2.6))
for (name, errors), color in zip(largest_error.items(), (ORANGE, PINK, BLUE)):
    axes.plot(MAPS, errors, color=color, lw=1.8, marker="o", ms=3.5)
    axes.annotate(name, (MAPS[-1], errors[-1]), xytext=(6, 0), textcoords="offset points", color=color, va="center")
axes.axhline(0.5, color=style.QUIET, lw=0.8, ls=(0, (4, 3)))
axes.text(14, 0.6, "half a pixel", color=style.QUIET, size=8)
axes.set(xscale="log", yscale="log", xticks=MAPS, xticklabels=MAPS, xlim=(13, 620), xlabel="side of the map, pixels")
axes.set(ylim=(3e-7, 2), title="largest error of a rounded coordinate, pixels")
axes.minorticks_off()
plt.show()

# %%
assert 0.25 < largest_error["bfloat16"][-1] < 0.35
np.testing.assert_allclose(np.divide(largest_error["bfloat16"], largest_error["float16"]), 8, rtol=0.1)
assert largest_error["float32"][-1] < 1e-4
for dtype in (np.float16, np.float32, np.float64):
    assert to_pixels(np.zeros(2, dtype), (336, 336), Convention.CELL_CENTER).dtype == np.result_type(dtype, np.float32)

# %% [markdown]
# ## What to remember
#
# - With zero offsets at stride 1, a layer should read the map itself. Of the three tests only this identity test
#   detects both releases. On a map that is not square it also detects the other errors.
# - Half a pixel is a shift and a blur. On the coarse maps of the last stages it removes a large part of the contrast.
# - With a stride it becomes half a key cell, and the offset network reads other positions than those of its points.
# - Use `CELL_CENTER` for new work. For released weights, use the geometry with which they were trained.
#
# Next: [the range of the offsets, and groups](../03_offsets_range_and_groups/).

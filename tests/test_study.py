"""The study: networks that differ in what they say, scenes as drawn, runs that go on, attention maps against loops."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("PIL")
pytest.importorskip("safetensors")

from dat_ref._checks import ConfigError  # noqa: E402
from dat_ref.config import DeformableAttentionConfig, OffsetBound  # noqa: E402
from dat_ref.experiments import attention_maps, load_results, models, study  # noqa: E402
from dat_ref.scenes import Scenes  # noqa: E402
from dat_ref.scenes.measures import on_image, share_on_mask  # noqa: E402
from dat_ref.torch import DAT, as_numpy  # noqa: E402
from dat_ref.torch.train import SceneImages  # noqa: E402

NETWORKS = models.variants()

# ------------------------------------------------------------------------------------------------ networks


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_gives_an_answer_and_learns_in_all_its_layers(name):
    network = study.Plan(name, 0).network()
    network(torch.randn(2, 3, models.SIDE, models.SIDE, generator=torch.Generator().manual_seed(0))).sum().backward()
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in network.parameters())


def changed_options(name):
    """Return the options in which a network's layers differ from those of the small one."""
    pairs = zip(layers_of(models.base_config()), layers_of(NETWORKS[name].config))
    return {
        option
        for ours, theirs in pairs
        for option in DeformableAttentionConfig.__dataclass_fields__
        if getattr(ours, option) != getattr(theirs, option)
    }


def layers_of(config):
    return [block.attention for blocks in config.stages for block in blocks]


def test_each_network_differs_in_one_thing():
    option = {"offsets": {"offset_bound", "offset_range"}, "groups": {"groups"}, "bias": {"bias"}}
    for name, variant in NETWORKS.items():
        if variant.part == "peers":
            assert not any(isinstance(layer, DeformableAttentionConfig) for layer in layers_of(variant.config))
            assert replace(variant.config, stages=models.base_config().stages) == models.base_config()
        elif name in (models.BASE, "zero start"):
            assert variant.config == models.base_config()
        else:
            assert len(changed_options(name)) == 1
            assert changed_options(name) <= option.get(variant.part, {"convention"}), name
    assert NETWORKS[models.NO_OFFSETS].config.stages[0][0].attention.offset_bound is OffsetBound.NONE
    assert NETWORKS["zero start"].init == "zero_offset"


def test_keys_are_those_of_the_page():
    """36 keys in the first stage and 9 in the second, of maps with four times as many places."""
    from dat_ref.ops.grid import key_grid_size

    grids = [
        key_grid_size((side, side), layer.kernel_size, layer.stride, layer.convention)
        for side, layer in zip((12, 6, 6), layers_of(models.base_config()))
    ]
    assert grids == [(6, 6), (3, 3), (3, 3)]


# ------------------------------------------------------------------------------------------------ scenes


def test_stored_scenes_are_those_that_were_drawn(tmp_path):
    scenes = Scenes("which", "train", 32, length=4, radius=study.SINGLE_RADIUS)
    drawn, stored = SceneImages(scenes, fresh=True), study.StoredScenes(scenes, tmp_path, epochs=2)
    for epoch in range(2):
        drawn.set_epoch(epoch)
        stored.set_epoch(epoch)
        for ours, theirs in zip(stored, drawn, strict=True):
            assert torch.equal(ours[0], theirs[0])
            assert ours[1] == theirs[1]
    with pytest.raises(IndexError, match="index: expected 0 ≤ index < 4, got 4"):
        stored[4]


def stopped(*_):
    raise KeyboardInterrupt


def test_a_file_that_was_left_half_drawn_is_drawn_again(tmp_path, monkeypatch):
    scenes = Scenes("which", "held_out", 32, length=3)
    with monkeypatch.context() as patch:
        patch.setattr(study.np, "save", stopped)
        with pytest.raises(KeyboardInterrupt):
            study.StoredScenes(scenes, tmp_path)
    (half,) = tmp_path.glob("*.images.npy")
    np.lib.format.open_memmap(half, mode="r+")[:] = 0
    assert torch.equal(study.StoredScenes(scenes, tmp_path)[2][0], SceneImages(scenes)[2][0])


# ------------------------------------------------------------------------------------------------ runs


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(study, "RECIPE", replace(study.RECIPE, epochs=1, scenes_per_epoch=8, batch_size=4))
    monkeypatch.setattr(study, "CHECKPOINT_STEPS", (1,))
    original = study.Scenes

    def few(*arguments, **options):
        return original(*arguments, **{"length": 6} | options)

    monkeypatch.setattr(study, "Scenes", few)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_a_run_leaves_what_is_looked_at_and_is_made_once(tiny, tmp_path, capsys):
    plan = study.Plan(models.BASE, 1)
    study.train(plan, tmp_path)
    found = json.loads((plan.folder(tmp_path) / "result.json").read_text())
    assert (found["name"], found["seed"]) == (models.BASE, 1)
    after, last = attention_maps.load_run(plan, tmp_path, 1), attention_maps.load_run(plan, tmp_path)
    first = attention_maps.load_run(plan, tmp_path, 0)
    table = "stages.0.blocks.0.attention.output.weight"
    different = [not torch.equal(ours.state_dict()[table], last.state_dict()[table]) for ours in (first, after)]
    assert different == [True, True]
    capsys.readouterr()
    study.train(plan, tmp_path)
    assert capsys.readouterr().out == ""


def test_what_was_neither_made_nor_measured_before_is_not_collected(tmp_path):
    with pytest.raises(ConfigError, match="expected the run 'deformable' with seed 0, or one on record"):
        study.collect(tmp_path, {})


def test_runs_in_the_folder_stand_before_those_on_record(tmp_path):
    record, plan = load_results("study"), study.Plan(models.NO_OFFSETS, 1)
    plan.folder(tmp_path).mkdir(parents=True)
    (plan.folder(tmp_path) / "result.json").write_text('{"accuracy": 0.25, "loss": 2.0}')
    found = study.collect(tmp_path, record)["runs"]
    assert found[models.NO_OFFSETS].pop("1") == {"accuracy": 0.25, "loss": 2.0}
    assert record["runs"][models.NO_OFFSETS].pop("1") != {"accuracy": 0.25, "loss": 2.0}
    assert found == record["runs"]


def test_a_record_of_another_recipe_is_refused(tmp_path):
    record = load_results("study")
    record["recipe"]["epochs"] += 1
    with pytest.raises(ConfigError, match="record: expected runs of the recipe"):
        study.collect(tmp_path, record)


def test_what_is_on_record_stands_for_weights_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(attention_maps, "held_out_images", lambda task: (None, np.zeros((1, 1, 2, 2), bool)))
    record = load_results("attention_maps")
    assert attention_maps.measure(tmp_path, record) == record
    del record["attention"][models.NO_OFFSETS]["2"]
    with pytest.raises(ConfigError, match="expected the run 'no offsets' with seed 2"):
        attention_maps.measure(tmp_path, record)


def test_scenes_with_several_objects_take_twice_as_long():
    several, one = study.Plan(models.BASE + models.MULTI_OBJECT, 2), study.Plan(models.BASE, 2)
    assert several.variant == one.variant
    assert (several.recipe.task, several.recipe.epochs, several.recipe.seed) == ("which_all", 2 * one.recipe.epochs, 2)
    folders = {plan.folder(study.Path("runs")) for plan in study.plans()}
    assert len(folders) == len(study.plans())


# ------------------------------------------------------------------------------------------------ attention maps


@pytest.fixture(scope="module")
def seen():
    images, masks = attention_maps.held_out_images("which", 3)
    return images, np.array([each[0] for each in masks])


def test_points_are_those_of_one_image_after_the_other(seen):
    images, masks = seen
    model = study.Plan(models.BASE, 0).network().eval()
    together = attention_maps.point_metrics(model, images, masks)
    alone = [attention_maps.point_metrics(model, images[i : i + 1], masks[i : i + 1]) for i in range(3)]
    assert list(together) == ["stage 1, block 1", "stage 2, block 1", "stage 2, block 2"]
    for layer, groups in together.items():
        for number, group in enumerate(groups):
            for column in attention_maps.COLUMNS:
                assert group[column] == pytest.approx(np.mean([each[layer][number][column] for each in alone])), column


def test_by_chance_is_the_share_on_all_other_objects(seen):
    """Image by image, object by object; with a scene's own object among them it would be another number."""
    images, masks = seen
    model = study.Plan(models.BASE, 0).network().eval()
    found = attention_maps.point_metrics(model, images, masks)
    for layer, reduction, trace in attention_maps.attention_traces(model, images):
        for group in range(2):
            shares = np.array(
                [[share_on_mask(points[group], mask, reduction) for mask in masks] for points in trace.points_px]
            )
            expected = shares[~np.eye(3, dtype=bool)].mean()
            assert found[layer][group]["by_chance"] == pytest.approx(expected)
            assert expected != pytest.approx(shares.mean())


def test_points_without_offsets_are_where_the_grid_is(seen):
    images, masks = seen
    model = study.Plan(models.NO_OFFSETS, 0).network().eval()
    for groups in attention_maps.point_metrics(model, images, masks).values():
        for group in groups:
            assert group["points"] == group["reference"]
            assert (group["displacement"], group["shift_fraction"]) == (0, 0)


def test_shift_fraction_by_hand(monkeypatch):
    """Two images, two points: (1, 0) and (3, 0), and the same again: |mean|² = 4, mean of squares = 5."""
    rest = np.zeros((1, 1, 1, 2, 2))
    moved = np.array([[[[[1.0, 0], [3, 0]]]]] * 2)
    trace = SimpleNamespace(points_px=moved, reference_px=rest, attention=np.full((2, 1, 4, 2), 0.5))
    monkeypatch.setattr(attention_maps, "attention_traces", lambda *_: [("layer", 4, trace)])
    (group,) = attention_maps.point_metrics(None, None, np.ones((2, 16, 16), bool))["layer"]
    assert group["shift_fraction"] == pytest.approx(0.8)
    assert group["displacement"] == pytest.approx(5**0.5 * 4)


def attention_by_loops(model, images, masks, layer_number, exchange=False, reduction=None):
    """Queries beside the object: how far they attend, and how much of it lies on the object."""
    with torch.no_grad():
        _, trace = model(images, return_trace=True)
    stage, block = ((0, 0), (1, 0), (1, 1))[layer_number]
    layer, step = as_numpy(trace.stages[stage].blocks[block].attention), (4, 8)[stage]
    side, far, on = models.SIDE // step, [], []
    for image, mask in enumerate(masks):
        for y in range(side):
            for x in range(side):
                where = np.rint(on_image(np.array([y, x]), step)).astype(int)
                if mask[tuple(where[::-1] if exchange else where)]:
                    continue
                total = format_share = 0.0
                heads = layer.attention.shape[1]
                for head in range(heads):
                    points = layer.points_px[image, head * 2 // heads].reshape(-1, 2)
                    for weight, (py, px) in zip(layer.attention[image, head, y * side + x], points):
                        total += weight / heads * ((py - y) ** 2 + (px - x) ** 2) ** 0.5 * (reduction or step)
                        at = np.rint(on_image(np.array([py, px]), step)).astype(int)
                        inside = (at >= 0).all() and (at < models.SIDE).all()
                        format_share += weight / heads * bool(inside and mask[tuple(at)])
                far.append(total)
                on.append(format_share)
    return float(np.mean(far)), float(np.mean(on))


def test_attention_is_that_of_loops_and_wrong_ones_are_noticed(seen):
    images, masks = seen
    model = study.Plan(models.BASE, 0).network().eval()
    found = list(attention_maps.attention_metrics(model, images, masks).values())
    for number in range(3):
        ours = found[number]["from_elsewhere"]
        assert (ours["distance"], ours["foreground"]) == pytest.approx(
            attention_by_loops(model, images, masks, number), rel=1e-5
        )
    first = found[0]["from_elsewhere"]
    assert attention_by_loops(model, images, masks, 0, exchange=True)[1] != pytest.approx(first["foreground"], rel=1e-4)
    assert attention_by_loops(model, images, masks, 0, reduction=1)[0] != pytest.approx(first["distance"], rel=1e-4)


@pytest.mark.parametrize("name", attention_maps.ATTENTION_RUNS)
def test_attention_of_each_kind_lies_within_its_reach(name, seen):
    """A window of 6 × 6 on a map of 4 image pixels reaches 5 pixels each way; a neighborhood of 5 × 5 four at most."""
    images, masks = seen
    found = attention_maps.attention_metrics(study.Plan(name, 0).network().eval(), images, masks)["stage 1, block 1"]
    farthest = {"window": 5, "shifted_window": 5, "neighborhood": 4}.get(name, 12) * 4 * 2**0.5
    for where in found.values():
        assert 0 < where["distance"] < farthest
        assert 0 <= where["foreground"] <= 1
    assert found["from_object"]["uniform"] > found["from_elsewhere"]["uniform"]


def test_objects_fall_to_the_nearest_and_to_the_most_attending_group():
    """Two groups of one point on a map of 1 × 8, objects at its ends: each group is at one of them, and attends."""
    masks = np.zeros((2, 1, 8), bool)
    masks[0, 0, :2] = masks[1, 0, 6:] = True
    trace = SimpleNamespace(
        points_px=np.array([[[[[0.0, 1]]], [[[0, 6]]]]]), attention=np.ones((1, 2, 8, 1)), reference_px=None
    )
    assert attention_maps.assign_objects(trace, masks, 1) == {"nearest": [0, 1], "most_attention": [0, 1]}
    trace.points_px = trace.points_px[:, ::-1]
    assert attention_maps.assign_objects(trace, masks, 1) == {"nearest": [1, 0], "most_attention": [1, 0]}


def test_groups_that_serve_all_alike_are_separate_by_chance():
    generator = np.random.default_rng(0)
    drawn = attention_maps.separation_rate(generator.choice(2, (4000, 2), p=[0.7, 0.3]).tolist())
    assert drawn["by_chance"] == pytest.approx(0.42, abs=0.02)
    assert drawn["observed"] == pytest.approx(0.42, abs=0.03)
    assert attention_maps.separation_rate([[0, 0], [1, 1]]) == {"observed": 0.0, "by_chance": 0.5}
    assert attention_maps.separation_rate([[0, 0], [0, 0]]) == {"observed": 0.0, "by_chance": 0.0}


def test_attention_maps_are_made_for_every_network_that_is_compared():
    assert set(attention_maps.POINT_RUNS) | set(attention_maps.ATTENTION_RUNS) <= set(NETWORKS)
    assert isinstance(study.Plan(attention_maps.ATTENTION_RUNS[2], 0).network(), DAT)

"""`dat-ref explain`: the trained network on scenes, pictures of every kind, figures on disk, errors with a remedy."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from dat_ref import cli, data
from dat_ref.cli import spot
from dat_ref.cli.photo import input_size, load_photo, prepare

TRAINED_FIGURES = ["objects.png", "objects_zero_offsets.png"]
FIGURES = ["points", "key_importance", "attention", "offset_field"]


def run(capsys, *arguments):
    """Run the command in this process; return its exit code, standard output and standard error."""
    code = cli.main(["explain", *map(str, arguments)])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


@pytest.fixture
def picture(tmp_path):
    """Return a small landscape photograph with a bright top left corner."""
    values = np.full((40, 60, 3), 60, np.uint8)
    values[:20, :30] = (250, 200, 10)
    return Image.fromarray(values)


@pytest.mark.parametrize("model", ["dat_tiny", "dat_pp_tiny"])
def test_figures_and_table_of_the_shipped_photograph(capsys, tmp_path, model):
    """Without a photograph, the one that ships: four PNG files, which are named, and a row a deformable block."""
    code, printed, _ = run(capsys, "--model", model, "--size", "96", "--out", tmp_path / "figures")
    assert code == 0
    paths = [tmp_path / "figures" / f"stage3_{name}.png" for name in FIGURES]
    assert [line for line in printed.splitlines() if "stage3_" in line] == [str(path) for path in paths]
    for path in paths:
        with Image.open(path) as figure:
            assert figure.format == "PNG"
            assert min(figure.size) > 300
    rows = [line for line in printed.splitlines() if line.rstrip().endswith(" ms")]
    assert len(rows) == {"dat_tiny": 4, "dat_pp_tiny": 14}[model]


def test_json_holds_the_same_facts(capsys, tmp_path):
    """`--json` prints one JSON document: sizes, a report for each deformable block, the figures' paths."""
    code, printed, _ = run(capsys, "--model", "dat_tiny", "--json", "--size", "64x96", "--out", tmp_path)
    facts = json.loads(printed)
    assert code == 0
    assert facts["image_size"] == [64, 96]
    assert [(block["stage"], block["block"]) for block in facts["blocks"]] == [(3, 2), (3, 4), (3, 6), (4, 2)]
    third = facts["blocks"][0]
    assert third["map_size"] == [4, 6]
    assert third["queries"] == third["keys"] == 24
    assert 0 < third["offset_mean_px"] <= third["offset_max_px"] <= np.hypot(1, 1)  # s = 2 key cells
    assert 0 <= third["share_at_bound"] <= 1
    assert third["share_outside"] == 0
    assert len(facts["figures"]) == 4


def test_default_is_the_trained_network_on_scenes_then_a_photograph(capsys, tmp_path):
    code, printed, _ = run(capsys, "--size", "64", "--out", tmp_path)
    assert code == 0
    assert printed.startswith("dat_spot: trained weights.")
    assert "untrained" in printed
    listed = [line for line in printed.splitlines() if line.endswith(".png")]
    assert listed == [str(tmp_path / name) for name in [*TRAINED_FIGURES, *(f"stage3_{name}.png" for name in FIGURES)]]
    for name in TRAINED_FIGURES:
        with Image.open(tmp_path / name) as figure:
            assert min(figure.size) > 600
    counts = {len(spot.look_at_scene(number).objects) for number in spot.SCENES}
    assert {0, 1} < counts  # an empty scene, single objects, several objects


def test_no_scenes_for_a_model_or_a_photograph_of_ones_own(capsys, tmp_path):
    for arguments in (["--model", "dat_pp_tiny"], [data.photograph_path("rocket")]):
        _, printed, _ = run(capsys, *arguments, "--size", "64", "--out", tmp_path)
        assert "dat_spot" not in printed
        assert "untrained" in printed
    assert not (tmp_path / TRAINED_FIGURES[0]).exists()


def test_chosen_scenes_as_json(capsys, tmp_path):
    code, printed, _ = run(capsys, "--json", "--scene", "12", "--scene", "27", "--out", tmp_path)
    facts = json.loads(printed)
    assert (code, list(facts)) == (0, ["trained"])
    empty, octopus = facts["trained"]["pictures"]
    assert (empty["picture"], empty["objects"]) == ("scene 12", [])
    assert (octopus["picture"], octopus["objects"]) == ("scene 27", ["octopus"])
    assert max(empty["answers"], key=empty["answers"].get) == "nothing"
    assert max(octopus["answers"], key=octopus["answers"].get) == "octopus"
    for each in (empty, octopus):
        assert sum(each["answers"].values()) == pytest.approx(1)
        assert each["points"] == 32
    assert octopus["points_on_objects"] > 0
    assert octopus["answers_with_zero_offsets"]["octopus"] < octopus["answers"]["octopus"]
    assert facts["trained"]["figures"] == [str(tmp_path / name) for name in TRAINED_FIGURES]


def test_object_placed_on_a_photograph(capsys, tmp_path, picture):
    """The picture without and with the object: points on the object exist only with it, and the answer names it."""
    path = saved(picture.resize((240, 160)), tmp_path / "photo.png")
    code, printed, _ = run(capsys, path, "--place", "crab@100,150,14", "--json", "--out", tmp_path / "out")
    (found,) = json.loads(printed)["trained"]["pictures"]
    assert code == 0
    assert found["objects"] == ["crab"]
    assert found["points_on_objects"] > 0
    assert max(found["answers"], key=found["answers"].get) == "crab"


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("unicorn@1,2", "expected NAME@y,x in pixels of the photograph"),
        ("crab", "expected NAME@y,x"),
        ("crab@1", "expected NAME@y,x"),
        ("crab@1.2.3,4", "expected numbers after @"),
    ],
)
def test_bad_places_exit_with_2(capsys, place, message):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["explain", "--place", place])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_network_that_ships_is_as_good_as_its_card_says():
    """On the first held-out scenes; and small enough to ship."""
    torch = pytest.importorskip("torch")
    from dat_ref.scenes import Scenes
    from dat_ref.torch import create_model
    from dat_ref.torch.train import SceneImages, evaluate

    card, number = data.network_card(), 256
    scenes = Scenes("find", "held_out", spot.SIDE, length=number, objects="pictures")
    assert tuple(card["classes"]) == scenes.classes
    assert data.network_path().stat().st_size <= 2_000_000
    model = create_model(data.NETWORK, checkpoint=data.network_path(), num_classes=len(scenes.classes)).eval()
    assert sum(leaf.numel() for leaf in model.parameters()) == card["parameters"]
    some = SceneImages(scenes, reduction=model.config.reductions[-1], on_objects=0.0)
    deviation = np.sqrt(card["accuracy"] * (1 - card["accuracy"]) / number)
    assert abs(evaluate(model, some).accuracy - card["accuracy"]) < 4 * deviation
    with torch.no_grad():  # an untrained head is noticed
        model.head.weight.zero_()
    assert abs(evaluate(model, some).accuracy - card["accuracy"]) > 4 * deviation


def test_the_same_seed_gives_the_same_figures(capsys, tmp_path):
    """Figures are reproducible to the byte, and another seed gives others."""
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        options = ("--model", "dat_tiny", "--size", "64", "--seed", seed, "--out", tmp_path / name)
        assert run(capsys, *options)[0] == 0
    first, second, other = ((tmp_path / name / "stage3_points.png").read_bytes() for name in "abc")
    assert first == second
    assert first != other


def test_torch_and_numpy_give_the_same_pictures(capsys, tmp_path):
    """The table says the same to the digits shown, and no figure differs in more than a pixel here and there."""
    pytest.importorskip("torch")
    facts = {}
    for backend in ("numpy", "torch"):
        options = (
            "--backend",
            backend,
            "--model",
            "dat_pp_tiny",
            "--size",
            "64x96",
            "--stage",
            "2",
            "--out",
            tmp_path / backend,
        )
        code, printed, _ = run(capsys, "--json", *options)
        facts[backend] = json.loads(printed)
        assert code == 0
        assert facts[backend]["backend"] == backend
    for ours, theirs in zip(facts["numpy"]["blocks"], facts["torch"]["blocks"], strict=True):
        for fact in ours.keys() - {"seconds"}:
            assert ours[fact] == pytest.approx(theirs[fact], rel=1e-3, abs=1e-3)
    for name in FIGURES:
        first, second = (
            np.asarray(Image.open(tmp_path / backend / f"stage2_{name}.png").convert("RGB")).astype(int)
            for backend in ("numpy", "torch")
        )
        assert first.shape == second.shape
        assert (np.abs(first - second).max(axis=-1) > 32).mean() < 1e-3


@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_every_stage_of_the_2023_backbone_can_be_drawn(capsys, tmp_path, stage):
    """Also the last one, which has no neighborhood block to compare with."""
    code, printed, _ = run(capsys, "--model", "dat_pp_tiny", "--size", "64", "--stage", stage, "--out", tmp_path)
    assert code == 0
    assert f"stage{stage}_attention.png" in printed


def saved(picture, path, **options):
    picture.save(path, **options)
    return path


def test_pictures_are_read_as_a_person_sees_them(picture, tmp_path):
    """EXIF rotation is applied, transparency falls on white, grey and palette become colour, 16 bits are scaled."""
    plain = load_photo(saved(picture, tmp_path / "plain.png"))
    assert plain.shape == (40, 60, 3)
    rotated = Image.Exif()
    rotated[0x0112] = 6  # the camera was turned: show it a quarter turn clockwise
    upright = load_photo(saved(picture, tmp_path / "turned.png", exif=rotated))
    np.testing.assert_array_equal(upright, np.rot90(plain, -1))
    clear = picture.convert("RGBA")
    clear.putalpha(0)
    assert (load_photo(saved(clear, tmp_path / "clear.png")) == 1).all()
    grey = load_photo(saved(picture.convert("L"), tmp_path / "grey.png"))
    np.testing.assert_array_equal(grey[..., 0], grey[..., 2])
    palette = load_photo(saved(picture.quantize(2), tmp_path / "palette.png"))
    assert np.abs(palette - plain).max() < 0.01
    deep = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
    np.testing.assert_allclose(load_photo(saved(deep, tmp_path / "deep.png")), grey)
    assert load_photo(saved(picture, tmp_path / "photo.jpg")).shape == (40, 60, 3)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_picture_with_values_that_are_not_finite_is_refused(capsys, tmp_path, value):
    values = np.full((40, 60), 0.5, np.float32)
    values[3, 4] = value
    Image.fromarray(values).save(tmp_path / "hole.tif")
    code, _, error = run(capsys, tmp_path / "hole.tif", "--out", tmp_path / "figures")
    assert code != 0
    assert "hole.tif: it has values that are not finite (NaN or infinity)" in error
    assert not list(tmp_path.glob("figures/*"))


@pytest.mark.parametrize(
    ("photo", "wanted", "size"),
    [
        ((300, 451), 224, (224, 352)),
        ((451, 300), 224, (352, 224)),
        ((100, 100), 100, (96, 96)),
        ((5, 900), 64, (64, 192)),
        ((300, 451), (97, 130), (97, 130)),
    ],
)
def test_input_size(photo, wanted, size):
    """The short side is as asked and the shape kept, in multiples of 32; an exact size is taken as it is."""
    assert input_size(photo, wanted) == size
    image = prepare(np.random.default_rng(0).uniform(size=(*photo, 3)), wanted)
    assert image.shape == (1, 3, *size)
    assert image.dtype == np.float32


def test_any_size_and_a_query_in_every_corner(capsys, tmp_path, picture):
    """Odd, non-square and smaller than a window: 35×130 pixels; queries on the outermost pixels."""
    path = saved(picture, tmp_path / "photo.png")
    queries = ["--query=0,0", "--query=39,59", "--query=0,59"]
    assert run(capsys, path, "--size", "35x130", *queries, "--out", tmp_path / "out")[0] == 0


BAD = {
    "absent": (["{absent}"], "there is none at"),
    "not a picture": (["{text}"], "cannot read"),
    "truncated": (["{truncated}"], "cannot read"),
    "folder": (["{folder}"], "there is none at"),
    "stage without deformable blocks": (
        ["--stage", "1"],
        "--stage: expected one with deformable blocks, [3, 4], got 1",
    ),
    "query off the photograph": (["--query", "300,10"], "--query: expected y,x inside the 300×451 photograph"),
    "too small": (["--size", "16x64"], "--size: expected at least 32 pixels"),
    "too large": (["--size", "4000"], "choose a smaller size"),
    "absent checkpoint": (["--checkpoint", "{absent}"], "nothing.png"),
    "file in place of the folder": (["--out", "{text}"], "--out: expected a folder"),
    "scene with a photograph": (["{folder}", "--scene", "3"], "--scene: expected no PHOTO and no --place"),
    "object off the photograph": (["--place", "crab@300,10"], "--place: expected y,x inside the 300×451 photograph"),
    "object too large": (["--place", "crab@30,10,200"], "--place: expected a radius from 3 to 150 pixels, got 200"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_and_nothing_is_written(capsys, tmp_path, monkeypatch, case):
    """Exit code 2, one line that names what is wrong, no traceback, no folder of figures left behind."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.jpg").write_text("not a picture")
    (tmp_path / "truncated.jpg").write_bytes(data.photograph_path().read_bytes()[:2000])
    places = {"absent": "nothing.png", "text": "text.jpg", "truncated": "truncated.jpg", "folder": "."}
    arguments, message = BAD[case]
    code, printed, complaint = run(capsys, *(argument.format(**places) for argument in arguments))
    assert code == 2
    assert printed == ""
    assert message in complaint
    assert complaint.startswith("dat-ref: error: ")
    assert complaint.count("\n") == 1 or "checkpoint" in case
    assert not (tmp_path / "explained").exists()
    assert not any(path.suffix == ".png" for path in tmp_path.rglob("*"))


@pytest.mark.parametrize("arguments", [["--model", "dat_huge"], ["--query", "ten"], ["--size", "0"], ["--seed", "-1"]])
def test_bad_options_exit_with_2(capsys, arguments):
    """argparse names the option."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(["explain", *arguments])
    assert stopped.value.code == 2
    assert f"argument {arguments[0]}" in capsys.readouterr().err


def test_as_a_process_into_a_closed_pipe(tmp_path):
    """`python -m dat_ref explain | head -1` ends quietly."""
    command = f"{sys.executable} -m dat_ref explain --size 64 --out {tmp_path} | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("dat_spot: trained weights")
    assert done.stderr == ""

"""The network that runs in the page, against the spec: the same weights, the same images, in Node.js."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from helpers.figures import DOCS, load

from dat_ref.cli.photo import normalise
from dat_ref.cli.spot import load_network
from dat_ref.scenes import Scenes
from dat_ref.scenes.measures import received

FIGURES = DOCS / "js" / "figures"
RUNNER = Path(__file__).parent / "helpers" / "run_network.mjs"
NODE = shutil.which("node")
TOLERANCE = 1e-4


def test_weights_and_pictures_are_those_of_the_package():
    """`python docs/figures/network.py` regenerates them."""
    for name, content in load("figures/network.py").outputs().items():
        assert (DOCS / name).read_text(encoding="utf-8") == content, f"docs/{name} is out of step"


def images():
    """Return an empty scene, scenes with one object and with many, small changes of the last one, and noise."""
    scenes = Scenes("find_all", "held_out", 160, objects="pictures")
    rng = np.random.default_rng(0)
    drawn = [scenes[number].image for number in (12, 58, 33)]
    for top, left in ((0, 70), (61, 37), (150, 151), (77, 0)):  # at borders and inside
        changed = drawn[-1].copy()
        changed[top : top + 9, left : left + 9] = rng.integers(
            0, 256, size=changed[top : top + 9, left : left + 9].shape
        )
        drawn.append(changed)
    return [*drawn, rng.integers(0, 256, size=(80, 80, 3), dtype=np.uint8)]


def by_spec(image, zero_offsets):
    """Return the spec's logits (H, W, classes), points (G, N, 2) and received attention (G, N)."""
    model = load_network(zero_offsets)
    *_, last = model.walk(normalise(image / 255))
    trace = last.trace.attention
    return {
        "logits": model.classify(model.pool(last.output))[0].transpose(1, 2, 0).ravel(),
        "points": trace.points_px[0].ravel(),
        "references": trace.reference_px[0, 0].ravel(),
        "received": received(trace).ravel(),
        "change": 0.0,  # from features that are computed again
    }


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """Write the images to a file; return it with what the spec computes, once with and once with zero offsets."""
    drawn = [(image, moving) for image in images() for moving in (True, False)]
    path = tmp_path_factory.mktemp("network") / "images.json"
    rows = [{"pixels": image.ravel().tolist(), "side": len(image), "moving": moving} for image, moving in drawn]
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path, [by_spec(image, not moving) for image, moving in drawn]


def differences(cases, kernel):
    """Return the largest difference of each output between a kernel and the spec, over all images."""
    path, expected = cases
    command = [NODE, str(RUNNER), str(path), str(kernel), str(FIGURES / "data" / "network.mjs")]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert len(found) == len(expected)
    return {
        name: max(np.abs(np.array(one[name]) - right[name]).max() for one, right in zip(found, expected))
        for name in expected[0]
    }


@pytest.mark.skipif(NODE is None, reason="needs node")
def test_network_in_the_page_equals_the_spec(cases):
    """Logits of every position, points and attention agree to 1e-4, with offsets and with zero offsets."""
    found = differences(cases, FIGURES / "kernel.mjs")
    assert max(found.values()) < TOLERANCE, found


WRONG = {
    "changes without their surroundings": ("const HALO = 2", "const HALO = 1"),
    "norm without epsilon": ("variance / dim + 1e-5", "variance / dim + 1e-3"),
    "offsets of the other group": ("group * share, pair, params", "0, pair, params"),
    "range twice as large": ("range: 2, heads", "range: 4, heads"),
    "window one position up": ("const pad = Math.floor((kernel - stride) / 2);", "const pad = 1;"),
    "queries instead of values": ("qkv.subarray((2 * qkv.length) / 3)", "qkv.subarray(0, qkv.length / 3)"),
    "scale of all heads": ("1 / Math.sqrt(width)", "1 / Math.sqrt(dim)"),
}


@pytest.mark.skipif(NODE is None, reason="needs node")
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_network_is_detected(cases, tmp_path, name):
    before, after = WRONG[name]
    text = (FIGURES / "kernel.mjs").read_text(encoding="utf-8")
    assert text.count(before) == 1
    (tmp_path / "kernel.mjs").write_text(text.replace(before, after), encoding="utf-8")
    assert max(differences(cases, tmp_path / "kernel.mjs").values()) > 10 * TOLERANCE

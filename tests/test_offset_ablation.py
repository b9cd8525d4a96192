"""Ablation of offsets: they are replaced, and restored afterwards."""

import pytest

torch = pytest.importorskip("torch")

from dat_ref.torch import create_model  # noqa: E402
from dat_ref.torch.offset_ablation import ablated_offsets, mean_offsets  # noqa: E402
from dat_ref.torch.offset_adapters import offset_layers  # noqa: E402


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return create_model("dat_nano", num_classes=8).eval()


def traced(model, images):
    with torch.no_grad():
        return model(images, return_trace=True)[1].stages[1].blocks[1].attention


def test_offsets_are_replaced_and_restored(model):
    assert list(offset_layers(model)) == [
        "stages.1.blocks.1.attention",
        "stages.1.blocks.3.attention",
        "stages.2.blocks.0.attention",
    ]
    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    before, means = traced(model, images), mean_offsets(model, images, batch_size=2)
    assert before.raw_offsets.abs().max() > 0
    found = {}
    for kind in ("zero", "shift", "other"):
        with ablated_offsets(model, kind, means):
            found[kind] = traced(model, images)
    torch.testing.assert_close(found["zero"].points_px, before.reference_px, rtol=0, atol=0)
    torch.testing.assert_close(found["other"].points_px, before.points_px.roll(1, 0), rtol=0, atol=0)
    mean = before.raw_offsets.mean((0, 2, 3), keepdim=True).expand_as(before.raw_offsets)
    torch.testing.assert_close(found["shift"].raw_offsets, mean)
    torch.testing.assert_close(traced(model, images).points_px, before.points_px, rtol=0, atol=0)


def test_layers_without_an_offset_network_are_left_out():
    assert offset_layers(create_model("dat_spot", attention="no_offsets")) == {}

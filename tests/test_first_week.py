"""A researcher's first week in one run: plug in the layer, fine-tune on own images, feed a detector, export, share.

Every step uses what the step before it wrote. Other tests examine the steps one by one.
"""

import importlib
import io
import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")

import dat_ref.torch as dt  # noqa: E402
from dat_ref.cli import main  # noqa: E402
from dat_ref.torch.checkpoints import save_checkpoint  # noqa: E402

SIZE = 32


class Segmenter(torch.nn.Module):
    """Own network of a user, with the layer between two convolutions."""

    def __init__(self):
        super().__init__()
        self.enter = torch.nn.Conv2d(3, 32, 3, stride=2, padding=1)
        self.attend = dt.DeformableAttention(dim=32, heads=4, groups=2, stride=4, init="zero_offset")
        self.leave = torch.nn.Conv2d(32, 2, 1)

    def forward(self, x):
        x = self.enter(x)
        return self.leave(x + self.attend(x))


def plug_in():
    """Train the user's network for a few steps at changing sizes; every parameter gets a gradient."""
    torch.manual_seed(0)
    net = Segmenter()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    losses = []
    for height, width in [(40, 56), (33, 47)] * 6:
        x = torch.rand(2, 3, height, width)
        logits = net(x)
        target = (x.mean(1)[:, ::2, ::2] > 0.5).long()
        losses.append(torch.nn.functional.cross_entropy(logits, target))
        optimizer.zero_grad()
        losses[-1].backward()
        assert all(each.grad is not None and each.grad.isfinite().all() for each in net.parameters())
        optimizer.step()
    assert losses[-1] < losses[0]
    return net


def draw_images(folder):
    """Write a folder of bright and of dark images, for training and for validation."""
    images = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    for part, count in (("train", 16), ("val", 4)):
        for name, level in (("dark", 60), ("bright", 190)):
            (folder / part / name).mkdir(parents=True)
            for index in range(count):
                values = rng.normal(level, 30, (SIZE + 8, SIZE + 16, 3)).clip(0, 255).astype(np.uint8)
                images.fromarray(values).save(folder / part / name / f"{index}.png")


def fine_tune(folder, capsys):
    """Fine-tune a checkpoint of another number of classes on the images, by the command; return the best weights."""
    draw_images(folder / "images")
    start = folder / "start.safetensors"
    save_checkpoint(dt.create_model("dat_nano", num_classes=5), start)
    command = ["train", "--model", "dat_nano", "--data", folder / "images", "--image-size", SIZE, "--epochs", 2]
    command += ["--batch-size", 8, "--workers", 0, "--quiet", "--mixup", 0, "--cutmix", 0, "--init-from", start]
    assert main([str(each) for each in [*command, "--layer-decay", 0.8, "--out", folder / "run"]]) == 0
    printed = capsys.readouterr().out
    assert "newly initialized (2):" in printed
    best = folder / "run" / "best.safetensors"
    assert main(["evaluate", str(best)]) == 0
    assert "held out, 8 images: 100.0 % right" in capsys.readouterr().out
    return best


def detect(best):
    """Read maps for a detector from the tuned weights, at a size that is no multiple of the stride."""
    backbone = dt.create_model("dat_nano", checkpoint=best, num_classes=2, features_only=True)
    maps = backbone(torch.rand(2, 3, 45, 61))
    channels, strides = backbone.feature_info.channels(), backbone.feature_info.reduction()
    assert [each.shape[1] for each in maps] == channels
    assert [each.shape[2:] for each in maps] == [(-(-45 // stride), -(-61 // stride)) for stride in strides]
    return backbone.eval()


def export(backbone):
    """Export the backbone, save and load the program, and compare; the same for ONNX if it is installed."""
    x = torch.rand(1, 3, 45, 61)
    expected = backbone(x)
    file = io.BytesIO()
    torch.export.save(torch.export.export(backbone, (x,)), file)
    file.seek(0)
    for ours, theirs in zip(torch.export.load(file).module()(x), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    if importlib.util.find_spec("onnxruntime") is None:
        return
    proto = io.BytesIO()
    torch.onnx.export(backbone, (x,), proto, dynamo=False)
    session = importlib.import_module("onnxruntime").InferenceSession(proto.getvalue())
    for ours, theirs in zip(session.run(None, {session.get_inputs()[0].name: x.numpy()}), expected, strict=True):
        np.testing.assert_allclose(ours, theirs.detach(), rtol=0, atol=1e-4)


def share(best, folder):
    """Save the tuned model as for the Hugging Face Hub, and load it from the folder."""
    pytest.importorskip("huggingface_hub")
    hub = importlib.import_module("dat_ref.torch.hub")
    model = hub.HubDAT.from_model(dt.create_model("dat_nano", num_classes=2, checkpoint=best))
    model.save_pretrained(folder / "hub")
    x = torch.rand(1, 3, SIZE, SIZE)
    assert torch.equal(hub.HubDAT.from_pretrained(folder / "hub").eval()(x), model.eval()(x))
    assert json.loads((folder / "hub" / "config.json").read_text(encoding="utf-8"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the older ONNX exporter
@pytest.mark.filterwarnings("ignore:Constant folding:UserWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_first_week(tmp_path, capsys):
    """Plug in, diagnose, fine-tune, detect, export and share, each with what was made before."""
    net = plug_in()
    report = dt.offset_report(net, torch.rand(2, 3, 40, 56))
    assert [layer.name for layer in report.layers] == ["attend"]
    best = fine_tune(tmp_path, capsys)
    export(detect(best))
    share(best, tmp_path)

"""Models rewritten for inference: the same outputs within the error budget, errors for unsupported models."""

import copy
import pickle
import re

import pytest

torch = pytest.importorskip("torch")
from helpers.agreement import assert_within_budget  # noqa: E402
from helpers.backbones import RELEASES, tiny  # noqa: E402
from helpers.tensors import rejects, seeds  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from torch import nn  # noqa: E402

import dat_ref.torch as dt  # noqa: E402
from dat_ref import DATConfig, DeformableAttentionConfig  # noqa: E402
from dat_ref.peers.matching import replace_attention  # noqa: E402
from dat_ref.torch import inference  # noqa: E402
from dat_ref.torch.inference import PackedLinear, optimize_for_inference  # noqa: E402

if inference.unsupported_reason(nn.Linear(2, 2)):
    pytest.skip("torch has no packed products on this machine", allow_module_level=True)


def random_model(config: DATConfig, seed: int, kind: type[dt.DAT] = dt.DAT) -> dt.DAT:
    """Return a backbone with random parameters, so that no factor is 1 and no bias 0."""
    torch.manual_seed(seed)
    model = kind(config).eval()
    with torch.no_grad():
        for leaf in model.parameters():
            leaf += 0.1 * torch.randn_like(leaf)
    return model


@pytest.fixture(scope="module", params=RELEASES)
def model(request):
    return random_model(tiny(request.param), 0)


def outputs(model, x):
    with torch.no_grad():
        return model(x)


def assert_as_good(fast, model, x):
    """Raise unless a rewritten model is about as accurate as the original, measured against float64."""
    truth = outputs(copy.deepcopy(model).double(), x.double())
    got, plain = (outputs(each, x) for each in (fast, model))
    assert got.dtype == plain.dtype == x.dtype
    assert_within_budget(got.float().numpy(), truth.numpy(), plain.float().numpy())


# ------------------------------------------------------------------------------------------------ the same outputs


@settings(max_examples=8)
@given(st.sampled_from(list(RELEASES)), st.integers(1, 3), st.integers(33, 131), st.integers(33, 131), seeds)
def test_any_size_gives_the_same(release, batch, height, width, seed):
    model = random_model(tiny(release), seed)
    fast = optimize_for_inference(model)
    for size in ((height, width), (width, height)):
        assert_as_good(fast, model, torch.randn(batch, 3, *size))


@pytest.mark.parametrize("kernels", [True, False])
def test_whole_windows_are_the_core_with_its_points_on_pixels(kernels):
    """Whole windows run in the core's kernels where available, otherwise in torch's attention."""
    model = random_model(tiny("cvpr2022"), 4)
    fast = optimize_for_inference(model)
    windows = [module for module in fast.modules() if isinstance(module, inference.FastWindowAttention)]
    assert len(windows) == 4
    for each in windows:
        each.kernels = kernels and each.kernels
    assert_as_good(fast, model, torch.randn(2, 3, 96, 144))
    if kernels and windows[0].kernels:
        windows[0].pixels = windows[0].pixels.flip(-1)
        assert rejects(lambda: assert_as_good(fast, model, torch.randn(2, 3, 96, 144)))


@pytest.mark.parametrize("release", RELEASES)
def test_half_precision_gives_the_same(release):
    if not inference._supports_packing(torch.bfloat16):
        pytest.skip("no packed products in bfloat16 on this machine")
    model = random_model(tiny(release), 1).to(torch.bfloat16)
    assert_as_good(optimize_for_inference(model), model, torch.randn(2, 3, 67, 98).to(torch.bfloat16))


def test_a_wrong_rewriting_is_detected(model):
    """A layer scale folded twice, an identity left out, a GELU left out."""
    x = torch.randn(2, 3, 67, 98)
    assert_as_good(optimize_for_inference(model), model, x)

    def broken(change):
        fast = optimize_for_inference(model)
        with torch.no_grad():
            change(fast.stages[1].blocks[0])
        return rejects(lambda: assert_as_good(fast, model, x))

    def no_gelu(block):
        block.mlp.linear1.activation = "none" if block.mlp.depthwise is None else "gelu"

    def other_bias(block):
        block.mlp.linear2.bias *= 1.001

    def no_identity(block):
        conv = block.local_perception
        other_bias(block) if conv is None else conv.weight[:, :, 1, 1].sub_(1)

    assert all(map(broken, (no_gelu, other_bias, no_identity)))


def test_chunks_of_a_batch_make_no_difference(model, monkeypatch):
    x = torch.randn(5, 3, 67, 98)
    fast = optimize_for_inference(model)
    whole = outputs(fast, x)
    monkeypatch.setattr(inference, "_HIDDEN_BYTES", 1)
    torch.testing.assert_close(outputs(fast, x), whole, rtol=1e-5, atol=1e-6)


def test_an_empty_batch(model):
    assert outputs(optimize_for_inference(model), torch.randn(0, 3, 64, 96)).shape == (0, 5)


@pytest.mark.parametrize("release", RELEASES)
def test_features(release):
    model = random_model(tiny(release), 2, dt.DATFeatures)
    model.keep_stages([1, 3])
    model.eval()
    x = torch.randn(1, 3, 67, 98)
    for got, expected in zip(outputs(optimize_for_inference(model), x), outputs(model, x), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_every_released_projection_is_packed():
    """Only the head and the last layer of the offset networks (float32 or wider) are not packed."""
    fast = optimize_for_inference(dt.create_model("dat_pp_tiny", num_classes=10).eval())
    left = {name.rpartition(".")[2] for name, module in fast.named_modules() if isinstance(module, nn.Linear)}
    assert left == {"head", "pointwise"}
    assert sum(isinstance(module, PackedLinear) for module in fast.modules()) == 12 * 2 + 14 * 4 + 26 * 2


def test_a_layer_in_another_network_shared_by_two_names():
    torch.manual_seed(0)
    layer = dt.DeformableAttention(DeformableAttentionConfig(dim=12, heads=4, groups=2, size=(5, 7)))
    net = nn.ModuleDict({"one": layer, "other": layer, "own": nn.Sequential(nn.Linear(12, 12))}).eval()
    fast = optimize_for_inference(net)
    assert fast["one"] is fast["other"]
    assert type(fast["own"][0]) is nn.Linear
    x = torch.randn(2, 12, 9, 6)
    torch.testing.assert_close(outputs(fast["one"], x), outputs(layer, x), rtol=1e-5, atol=1e-6)
    _, trace = fast["one"](x, return_trace=True)
    assert trace.points.shape == (2, 2, 9, 6, 2)


@pytest.mark.parametrize(
    "attention", ["multi_head", "pyramid", "deform_conv", "ms_deform", "per_query", "neighborhood"]
)
def test_other_attentions_in_its_place(attention):
    model = random_model(replace_attention(tiny("cvpr2022"), attention), 3)
    x = torch.randn(1, 3, 67, 98)
    torch.testing.assert_close(outputs(optimize_for_inference(model), x), outputs(model, x), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------ copies


def test_the_model_is_left_as_it_was(model):
    before = {name: leaf.clone() for name, leaf in model.state_dict().items()}
    x = torch.randn(1, 3, 67, 98)
    expected = outputs(model, x)
    outputs(optimize_for_inference(model), x)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(leaf, before[name]) for name, leaf in model.state_dict().items())
    assert all(leaf.requires_grad for leaf in model.parameters())
    assert torch.equal(outputs(model, x), expected)


def test_a_copy_and_a_pickle_give_the_same(model):
    fast = optimize_for_inference(model)
    x = torch.randn(1, 3, 67, 98)
    for again in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert torch.equal(outputs(again, x), outputs(fast, x))


# ------------------------------------------------------------------------------------------------ errors


def test_a_training_model_is_refused(model):
    with pytest.raises(ValueError, match=r"model: expected eval mode.*model\.eval\(\)"):
        optimize_for_inference(copy.deepcopy(model).train())


@pytest.mark.parametrize(
    ("what", "attempt"),
    [
        ("trained", lambda fast, x: fast.train()),
        ("move or cast", lambda fast, x: fast.double()),
        ("save", lambda fast, x: fast.state_dict()),
        ("gradients", lambda fast, x: fast(x.requires_grad_())),
        ("trace", lambda fast, x: fast(x, return_trace=True)),
    ],
)
def test_unsupported_models_are_rejected(model, what, attempt):
    fast = optimize_for_inference(model)
    with pytest.raises(RuntimeError, match=re.escape(what)):
        attempt(fast, torch.randn(1, 3, 64, 96))


def test_compiler_is_refused():
    torch._dynamo.reset()
    layer = torch.compile(PackedLinear(nn.Linear(3, 5)), backend="eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="compile or export the original model"):
        layer(torch.randn(2, 3))


@pytest.mark.parametrize("obstacle", ["float64", "no oneDNN", "no operator", "another device"])
def test_unsupported_model_is_copied_with_a_warning(model, obstacle, monkeypatch):
    model = copy.deepcopy(model)
    expected = "torch.float64" if obstacle == "float64" else "oneDNN"
    if obstacle == "float64":
        model.double()
    elif obstacle == "no oneDNN":
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    elif obstacle == "no operator":
        monkeypatch.setattr(inference, "_OPERATORS", ("_no_such_operator",))
        expected = "no packed linear layers"
    else:
        model.to("meta")
        expected = "weights are on meta"
    with pytest.warns(UserWarning, match=f"optimize_for_inference: .*{expected}.*returning an unoptimized copy"):
        same = optimize_for_inference(model)
    assert same is not model
    assert same.state_dict().keys() == model.state_dict().keys()

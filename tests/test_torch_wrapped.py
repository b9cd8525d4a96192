"""Tools that wrap layers (hooks, pruning, weight normalization, adapters) on every torch module of the package."""

import copy

import pytest
from helpers.backbones import tiny

torch = pytest.importorskip("torch")
from helpers.torch_peers import CONFIGS  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.utils import parametrizations, prune  # noqa: E402

import dat_ref.torch as dt  # noqa: E402
from dat_ref import BiasKind, BlockConfig, Convention, DeformableAttentionConfig, OffsetBound  # noqa: E402
from dat_ref.torch.block import attention_module  # noqa: E402

SIZE = (4, 6)
IMAGE = (3, 32, 64)


def deformable(**options):
    config = {"dim": 12, "heads": 4, "groups": 2, "stride": 2, "kernel_size": 3, "size": SIZE, **options}
    return DeformableAttentionConfig(**config)


LAYERS = {
    **{f"bias_{kind.name.lower()}": deformable(bias=kind) for kind in BiasKind},
    **{convention.name.lower(): deformable(convention=convention) for convention in Convention},
    "one_group": deformable(groups=1),
    "no_offsets": deformable(offset_bound=OffsetBound.NONE),
    **CONFIGS,
}
MODELS = {
    "released_2022": tiny("cvpr2022"),
    "released_2023": tiny("datpp2023"),
}


def build(name):
    """Return a module in training mode and an input for it."""
    torch.manual_seed(0)
    if name in MODELS:
        return dt.DAT(MODELS[name]), torch.randn(2, *IMAGE)
    if name == "features":
        model = dt.DATFeatures(MODELS["released_2023"])
        model.keep_stages((0, 2))
        return model, torch.randn(2, *IMAGE)
    if name == "block":
        config = BlockConfig(deformable(), local_perception=True, mlp="depthwise_residual", layer_scale=0.1)
        return dt.Block(config), torch.randn(2, 12, *SIZE)
    config = LAYERS[name]
    module = attention_module(config)
    # Initially zero weights would hide that a layer is called, and stop gradients.
    for leaf in module.parameters():
        nn.init.normal_(leaf, std=0.3)
    return module, torch.randn(2, config.dim, *SIZE)


NAMES = [*LAYERS, *MODELS, "features", "block"]
every_module = pytest.mark.parametrize("name", NAMES)


def loss_of(output):
    """Return a loss that every element of the output changes."""
    parts = output if isinstance(output, list) else [output]
    return sum(((part - 0.3) ** 2).mean() for part in parts)


def uncalled(module, *inputs, **options):
    """Return the names of the submodules with parameters of their own that a forward pass does not call."""
    owners = {name: each for name, each in module.named_modules() if any(True for _ in each.parameters(recurse=False))}
    called, handles = set(), []
    for name, each in owners.items():
        handles.append(each.register_forward_hook(lambda *_, name=name: called.add(name)))
    module(*inputs, **options)
    for handle in handles:
        handle.remove()
    return sorted(owners.keys() - called)


def layers_of(module):
    """Return the linear layers and convolutions of a module, by name."""
    return {name: each for name, each in module.named_modules() if isinstance(each, (nn.Linear, nn.Conv2d))}


class Reader(nn.Module):
    """Module that reads the weight of its layer."""

    def __init__(self):
        super().__init__()
        self.read, self.called = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        return nn.functional.linear(self.called(x), self.read.weight)


# ------------------------------------------------------------------------------------------------ hooks


@every_module
@pytest.mark.parametrize("training", [True, False])
def test_every_layer_is_called(name, training):
    module, x = build(name)
    module.train(training)
    assert uncalled(module, x) == []
    if name != "features":
        assert uncalled(module, x, return_trace=True) == []


def test_layers_of_an_optimized_model_are_called():
    model, x = build("released_2023")
    with torch.no_grad():
        assert uncalled(dt.optimize_for_inference(model.eval()), x) == []


def test_a_layer_that_is_read_is_found():
    assert uncalled(Reader(), torch.ones(2, 3)) == ["read"]


# ------------------------------------------------------------------------------------------------ wrapped weights


def prune_weight(layer):
    prune.l1_unstructured(layer, "weight", amount=0.2)


WRAPS = {
    "prune": (prune_weight, "weight_orig"),
    "weight_norm": (torch.nn.utils.weight_norm, "weight_v"),
    "spectral_norm": (parametrizations.spectral_norm, "parametrizations.weight.original"),
}


@every_module
@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_two_training_steps_with_wrapped_weights(name, wrap):
    module, x = build(name)
    apply, underlying = WRAPS[wrap]
    names = list(layers_of(module))
    for each in names:
        apply(module.get_submodule(each))
    leaves = {each: dict(module.get_submodule(each).named_parameters())[underlying] for each in names}
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(module(x)).backward()
        for each, leaf in leaves.items():
            assert leaf.grad is not None, each
            assert leaf.grad.isfinite().all(), each
        optimizer.step()
    assert [each for each, leaf in leaves.items() if not leaf.grad.any()] == []


def test_a_layer_that_is_read_fails_at_the_second_step():
    module = Reader()
    prune_weight(module.read)
    loss_of(module(torch.ones(2, 3))).backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss_of(module(torch.ones(2, 3))).backward()


@every_module
def test_weights_loaded_into_a_pruned_module_have_effect(name):
    module, x = build(name)
    other = copy.deepcopy(module)
    for each in layers_of(module):
        for part in (module, other):
            prune_weight(part.get_submodule(each))
    with torch.no_grad():
        for leaf in other.parameters():
            leaf.mul_(1.5)
    module.eval(), other.eval()
    before = loss_of(module(x))
    module.load_state_dict(other.state_dict())
    assert torch.equal(loss_of(module(x)), loss_of(other(x)))
    assert loss_of(module(x)) != before


# ------------------------------------------------------------------------------------------------ adapters


class Adapter(nn.Module):
    """Low-rank adapter around a linear layer or a convolution (LoRA)."""

    def __init__(self, layer, rank=2):
        super().__init__()
        self.layer = layer.requires_grad_(False)
        if isinstance(layer, nn.Linear):
            self.down = nn.Linear(layer.in_features, rank, bias=False)
            self.up = nn.Linear(rank, layer.out_features, bias=False)
        else:
            geometry = (layer.kernel_size, layer.stride, layer.padding)
            self.down = nn.Conv2d(layer.in_channels, rank, *geometry, bias=False)
            self.up = nn.Conv2d(rank, layer.out_channels, 1, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.layer(x) + self.up(self.down(x))


@every_module
def test_adapters_change_the_output_and_train(name):
    module, x = build(name)
    for leaf in module.buffers():
        leaf.requires_grad_(False)
    module.eval()
    plain = loss_of(module(x)).item()
    names = list(layers_of(module))
    for each in names:
        parent, _, child = each.rpartition(".")
        setattr(module.get_submodule(parent), child, Adapter(module.get_submodule(each)))
    assert loss_of(module(x)).item() == pytest.approx(plain, rel=1e-5)
    for each in names:
        adapter = module.get_submodule(each)
        nn.init.normal_(adapter.up.weight, std=0.3)
        assert loss_of(module(x)).item() != plain, each
        nn.init.zeros_(adapter.up.weight)
    for each in names:
        nn.init.normal_(module.get_submodule(each).up.weight, std=0.1)
    loss_of(module(x)).backward()
    for each in names:
        adapter = module.get_submodule(each)
        for leaf in (adapter.up.weight, adapter.down.weight):
            assert leaf.grad is not None, each
            assert leaf.grad.isfinite().all(), each
            assert leaf.grad.any(), each


@pytest.mark.filterwarnings("ignore:.*quant.*")
def test_dynamic_quantization_runs():
    model, x = build("released_2023")
    quantized = torch.ao.quantization.quantize_dynamic(model.eval(), {nn.Linear}, dtype=torch.qint8)
    assert isinstance(quantized.head, torch.ao.nn.quantized.dynamic.Linear)
    assert (quantized(x) - model(x)).abs().max() < 0.1 * model(x).abs().max()

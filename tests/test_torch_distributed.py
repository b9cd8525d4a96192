"""Two processes that share a batch or the weights: the same step as one process, every layer sharded on its own."""

import pytest

torch = pytest.importorskip("torch")
from helpers.backbones import RELEASES, tiny  # noqa: E402
from helpers.processes import torchrun  # noqa: E402

import dat_ref.torch as dt  # noqa: E402

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="needs gloo"
)

# Script for `torchrun`. It reads a job {config, state, images, labels} and writes the final state of rank 0.
TRAIN = """
import sys

import torch
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import dat_ref.torch as dt
from dat_ref.torch.train import init_distributed


def train(model, images, labels):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        cross_entropy(model(images), labels).backward()
        optimizer.step()


def main(context):
    jobs, done = torch.load(sys.argv[1], weights_only=False), []
    for job in jobs:
        torch.manual_seed(context.rank)  # every process starts elsewhere; DDP spreads the state of the first
        model = dt.DAT(job["config"]).double()
        if context.is_main:
            model.load_state_dict(job["state"])
        local = slice(context.rank, None, context.world_size)
        train(DistributedDataParallel(model), job["images"][local], job["labels"][local])
        done.append(model.state_dict())
    if context.is_main:
        torch.save({"world": context.world_size, "states": done}, sys.argv[2])


if __name__ == "__main__":
    with init_distributed() as context:
        main(context)
"""


def job(release, seed):
    """Return a job: a small backbone of a release, without stochastic depth, and a batch."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    config = tiny(release, drop_path_rate=0.0)
    return {
        "config": config,
        "state": dt.DAT(config).double().state_dict(),
        "images": torch.randn(4, 3, 64, 96, generator=generator, dtype=torch.float64),
        "labels": torch.randint(5, (4,), generator=generator),
    }


def test_two_processes_take_the_step_of_one(tmp_path):
    script, jobs_file, done_file = tmp_path / "train.py", tmp_path / "jobs.pt", tmp_path / "done.pt"
    script.write_text(TRAIN)
    jobs = [job(release, seed) for seed, release in enumerate(RELEASES)]
    torch.save(jobs, jobs_file)
    torchrun(script, jobs_file, done_file)
    done = torch.load(done_file, weights_only=True)
    assert done["world"] == 2

    program = {"__name__": "train"}
    exec(compile(TRAIN, str(script), "exec"), program)
    for each, shared in zip(jobs, done["states"], strict=True):
        model = dt.DAT(each["config"]).double()
        model.load_state_dict(each["state"])
        program["train"](model, each["images"], each["labels"])
        moved = 0.0
        for name, alone in model.state_dict().items():
            assert (shared[name] - alone).abs().max() <= 1e-11, name
            moved = max(moved, float((alone - each["state"][name]).abs().max()))
        assert moved > 1e-3  # the weights have changed


# Script for `torchrun`: every layer is sharded on its own, so that its weights are whole only while it is called.
SHARD = """
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

import dat_ref.torch as dt
from dat_ref.torch.train import init_distributed

LAYERS = (nn.Linear, nn.Conv2d, nn.LayerNorm)
with init_distributed() as context:
    for config in torch.load({configs!r}, weights_only=False):
        torch.manual_seed(0)
        model = dt.DAT(config)
        for layer in [each for each in model.modules() if isinstance(each, LAYERS)] + [model]:
            fully_shard(layer, mesh=torch.distributed.init_device_mesh("cpu", (context.world_size,)))
        model(torch.randn(2, 3, 67, 98)).square().mean().backward()
        assert all(leaf.grad is None or leaf.grad.full_tensor().isfinite().all() for leaf in model.parameters())
"""


@pytest.mark.slow
def test_every_layer_can_be_sharded_on_its_own(tmp_path):
    """A weight that is read without calling its layer would be a DTensor among tensors."""
    torch.save([tiny(release) for release in RELEASES], tmp_path / "configs.pt")
    script = tmp_path / "shard.py"
    script.write_text(SHARD.format(configs=str(tmp_path / "configs.pt")), encoding="utf-8")
    torchrun(script)

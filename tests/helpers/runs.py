"""A tiny training run: a few seconds at most, with every source of randomness."""

import sys
from pathlib import Path

import numpy as np
import torch

from dat_ref.config import BlockConfig, DATConfig, DeformableAttentionConfig
from dat_ref.torch import DAT
from dat_ref.torch.train import DistributedContext, fit, init_distributed
from dat_ref.train_config import TrainConfig

CONFIG = TrainConfig(image_size=32, epochs=3, batch_size=4, warmup_epochs=1, drop_path=0.4, ema=0.5, save_every=2)
TWICE = TrainConfig(image_size=32, epochs=2, batch_size=5, warmup_epochs=1, ema=0.5)


class Noise:
    """Eleven random images and their labels, drawn from (epoch, number)."""

    classes, multi = ("a", "b", "c"), False

    def __init__(self, length=11, dtype=torch.float32):
        self.length, self.dtype, self.epoch, self.requested = length, dtype, 0, []

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return self.length

    def __getitem__(self, number):
        if not 0 <= number < self.length:
            raise IndexError
        self.requested.append(number)
        generator = np.random.default_rng([self.epoch, number])
        return torch.from_numpy(generator.standard_normal((3, 32, 32))).to(self.dtype), torch.tensor(number % 3)


def tiny_model(drop_path=0.0, dtype=torch.float32):
    torch.manual_seed(3)
    attention = DeformableAttentionConfig(8, 2, groups=2, stride=2, kernel_size=3, size=(8, 8))
    blocks = (BlockConfig(attention), BlockConfig(attention))
    return DAT(DATConfig((blocks,), num_classes=3, image_size=(32, 32), drop_path_rate=drop_path)).to(dtype)


def run(folder, config=CONFIG, **options):
    return fit(config, Noise(), Noise(7), folder, model=tiny_model(config.drop_path), quiet=True, **options)


def two_processes(folder):
    """Train in double precision without stochastic depth; the entry point of `torchrun`."""
    with init_distributed() as context:
        result = fit(
            TWICE,
            Noise(11, torch.float64),
            Noise(7, torch.float64),
            folder,
            model=tiny_model(dtype=torch.float64),
            context=DistributedContext(context.rank, context.world_size),
            quiet=True,
        )
        if context.is_main:
            weights = {name: leaf.detach() for name, leaf in result.model.named_parameters()}
            torch.save({"weights": weights, "images": result.scores.images}, Path(folder) / "left.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    two_processes(sys.argv[1])

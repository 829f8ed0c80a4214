"""The GAN loop that tutorials show, to race against. With its switches it becomes, one by one, what distgan does.

    python benchmarks/textbook.py --architecture dcgan --width 32 [--no-item] [--frozen] …

Without switches: a DataLoader with two workers that turns PIL images into tensors; BCE on a sigmoid; three backward
passes, of which G's computes D's gradients too; `.item()` for each loss at each step; Adam as it is.
"""

import argparse
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy, softplus
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from distgan import models
from distgan.models import ImageSpec
from distgan.recipe import ModelConfig

sys.path.insert(0, str(Path(__file__).parent))
from turns import tick


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="where FashionMNIST/raw is")
    parser.add_argument("--architecture", choices=["dcgan", "resnet"], default="dcgan")
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--bf16", action="store_true", help="autocast both networks")
    parser.add_argument("--in-memory", action="store_true", help="images are one tensor, and no DataLoader")
    parser.add_argument("--no-item", action="store_true", help="losses are added up, and not read")
    parser.add_argument("--logits", action="store_true", help="softplus of logits instead of BCE of a sigmoid")
    parser.add_argument("--one-backward", action="store_true", help="D's two losses are added before the backward pass")
    parser.add_argument("--frozen", action="store_true", help="G's step computes no gradients of D's weights")
    parser.add_argument("--fused", action="store_true", help="Adam is fused")
    parser.add_argument("--channels-last", action="store_true", help="weights and images are channels_last")
    options = parser.parse_args()
    norm = "batch" if options.architecture == "dcgan" else "spectral"
    model = ModelConfig(
        architecture=options.architecture, width=options.width, d_width=options.width, latent_dim=100, d_norm=norm
    )
    G, D = models.build(model, ImageSpec(image_size=32, channels=1), seed=0)
    if options.channels_last:
        G, D = G.to(memory_format=torch.channels_last), D.to(memory_format=torch.channels_last)
    adam_G, adam_D = (
        torch.optim.Adam(network.parameters(), lr=2e-4, betas=(0.5, 0.999), fused=options.fused or None)
        for network in (G, D)
    )
    train(options, G, D, adam_G, adam_D)


def train(
    options: argparse.Namespace, G: nn.Module, D: nn.Module, adam_G: torch.optim.Adam, adam_D: torch.optim.Adam
) -> None:
    precise = torch.autocast("cpu", torch.bfloat16, enabled=options.bf16)
    real_label, fake_label = torch.ones(options.batch), torch.zeros(options.batch)
    seen = torch.zeros(3)

    def judged(images: Tensor, wanted: Tensor) -> Tensor:
        with precise:
            logits = D(images)
        if options.logits:
            return softplus(logits.float() * (1 - 2 * wanted)).mean()
        return binary_cross_entropy(torch.sigmoid(logits.float()), wanted)

    for step, real in enumerate(batches(options), start=1):
        z = torch.randn(options.batch, 100)
        D.zero_grad()
        loss_real = judged(real, real_label)
        if not options.one_backward:
            loss_real.backward()
        with precise:
            fake = G(z).float()
        loss_fake = judged(fake.detach(), fake_label)
        (loss_real + loss_fake if options.one_backward else loss_fake).backward()
        adam_D.step()
        models.constrain(D)
        G.zero_grad()
        D.requires_grad_(not options.frozen)
        loss_G = judged(fake, real_label)
        loss_G.backward()
        D.requires_grad_(True)
        adam_G.step()
        if options.no_item:
            seen += torch.stack([loss_real.detach(), loss_fake.detach(), loss_G.detach()])
        else:
            print(f"D {loss_real.item() + loss_fake.item():.3f} G {loss_G.item():.3f}")
        tick(step)


def batches(options: argparse.Namespace) -> Iterator[Tensor]:
    """Endless shuffled batches of Fashion-MNIST, (batch, 1, 32, 32) in [-1, 1], some of them mirrored."""
    steps = [
        transforms.Resize(32),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(0.5, 0.5),
    ]
    dataset = datasets.FashionMNIST(options.data, train=True, transform=transforms.Compose(steps))
    if options.in_memory:
        images = torch.nn.functional.interpolate(dataset.data[:, None].float() / 127.5 - 1, 32).mul(127).to(torch.int8)
        for _ in itertools.count():
            for index in torch.randperm(len(images)).split(options.batch)[:-1]:
                yield images[index].float() / 127
    loader = DataLoader(dataset, options.batch, shuffle=True, drop_last=True, num_workers=2, persistent_workers=True)
    for _ in itertools.count():
        yield from (batch for batch, _ in loader)


if __name__ == "__main__":
    main()

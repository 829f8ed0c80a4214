"""The GAN loop that tutorials show, to race against. With its switches it becomes, one by one, what distgan does.

    python benchmarks/textbook.py --architecture dcgan --width 32 [--no-item] [--frozen] …

Without switches: a DataLoader with two workers that turns PIL images into tensors; BCE on a sigmoid; three backward
passes, of which G's computes D's gradients too; `.item()` for each loss at each step; Adam with its defaults.
"""

import argparse
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, binary_cross_entropy, interpolate, relu, softplus
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

sys.path.insert(0, str(Path(__file__).parent))
from turns import tick


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="where FashionMNIST/raw is")
    parser.add_argument("--architecture", choices=["dcgan", "resnet"], default="dcgan")
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--bf16", action="store_true", help="autocast both networks")
    parser.add_argument("--betas", type=float, nargs=2, default=(0.5, 0.999), help="Adam's (default: 0.5 0.999)")
    parser.add_argument("--no-flip", action="store_true", help="images are not mirrored")
    parser.add_argument("--seed", type=int, default=0, help="torch's seed")
    parser.add_argument("--steps", type=int, help="end after this many steps (default: never)")
    parser.add_argument("--generator", type=Path, help="where to save the generator at the end, for `distgan import`")
    parser.add_argument("--in-memory", action="store_true", help="images are one tensor, and no DataLoader")
    parser.add_argument("--no-item", action="store_true", help="losses are added up, and not read")
    parser.add_argument("--logits", action="store_true", help="softplus of logits instead of BCE of a sigmoid")
    parser.add_argument("--one-backward", action="store_true", help="D's two losses are added before the backward pass")
    parser.add_argument("--frozen", action="store_true", help="G's step computes no gradients of D's weights")
    parser.add_argument("--fused", action="store_true", help="Adam is fused")
    parser.add_argument("--channels-last", action="store_true", help="weights and images are channels_last")
    options = parser.parse_args()
    torch.manual_seed(options.seed)  # noqa: TID251  # as the tutorial does
    build = dcgan if options.architecture == "dcgan" else resnet
    G, D = build(options.width)
    if options.channels_last:
        G, D = G.to(memory_format=torch.channels_last), D.to(memory_format=torch.channels_last)
    adam_G, adam_D = (
        torch.optim.Adam(network.parameters(), lr=2e-4, betas=tuple(options.betas), fused=options.fused or None)
        for network in (G, D)
    )
    train(options, G, D, adam_G, adam_D)
    if options.generator:  # the tutorial has no Unflatten in front, so its layers have numbers that are smaller by 1
        layers = ((name.split(".", 1), tensor) for name, tensor in G.state_dict().items())
        saved = {f"main.{int(number) - 1}.{name}": tensor for (number, name), tensor in layers}
        torch.save(saved, options.generator)  # noqa: TID251  # as the tutorial does


def dcgan(width: int) -> tuple[nn.Module, nn.Module]:
    """DCGAN for grey images of 32x32, as in PyTorch's tutorial, with a stage less."""
    w = width
    G = [nn.Unflatten(1, (100, 1, 1)), nn.ConvTranspose2d(100, 4 * w, 4, 1, 0, bias=False)]
    for before, after in ((4 * w, 2 * w), (2 * w, w), (w, 1)):
        G += [nn.BatchNorm2d(before), nn.ReLU(True), nn.ConvTranspose2d(before, after, 4, 2, 1, bias=False)]
    D = [nn.Conv2d(1, w, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, True)]
    for before, after in ((w, 2 * w), (2 * w, 4 * w)):
        D += [nn.Conv2d(before, after, 4, 2, 1, bias=False), nn.BatchNorm2d(after), nn.LeakyReLU(0.2, True)]
    D += [nn.Conv2d(4 * w, 1, 4, 1, 0, bias=False), nn.Flatten(0)]
    return nn.Sequential(*G, nn.Tanh()).apply(draw_weights), nn.Sequential(*D).apply(draw_weights)


def draw_weights(layer: nn.Module) -> None:
    """The tutorial's weights: N(0, 0.02) for convolutions, N(1, 0.02) for batch norm's scales."""
    if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(layer.weight, 0, 0.02)
    elif isinstance(layer, nn.BatchNorm2d):
        nn.init.normal_(layer.weight, 1, 0.02)


class Block(nn.Module):
    """SNGAN's residual block: twice the size (`up`), half of it, or the same."""

    def __init__(self, before: int, after: int, *, up: bool = False, down: bool = False, first: bool = False) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.BatchNorm2d(before), nn.BatchNorm2d(after)] if up else [])
        self.convs = nn.ModuleList([nn.Conv2d(before, after, 3, 1, 1), nn.Conv2d(after, after, 3, 1, 1)])
        self.shortcut = nn.Conv2d(before, after, 1) if up or down else nn.Identity()
        self.up, self.down, self.first = up, down, first

    def forward(self, x: Tensor) -> Tensor:
        h, short = x, interpolate(x, scale_factor=2) if self.up else x
        for i, conv in enumerate(self.convs):
            h = self.norms[i](h) if self.up else h
            h = h if self.first and i == 0 else relu(h)
            h = interpolate(h, scale_factor=2) if self.up and i == 0 else h
            h = conv(h)
        short = self.shortcut(short)
        return avg_pool2d(h, 2) + avg_pool2d(short, 2) if self.down else h + short


def resnet(width: int) -> tuple[nn.Module, nn.Module]:
    """SNGAN's residual networks for grey images of 32x32, with torch's own spectral norm."""
    w = width
    G = [nn.Linear(100, 16 * w), nn.Unflatten(1, (w, 4, 4)), *(Block(w, w, up=True) for _ in range(3))]
    G += [nn.BatchNorm2d(w), nn.ReLU(True), nn.Conv2d(w, 1, 3, 1, 1), nn.Tanh()]
    D = [Block(1, w, down=True, first=True), Block(w, w, down=True), Block(w, w), Block(w, w), nn.ReLU(True)]
    D += [nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(w, 1), nn.Flatten(0)]
    discriminator = nn.Sequential(*D)
    for layer in list(discriminator.modules()):
        if isinstance(layer, nn.Conv2d | nn.Linear):
            spectral_norm(layer)
    return nn.Sequential(*G), discriminator


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
        if options.channels_last:
            real = real.to(memory_format=torch.channels_last)
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
        if step == options.steps:
            return


def batches(options: argparse.Namespace) -> Iterator[Tensor]:
    """Endless shuffled batches of Fashion-MNIST, (batch, 1, 32, 32) in [-1, 1]; a DataLoader mirrors some."""
    mirror = [] if options.no_flip else [transforms.RandomHorizontalFlip()]
    steps = [transforms.Resize(32), *mirror, transforms.ToTensor(), transforms.Normalize(0.5, 0.5)]
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

"""Trains the classifier, the extractor that needs no download.

Everything about the training is fixed, so that the weights depend only on the images, the labels and the kind of
processor.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from distgan import seeding
from distgan.evaluation.extractors import Classifier
from distgan.progress import shown

PROCEDURE = 1
"""A version number. Raise it when a change here or in the network changes the weights."""

_BATCH = 128
_EPOCHS = 5
_STEPS = 400  # at least
_LR = 4e-3
_SEED = 0


def train(pixels: Tensor, labels: Tensor, *, classes: int) -> tuple[Classifier, float]:
    """Trains on nine tenths of the images; returns the network and its accuracy on the other tenth, which it never saw.

    It always runs on one CPU thread, because the bits depend on the number of threads. Adam with a one-cycle schedule
    (Smith and Topin 2018, in PyTorch's version), batches of 128, for 5 epochs or 400 steps, whichever is more.

    Args:
        pixels: uint8 (N, C, H, W).
        labels: int64 (N,); -1 for an image without a label.
        classes: the number of classes.
    """
    labelled = torch.nonzero(labels >= 0).flatten()
    shuffled = labelled[torch.from_numpy(seeding.generator(_SEED, "classifier.held_out").permutation(len(labelled)))]
    held_out, kept = shuffled[: len(shuffled) // 10], shuffled[len(shuffled) // 10 :]
    _, channels, height, width = pixels.shape
    network = Classifier(size=(height, width), channels=channels, classes=classes)
    steps = max(_STEPS, _EPOCHS * len(kept) // _BATCH)

    def batch(step: int) -> tuple[Tensor, Tensor]:
        chosen = kept[seeding.order(_SEED, step * _BATCH, _BATCH, total=len(kept))]
        return pixels[chosen], labels[chosen]

    with _one_thread():
        fit(network, batch, steps=steps, seed=_SEED, what="training the classifier")
    return network, accuracy(network, pixels[held_out], labels[held_out])


def fit(
    network: Classifier,
    batch: Callable[[int], tuple[Tensor, Tensor]],
    *,
    steps: int,
    seed: int,
    what: str | None = None,
) -> None:
    """Trains a classifier from the start.

    Args:
        network: the network, whose weights are drawn anew.
        batch: the number of a step -> images, uint8 (n, C, H, W), and labels, int64 (n,).
        steps: updates.
        seed: the seed of the starting weights.
        what: the text beside the progress; if unset, none is shown.
    """
    _initialise(network, seed)
    network.to(memory_format=torch.channels_last)  # half the time
    adam = torch.optim.Adam(network.parameters(), lr=_LR, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(adam, max_lr=_LR, total_steps=steps, cycle_momentum=False)
    network.train().requires_grad_(True)
    numbers = range(steps)
    for step in numbers if what is None else shown(numbers, what, steps, unit="steps"):
        images, labels = batch(step)
        loss = nn.functional.cross_entropy(network(images)[1], labels)
        adam.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        adam.step()
        schedule.step()
    network.eval().requires_grad_(False)


def accuracy(network: Classifier, pixels: Tensor, labels: Tensor) -> float:
    """Returns the share of images, uint8 (N, C, H, W), whose label the classifier finds; 0 if there are none."""
    parts = torch.split(torch.arange(len(pixels)), _BATCH)
    right = sum(int((network(pixels[part])[1].argmax(1) == labels[part]).sum()) for part in parts)
    return right / max(len(pixels), 1)


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def _initialise(network: nn.Module, seed: int) -> None:
    """Draws weights by He's initialisation (He et al. 2015, eq. 10); biases are 0."""
    rng = seeding.torch_generator(seed, "classifier.init")
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            deviation = float(np.sqrt(2 / layer.weight[0].numel()))
            layer.weight.copy_(torch.empty(layer.weight.shape).normal_(0, deviation, generator=rng))
        if isinstance(layer, nn.Linear):
            layer.bias.zero_()

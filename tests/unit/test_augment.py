"""DiffAugment against its authors' description, image by image, and against finite differences."""

import numpy as np
import pytest
import torch

from distgan.objective import augment
from distgan.objective.augment import AUGMENTATIONS, Augment

H = 16


def images(n=200, channels=3):
    rng = torch.Generator().manual_seed(0)
    return torch.rand(n, channels, H, H, dtype=torch.float64, generator=rng) * 2 - 1


def numbers(n, count):
    rng = torch.Generator().manual_seed(1)
    return torch.rand(n, count, dtype=torch.float64, generator=rng)


def color(x, u):
    x = x + (u[0] - 0.5)
    grey = x.mean(0, keepdims=True)
    x = (x - grey) * (u[1] * 2) + grey
    return (x - x.mean()) * (u[2] + 0.5) + x.mean()


def translation(x, u):
    most = H // 8
    down, right = (int(np.floor(one * (2 * most + 1))) - most for one in u)
    out = np.zeros_like(x)
    for i in range(H):
        for j in range(H):
            if 0 <= i - down < H and 0 <= j - right < H:
                out[:, i, j] = x[:, i - down, j - right]
    return out


def cutout(x, u):
    length = H // 2
    top, left = (int(np.floor(one * (H + 1))) - length // 2 for one in u)
    out = x.copy()
    out[:, max(top, 0) : max(top + length, 0), max(left, 0) : max(left + length, 0)] = 0
    return out


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("name", "by_hand"), [("color", color), ("translation", translation), ("cutout", cutout)])
def test_an_augmentation_is_what_it_says_image_by_image(name, by_hand, channels):
    count, change = AUGMENTATIONS[name]
    x, u = images(channels=channels), numbers(200, count)
    u[:4] = torch.tensor([0.0, 0.0, 1 - 1e-9, 1 - 1e-9])[:, None]  # the ends of every range
    expected = np.stack([by_hand(one, draws) for one, draws in zip(x.numpy(), u.numpy(), strict=True)])
    np.testing.assert_allclose(change(x, u).numpy(), expected, rtol=1e-12, atol=1e-12)
    assert not np.allclose(expected, x.numpy())


def test_shifts_and_holes_are_evenly_spread():
    u = numbers(20_000, 2)
    x = torch.ones(20_000, 1, H, H, dtype=torch.float64)
    shifted = augment.translation(x, u)
    gone = (shifted.sum((1, 3)) == 0).sum(1)  # rows that came in
    assert gone.max() == H // 8
    assert torch.bincount(gone).tolist() == pytest.approx([4000, 8000, 8000], rel=0.06)
    hidden = (augment.cutout(x, u) == 0).sum((1, 2, 3))
    assert hidden.max() == (H // 2) ** 2
    assert hidden.min() == (H // 4) ** 2  # in a corner


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_gradients_are_those_of_finite_differences(name):
    count, change = AUGMENTATIONS[name]
    x, u = images(n=2)[..., :8, :8].clone().requires_grad_(), numbers(2, count)
    assert torch.autograd.gradcheck(lambda x: change(x, u), (x,))


def test_augmentations_follow_each_other_and_none_returns_the_images_themselves():
    x, drawn = images(n=4), []

    def draw(stream, count):
        drawn.append(stream)
        return numbers(4, count)

    both = Augment(["translation", "color"])(x, draw, "fake")
    assert torch.equal(both, augment.color(augment.translation(x, numbers(4, 2)), numbers(4, 3)))
    assert drawn == ["augment.fake.translation", "augment.fake.color"]  # each its own numbers
    assert Augment([])(x, draw, "real") is x

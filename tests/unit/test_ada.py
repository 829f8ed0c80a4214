"""ADA's pipeline against plain versions of its authors' description, image by image; and how its probability adapts."""

import math
import re

import numpy as np
import pytest
import scipy.ndimage
import scipy.signal
import scipy.stats
import torch

from distgan.objective import SIGN, ada
from distgan.objective.ada import NUMBERS, PIPELINES, SYM6, Pipeline
from distgan.objective.augment import Augment
from distgan.recipe import AugmentConfig, Config, RampConfig, RunConfig, TrainConfig
from distgan.run.adaptation import MOST, Adaptation

HEIGHT, WIDTH = 12, 16


def images(n=40, channels=3):
    rng = torch.Generator().manual_seed(0)
    return torch.rand(n, channels, HEIGHT, WIDTH, dtype=torch.float64, generator=rng) * 2 - 1


def numbers(n=40):
    return torch.rand(n, NUMBERS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def p(value):
    return torch.tensor(value, dtype=torch.float64)


# What the authors' augment.py does with one image, written out --------------------------------------------------------


def taken(u, probability):
    return u < probability


def inverse_map(u, probability):
    """Their G_inv, of the same uniform numbers: the product of the inverses, in their order; pixels from the centre."""
    normal, u = scipy.stats.norm.ppf, iter(u)
    once = 1 - math.sqrt(1 - min(probability, 1))

    def scaled(x, y):
        return np.diag([1 / x, 1 / y, 1])

    def turned(angle):
        return np.array([[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0], [0, 0, 1]])

    def moved(x, y):
        return np.array([[1, 0, -x], [0, 1, -y], [0, 0, 1.0]])

    g = np.eye(3)
    i = math.floor(2 * next(u))
    g = g @ (scaled(1 - 2 * i, 1) if taken(next(u), probability) else np.eye(3))
    i = math.floor(4 * next(u))
    g = g @ (turned(math.pi / 2 * i) if taken(next(u), probability) else np.eye(3))
    x, y = (2 * next(u) - 1) * 0.125, (2 * next(u) - 1) * 0.125
    g = g @ (moved(round(x * WIDTH), round(y * HEIGHT)) if taken(next(u), probability) else np.eye(3))
    s = 2 ** (0.2 * normal(next(u)))
    g = g @ (scaled(s, s) if taken(next(u), probability) else np.eye(3))
    angle = (2 * next(u) - 1) * math.pi
    g = g @ (turned(angle) if taken(next(u), once) else np.eye(3))
    s = 2 ** (0.2 * normal(next(u)))
    g = g @ (scaled(s, 1 / s) if taken(next(u), probability) else np.eye(3))
    angle = (2 * next(u) - 1) * math.pi
    g = g @ (turned(angle) if taken(next(u), once) else np.eye(3))
    x, y = 0.125 * normal(next(u)), 0.125 * normal(next(u))
    return g @ (moved(x * WIDTH, y * HEIGHT) if taken(next(u), probability) else np.eye(3))


def resampled(image, g):
    """Upsampled by sym6, sampled bilinearly, downsampled by it again; around it lie mirror images without end."""
    around = 8 * 20  # pixels
    h = np.array(SYM6)
    padded = np.pad(image, around, mode="reflect")
    for axis in (0, 1):
        padded = scipy.signal.upfirdn(math.sqrt(2) * h, padded, up=2, axis=axis)
    # Place k of the result is half pixel k - 5 of the padded image, at (k - 5 + 0.5) / 2.
    rows, columns = ((np.arange(-5, 2 * size + 5) + 0.5 - size) / 2 for size in (HEIGHT, WIDTH))
    y, x = np.meshgrid(rows, columns, indexing="ij")
    at_x, at_y = (row[0] * x + row[1] * y + row[2] for row in g[:2])
    places = [2 * (at + size / 2 + around) - 0.5 + 5 for at, size in ((at_y, HEIGHT), (at_x, WIDTH))]
    values = scipy.ndimage.map_coordinates(padded, places, order=1, prefilter=False)
    for axis in (0, 1):
        values = scipy.signal.upfirdn(h[::-1] / math.sqrt(2), values, down=1, axis=axis)
        values = np.take(values, np.arange(11, values.shape[axis] - 11, 2), axis=axis)
    return values


def color_matrix(u, probability):
    normal, u = scipy.stats.norm.ppf, iter(u)
    v = np.array([1, 1, 1, 0]) / math.sqrt(3)
    c, eye = np.eye(4), np.eye(4)
    b = 0.2 * normal(next(u))
    if taken(next(u), probability):
        c = np.array([[1, 0, 0, b], [0, 1, 0, b], [0, 0, 1, b], [0, 0, 0, 1]]) @ c
    s = 2 ** (0.5 * normal(next(u)))
    if taken(next(u), probability):
        c = np.diag([s, s, s, 1]) @ c
    i = math.floor(2 * next(u))
    if taken(next(u), probability):
        c = (eye - 2 * np.outer(v, v) * i) @ c
    angle = (2 * next(u) - 1) * math.pi
    if taken(next(u), probability):
        cross = np.array([[0, -1, 1, 0], [1, 0, -1, 0], [-1, 1, 0, 0], [0, 0, 0, 0]]) / math.sqrt(3)
        across = np.diag([1, 1, 1, 0]) - np.outer(v, v)
        c = (eye + math.sin(angle) * cross + (math.cos(angle) - 1) * across) @ c
    s = 2 ** normal(next(u))
    if taken(next(u), probability):
        c = (np.outer(v, v) + np.diag([0, 0, 0, 1]) + (np.diag([1, 1, 1, 0]) - np.outer(v, v)) * s) @ c
    return c


# The pipeline ---------------------------------------------------------------------------------------------------------


def test_the_filter_is_orthonormal():
    h = np.array(SYM6)
    assert [h[2 * k :] @ h[: len(h) - 2 * k] for k in range(6)] == pytest.approx([1, 0, 0, 0, 0, 0], abs=1e-12)
    assert h.sum() == pytest.approx(math.sqrt(2))


@pytest.mark.parametrize("size", [(12, 16), (32, 32), (8, 48)])
def test_without_a_transform_images_stay_as_they_are_up_to_their_edges(size):
    x = torch.rand(3, 3, *size, dtype=torch.float64)
    for pipeline in PIPELINES.values():
        torch.testing.assert_close(pipeline(x, numbers(3), p(0.0)), x, rtol=0, atol=1e-11)


def test_geometry_is_the_plain_one():
    """Away from the edges, where the filter meets a mirror image of itself here and a mirrored pixel there."""
    x, u = images(), numbers()
    maps = ada._geometry(ada._Numbers(u, p(0.9)), 1.0, x)
    for one, drawn in zip(maps, u.numpy(), strict=True):
        np.testing.assert_allclose(one.numpy(), inverse_map(drawn, 0.9)[:2], rtol=1e-9, atol=1e-9)
    moved = 0
    for image, g in zip(x, maps.numpy(), strict=True):
        ours = ada._sampled(image[None, :1], torch.from_numpy(g)[None])[0, 0]
        theirs = resampled(image[0].numpy(), g)
        rows, columns = (np.arange(size) + 0.5 - size / 2 for size in (HEIGHT, WIDTH))
        at_x = g[0, 0] * columns + g[0, 1] * rows[:, None] + g[0, 2] + WIDTH / 2
        at_y = g[1, 0] * columns + g[1, 1] * rows[:, None] + g[1, 2] + HEIGHT / 2
        # The filter's reach, 3 pixels of the result: as far as the map carries it in the image.
        reach = 3 * np.abs(np.linalg.eigvals(g[:, :2] @ g[:, :2].T)).max() ** 0.5
        inside = (at_x > reach) & (at_x < WIDTH - reach) & (at_y > reach) & (at_y < HEIGHT - reach)
        moved += inside.sum()
        np.testing.assert_allclose(ours.numpy()[inside], theirs[inside], rtol=0, atol=1e-9)
        assert np.abs(ours.numpy() - theirs).mean() < 0.1  # and not far from it at the edges
    assert moved > 300


def test_colours_are_the_plain_ones():
    u = numbers()
    colour = ada._Numbers(u, p(0.9))
    colour._next = 18  # geometry's come first
    x = images(channels=4)
    ours = ada._recoloured(x, colour, 1.0)
    grey = ada._Numbers(u, p(0.9))
    grey._next = 18
    ours_of_grey = ada._recoloured(x[:, :1], grey, 1.0)
    for i in range(len(x)):
        c = color_matrix(u[i, 18:28].numpy(), 0.9)
        flat = x[i, :3].flatten(1).numpy()
        np.testing.assert_allclose(ours[i, :3].flatten(1).numpy(), c[:3, :3] @ flat + c[:3, 3:], rtol=1e-9, atol=1e-9)
        plain = color_matrix(np.r_[u[i, 18:24].numpy(), 0.5, 1, 0.5, 1], 0.9)  # without hue and saturation
        row = plain[:3].mean(0)
        np.testing.assert_allclose(ours_of_grey[i, 0].numpy(), row[:3].sum() * x[i, 0].numpy() + row[3], atol=1e-9)
    assert torch.equal(ours[:, 3], x[:, 3])  # alpha


def test_holes_are_half_as_high_and_wide_and_only_of_r3gan():
    x = torch.ones(4000, 1, HEIGHT, WIDTH, dtype=torch.float64)
    u = torch.rand(4000, NUMBERS, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    only_holes = Pipeline(geometry=0.0, color=0.0, cutout=1.0)(x, u, p(0.4))
    hidden = (only_holes.abs() < 1e-9).sum((1, 2, 3))
    assert (hidden > 0).double().mean().item() == pytest.approx(0.4, abs=0.03)
    assert hidden.max() == HEIGHT // 2 * WIDTH // 2
    assert PIPELINES["ada"] == Pipeline(1.0, 1.0, 0.0)
    assert PIPELINES["ada_r3gan"] == Pipeline(1.0, 0.5, 1.0)


def test_each_transform_has_its_probability_and_its_own_numbers():
    """Colours of ada_r3gan change half as often; and no number is used twice or never."""
    n = 4000
    u = torch.rand(n, NUMBERS, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    maps = ada._geometry(ada._Numbers(u, p(0.3)), 1.0, torch.zeros(n, 1, 16, 16, dtype=torch.float64))
    still = (maps - torch.eye(3, dtype=torch.float64)[:2]).abs().amax((1, 2)) < 1e-9
    # Mirrored: half of those taken; turned: three quarters; two rotations share a probability.
    expected = (1 - 0.15) * (1 - 0.3 * 3 / 4) * (1 - 0.3) ** 5
    assert still.double().mean().item() == pytest.approx(expected, abs=0.03)
    x = images(1, channels=3)
    drawn = numbers(1).clamp(0.05, 0.45).requires_grad_(False)
    base = PIPELINES["ada_r3gan"](x, drawn, p(1.0))
    unused = []
    for k in range(NUMBERS):
        other = drawn.clone()
        other[0, k] = 0.95 if other[0, k] < 0.5 else 0.05
        if torch.allclose(PIPELINES["ada_r3gan"](x, other, p(1.0)), base):
            unused.append(k)
    # A number that says whether a transform is taken changes nothing if all are. Colour's probability is 0.5, but 23
    # decides about a flip that 22 has not drawn.
    assert unused == [1, 3, 6, 8, 10, 12, 14, 17, 23, 28]


def test_an_image_depends_on_its_own_numbers_alone():
    x, u = images(6), numbers(6)
    together = PIPELINES["ada"](x, u, p(0.8))
    alone = torch.cat([PIPELINES["ada"](x[i : i + 1], u[i : i + 1], p(0.8)) for i in range(6)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)
    assert (together - x).abs().amax((1, 2, 3)).min() > 0.01


@pytest.mark.parametrize("name", PIPELINES)
def test_it_can_be_differentiated_twice(name):
    x, u = images(2)[..., :8, :8].clone().requires_grad_(), numbers(2)

    def augmented(x):
        return PIPELINES[name](x, u, p(0.9))

    assert torch.autograd.gradcheck(augmented, (x,), fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x: augmented(x) ** 2, (x,), fast_mode=True)


def test_its_gradients_have_deterministic_kernels_on_cuda():
    """Of mirrored margins and of grid_sample, torch has none: use_deterministic_algorithms refuses them."""
    x = images(1).requires_grad_()
    nodes = [PIPELINES["ada"](x, numbers(1), p(0.5)).grad_fn]
    for node in nodes:  # it grows
        nodes += [following for following, _ in node.next_functions if following is not None and following not in nodes]
    names = {type(node).__name__ for node in nodes}
    assert "GatherBackward0" in names
    assert not [name for name in names if re.search("ReflectionPad|GridSampler", name)]


# Its probability ------------------------------------------------------------------------------------------------------


class OneOfTwo:
    """Two ranks, of which this is one; a reduction adds what the other has."""

    def __init__(self, rank, theirs):
        self.rank, self.world, self.theirs, self.device = rank, 2, theirs, torch.device("cpu")

    def all_reduce_sums(self, sums):
        for tensor in sums:
            tensor.add_(self.theirs)

    def gather(self, value):
        return [value, self.theirs]


def adaptation(theirs=0.0, rank=0, **settings):
    config = Config(
        run=RunConfig(dir="run"),
        augment=AugmentConfig(policy="ada", **settings),
        train=TrainConfig(batch_size=10, d_steps=2),
        ramp=RampConfig(images=80, probability=0.5) if "probability" in settings else RampConfig(),
    )
    augment = Augment(config.augment.names)
    return Adaptation(config, augment, OneOfTwo(rank, theirs)), augment


def test_a_probability_rises_while_signs_are_above_the_target_and_falls_while_below():
    """Karras et al. 2020, section 3.1: every four batches a step by the sign of r_t - target; never below 0."""
    # Four steps of two updates with 10 images each, half of them here: 40 signs here, and as many on the other rank.
    adapted, augment = adaptation(theirs=10.0, target=0.3, adapt_over=1000)
    course = []
    for step, mean in enumerate([0.2] * 4 + [0.6] * 8 + [-0.2] * 8 + [1.0] * 60):
        adapted.set(step)
        course.append(float(augment.probability))
        for _ in range(2):
            adapted.add({SIGN: torch.tensor(mean)}, 1.0)
    change = 80 / 1000  # images since the last change, by those from 0 to 1
    means = [(40 * mean + 10) / 80 for mean in (0.2, 0.6, -0.2)]
    assert [mean > 0.3 for mean in means] == [False, True, False]
    expected = [0] * 8 + [change] * 4 + [2 * change] * 4 + [change] * 4 + [0] * 4
    assert course[:24] == pytest.approx(expected)
    assert max(course) == MOST == course[-1]
    assert adapted.now == {"augment/probability": MOST}


def test_signs_exactly_at_the_target_change_nothing():
    adapted, augment = adaptation(theirs=24.0, target=0.6)
    augment.probability.fill_(0.3)
    for _ in range(8):
        adapted.add({SIGN: torch.tensor(0.6)}, 1.0)
    adapted.set(4)
    assert float(augment.probability) == 0.3


def test_a_resumed_adaptation_goes_on_with_the_signs_of_all_ranks():
    adapted, augment = adaptation(theirs=-3.0)
    augment.probability.fill_(0.25)
    adapted.add({SIGN: torch.tensor(0.2)}, 1.0)
    state = adapted.state()
    assert state == {"probability": 0.25, "signs": -2.0}  # 1 here, -3 there
    for rank, signs in ((0, -2.0), (1, 0.0)):
        resumed, again = adaptation(rank=rank)
        resumed.load_state(state)
        assert float(again.probability) == 0.25
        assert float(resumed._signs) == signs


def test_a_fixed_probability_is_ramped():
    fixed, augment = adaptation(probability=0.1)
    seen = []
    for step in (0, 2, 4, 9):
        fixed.set(step)
        seen.append(float(augment.probability))
    assert seen == pytest.approx([0.1, 0.3, 0.5, 0.5])
    assert fixed.state() is None
    fixed.load_state(None)

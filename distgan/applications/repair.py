"""Repair: completes pictures of which some pixels are hidden, by a search for latents (Yeh et al. 2017)."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from scipy.sparse import coo_matrix, diags
from scipy.sparse.linalg import splu
from torch import Tensor
from torch.nn.functional import avg_pool2d, softplus

from distgan.applications.search import Candidates, Loss, Settings, Wanted, digest, opened, searching
from distgan.errors import UserError
from distgan.evaluation.neighbours import nearest_where
from distgan.models import Discriminator, from_bytes, to_bytes
from distgan.progress import shown
from distgan.storage.exported import Exported
from distgan.storage.latents import Latents

_WINDOW = 7  # of the contextual loss's weights, in pixels (Yeh et al. 2017)
_PRIOR = 0.02  # weight of the discriminator's verdict
_USUAL = 256  # samples whose logits scale it


@dataclass(frozen=True)
class Repaired:
    """Completed pictures."""

    pictures: Tensor
    """The pictures with their holes filled, uint8 (N, C, H, W); the other pixels are unchanged."""
    latents: Latents
    images: Tensor
    """What the generator draws from the latents, uint8 (N, C, H, W), before it is blended in."""
    with_discriminator: bool
    """Whether there was a discriminator; without one, only the known pixels counted."""


def inpaint(
    run: str | os.PathLike[str] | Exported,
    pictures: Tensor,
    masks: Tensor,
    *,
    steps: int = 500,
    restarts: int = 4,
    seed: int = 0,
) -> Repaired:
    """Collective: fills the hidden pixels of pictures. Several processes share the pictures.

    Searches for the latents whose image agrees with the known pixels and looks real to the discriminator, then blends
    that image into the hole (Yeh et al. 2017), scaled by its `agreement` with the picture, which the paper does not do.

    The loss of an image is the mean absolute difference of the known pixels, those near a hole counting more (equations
    3 and 4, with weights that sum to 1), plus a prior: softplus(-l), where l is the discriminator's logit, scaled so
    that samples of the generator have mean 0 and deviation 1. (The paper's prior, equation 5, is log(1 - D), which only
    losses with a probability D have.) Without a discriminator the loss is the first term alone.

    Args:
        run: the folder of a run or of an exported generator, or a generator's id on the hub.
        pictures: uint8 (N, C, H, W), of the generator's size. Hidden pixels are not read.
        masks: bool (N, H, W), True where a pixel is hidden.
        steps: updates of each latent.
        restarts: starts of each picture, of which the best goes on after a fifth of the steps.
        seed: the seed of the samples where searches begin.

    Returns:
        The same on every rank.

    Raises:
        UserError: there is no generator; pictures, masks or numbers do not fit; or a mask hides everything or nothing.
    """
    found, pictures, masks = opened(run), pictures.cpu(), masks.cpu()
    _check_masks(masks, pictures)
    known = torch.where(masks[:, None], 0, pictures)
    settings = Settings(steps=steps, restarts=restarts, seed=seed)
    with searching(found, known, settings, masks=digest(masks)) as search:
        discriminator = search.discriminator
        prior = _prior(discriminator, search.candidates) if discriminator is not None else None
        result = search.run(Wanted(from_bytes(known), weights_near(masks)), _loss(prior), what="repairing")
    scaled = [agreement(*one) * one[1] for one in zip(from_bytes(known), result.images, masks, strict=True)]
    filled = [blend(*one) for one in zip(known, scaled, masks, strict=True)]
    return Repaired(torch.stack(filled), result.latents, to_bytes(result.images), discriminator is not None)


def weights_near(masks: Tensor) -> Tensor:
    """Returns the weights of pixels, (N, 1, H, W): 0 where hidden, elsewhere the share of hidden ones around it.

    Yeh et al. 2017, equation 3, with a window of 7x7.
    """
    hidden = masks[:, None].float()
    around = avg_pool2d(hidden, _WINDOW, 1, _WINDOW // 2, count_include_pad=False)
    return around * (1 - hidden)


_Prior = Callable[[Tensor, Tensor | None], Tensor]


def _prior(discriminator: Discriminator, samples: Candidates) -> _Prior:
    """Returns a function of images and labels: softplus(-logit), for logits whose mean and deviation over samples of
    the generator are 0 and 1. Losses differ in what a logit of 0 means, and in how large logits become.
    """
    y = samples.y[:_USUAL] if samples.y is not None else None
    with torch.no_grad():
        usual = discriminator(samples.images[:_USUAL], y).float()
    mean, deviation = usual.mean(), usual.std().clamp(min=1e-6)
    return lambda images, y: softplus((mean - discriminator(images, y).float()) / deviation)


def _loss(prior: _Prior | None) -> Callable[[Wanted], Loss]:
    def of_group(wanted: Wanted) -> Loss:
        def loss(images: Tensor, y: Tensor | None, of: Tensor) -> Tensor:
            context = wanted.difference(images, of, power=1)
            return context if prior is None else context + _PRIOR * prior(images, y)

        return loss

    return of_group


def agreement(picture: Tensor, image: Tensor, hidden: Tensor) -> float:
    """Returns how far an image's differences between neighbours are those of a picture, where both are known: 0 to 1.

    It is the factor a that minimises the sum of (a d_image - d_picture)^2. Where the generator does not know such
    pictures it is small: then a smooth fill is less wrong than a detailed one.

    Args:
        picture: (C, H, W) in [-1, 1]; hidden pixels are not read.
        image: (C, H, W) in [-1, 1].
        hidden: bool (H, W).
    """
    both = square = 0.0
    for dim in (1, 2):
        size = hidden.shape[dim - 1]
        known = ~(hidden.narrow(dim - 1, 0, size - 1) | hidden.narrow(dim - 1, 1, size - 1))
        ours, theirs = (one.double().diff(dim=dim)[:, known] for one in (image, picture))
        both, square = both + float((ours * theirs).sum()), square + float(ours.square().sum())
    return min(max(both / square, 0.0), 1.0) if square > 0 else 0.0


def blend(picture: Tensor, image: Tensor, hidden: Tensor) -> Tensor:
    """Fills the hole of a picture with an image's gradients, so that no seam shows: uint8 (C, H, W).

    Solves Poisson's equation with the known pixels as the boundary (Pérez et al. 2003, equation 7): the differences
    between neighbours are the image's.

    Args:
        picture: uint8 (C, H, W).
        image: (C, H, W) in [-1, 1].
        hidden: bool (H, W), neither everywhere nor nowhere true.
    """
    solve, inside, at, beside = _system(hidden.numpy().tobytes(), tuple(hidden.shape))
    guide = ((image.double() + 1) * 127.5).flatten(1).numpy().T
    known = picture.double().flatten(1).numpy().T
    right = np.zeros((len(inside), len(picture)))
    hole = hidden.flatten().numpy()
    terms = guide[inside[at]] - guide[beside] + np.where(hole[beside, None], 0, known[beside])
    np.add.at(right, at, terms)
    filled = picture.clone()
    filled[:, hidden] = torch.from_numpy(solve(right)).T.round().clamp(0, 255).to(torch.uint8)
    return filled


@lru_cache(maxsize=8)
def _system(
    mask: bytes, shape: tuple[int, int]
) -> tuple[Callable[[np.ndarray], np.ndarray], np.ndarray, np.ndarray, np.ndarray]:
    """Returns what a hole's equations have in common for all images.

    These are a function that solves them; the numbers of the hole's pixels; and, for each pair of a hole's pixel and a
    neighbour of it, the place of the first among the hole's and the number of the second.
    """
    hole = np.frombuffer(mask, dtype=bool)
    grid = np.arange(hole.size).reshape(shape)
    pairs = [(grid[:, :-1], grid[:, 1:]), (grid[:-1], grid[1:])]
    both = [(p.ravel(), q.ravel()) for a, b in pairs for p, q in ((a, b), (b, a))]
    p, q = (np.concatenate(side) for side in zip(*both, strict=True))
    p, q = p[hole[p]], q[hole[p]]
    inside = np.flatnonzero(hole)
    place = np.full(hole.size, -1)
    place[inside] = np.arange(len(inside))
    linked = hole[q]
    off = coo_matrix((-np.ones(linked.sum()), (place[p[linked]], place[q[linked]])), shape=(len(inside),) * 2)
    return splu((off + diags(np.bincount(place[p]).astype(float))).tocsc()).solve, inside, place[p], q


def _check_masks(masks: Tensor, pictures: Tensor) -> None:
    expected = (len(pictures), *pictures.shape[2:])
    if masks.dtype != torch.bool or tuple(masks.shape) != expected:
        raise UserError(f"the masks are {masks.dtype} {tuple(masks.shape)}, but must be torch.bool {expected}.")
    share = masks.flatten(1).float().mean(1)
    if (share == 0).any() or (share == 1).any():
        first = int(((share == 0) | (share == 1)).nonzero()[0])
        what = "nothing" if share[first] == 0 else "everything"
        raise UserError(f"mask {first} hides {what}: it must hide some pixels and leave others.")


# What a repair is compared with ---------------------------------------------------------------------------------------


def fill_with_mean(pictures: Tensor, masks: Tensor) -> Tensor:
    """Fills the holes with the mean of the known pixels of each channel: uint8 (N, C, H, W)."""
    known = (~masks)[:, None].float()
    means = (pictures.float() * known).sum((2, 3)) / known.sum((2, 3))
    return torch.where(masks[:, None], means.round().to(torch.uint8)[:, :, None, None], pictures)


def fill_with_nearest(pictures: Tensor, masks: Tensor, training: Tensor) -> Tensor:
    """Fills the holes with the pixels of the training image that is nearest by the known ones: uint8 (N, C, H, W)."""
    return torch.where(masks[:, None], training[nearest_where(pictures, ~masks, training)], pictures)


def fill_smoothly(pictures: Tensor, masks: Tensor) -> Tensor:
    """Fills the holes with the solution of the biharmonic equation, by scikit-image: uint8 (N, C, H, W)."""
    from skimage.restoration import inpaint_biharmonic

    filled = []
    for picture, hidden in shown(zip(pictures, masks, strict=True), "filling smoothly", len(pictures)):
        smooth = inpaint_biharmonic(picture.permute(1, 2, 0).numpy() / 255, hidden.numpy(), channel_axis=2)
        smooth_bytes = torch.from_numpy(smooth * 255).round().clamp(0, 255).to(torch.uint8).permute(2, 0, 1)
        filled.append(torch.where(hidden, smooth_bytes, picture))
    return torch.stack(filled)


def psnr(repaired: Tensor, truth: Tensor, masks: Tensor) -> Tensor:
    """Returns the peak signal-to-noise ratio of the hidden pixels, in decibels, (N,).

    10 lg(255^2 / mean squared error), at most 100, which equal pixels get.
    """
    hidden = masks[:, None].double()
    squares = ((repaired.double() - truth.double()).square() * hidden).sum((1, 2, 3))
    error = squares / hidden.sum((1, 2, 3)) / truth.shape[1]
    return (10 * torch.log10(255**2 / error.clamp(min=1e-12))).clamp(max=100)


def ssim(repaired: Tensor, truth: Tensor, masks: Tensor) -> Tensor:
    """Returns the structural similarity (Wang et al. 2004), by scikit-image, its mean over the hidden pixels: (N,)."""
    from skimage.metrics import structural_similarity

    values = []
    for one, true, hidden in zip(repaired.numpy(), truth.numpy(), masks.numpy(), strict=True):
        _, similarity = structural_similarity(one, true, channel_axis=0, data_range=255, full=True)
        values.append(float(similarity[:, hidden].mean()))
    return torch.tensor(values)

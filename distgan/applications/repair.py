"""Repair: completes pictures of which some pixels are hidden, by a search for latents (Yeh et al. 2017)."""

import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import lil_matrix
from scipy.sparse.linalg import splu
from torch import Tensor
from torch.nn.functional import avg_pool2d, softplus

from distgan.applications.search import Loss, Settings, Wanted, check, digest, opened, scaled, search
from distgan.errors import UserError
from distgan.evaluation.neighbours import nearest_where
from distgan.models import Discriminator, eval_mode, frozen, to_bytes
from distgan.parallel.ranks import together
from distgan.storage.exported import Exported
from distgan.storage.latents import Latents

_WINDOW = 7  # of the contextual loss's weights, in pixels (Yeh et al. 2017, section 3.2)
_PRIOR = 0.02  # weight of the discriminator's verdict


@dataclass(frozen=True)
class Repaired:
    """Completed pictures."""

    pictures: Tensor
    """The pictures with their holes filled, uint8 (N, C, H, W); the other pixels are unchanged."""
    latents: Latents
    images: Tensor
    """What the generator draws from the latents, uint8 (N, C, H, W), before it is blended in."""


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
    that image into the hole (Yeh et al. 2017). The loss of an image is the mean absolute difference of the known
    pixels, those near a hole counting more (equations 3 and 4, with weights that sum to 1), plus softplus(-logit) of
    the discriminator (the prior of equation 5, in the form whose gradient does not vanish). Without a discriminator it
    is the first term alone.

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
    found = opened(run)
    check(pictures, found.spec, steps=steps, restarts=restarts)
    _check_masks(masks, pictures)
    discriminator = found.discriminator()
    known = torch.where(masks[:, None], 0, pictures)
    described = {"generator": found.step, "pictures": digest(known), "masks": digest(masks)}
    with together({**described, "search": [steps, restarts, seed]}) as ranks:
        generator = found.generator.to(ranks.accelerator.device)
        if discriminator is not None:
            discriminator.to(ranks.accelerator.device)
        wanted = Wanted(scaled(known), weights_near(masks))
        settings = Settings(steps=steps, restarts=restarts, seed=seed)
        result = search(generator, wanted, _loss(discriminator), settings, ranks, what="repairing")
        generator.cpu()
    filled = [blend(*one) for one in zip(known, result.images, masks, strict=True)]
    return Repaired(torch.stack(filled), result.latents, to_bytes(result.images))


def weights_near(masks: Tensor) -> Tensor:
    """Returns the weights of pixels, (N, 1, H, W): 0 where hidden, elsewhere the share of hidden ones around it.

    Yeh et al. 2017, equation 3, with a window of 7x7.
    """
    hidden = masks[:, None].float()
    around = avg_pool2d(hidden, _WINDOW, 1, _WINDOW // 2)
    return around * (1 - hidden)


def _loss(discriminator: Discriminator | None) -> Callable[[Wanted], Loss]:
    def of_group(wanted: Wanted) -> Loss:
        def loss(images: Tensor, y: Tensor | None, of: Tensor) -> Tensor:
            context = wanted.difference(images, of, power=1)
            if discriminator is None:
                return context
            with eval_mode(discriminator), frozen(discriminator):
                return context + _PRIOR * softplus(-discriminator(images, y).float())

        return loss

    return of_group


def blend(picture: Tensor, image: Tensor, hidden: Tensor) -> Tensor:
    """Fills the hole of a picture with an image's gradients, so that no seam shows: uint8 (C, H, W).

    Solves Poisson's equation with the known pixels as the boundary (Pérez et al. 2003, equation 7): the differences
    between neighbours are the image's.

    Args:
        picture: uint8 (C, H, W).
        image: (C, H, W) in [-1, 1].
        hidden: bool (H, W), neither everywhere nor nowhere true.
    """
    hole = hidden.numpy()
    number = np.full(hole.shape, -1)
    number[hole] = np.arange(hole.sum())
    guide, known = ((image.double() + 1) * 127.5).numpy(), picture.double().numpy()
    laplacian, right = lil_matrix((hole.sum(), hole.sum())), np.zeros((hole.sum(), len(known)))
    height, width = hole.shape
    for (row, column), p in zip(np.argwhere(hole), range(hole.sum()), strict=True):
        for r, c in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
            if not (0 <= r < height and 0 <= c < width):
                continue
            laplacian[p, p] += 1
            right[p] += guide[:, row, column] - guide[:, r, c]
            if hole[r, c]:
                laplacian[p, number[r, c]] = -1
            else:
                right[p] += known[:, r, c]
    filled = picture.clone()
    solved = torch.from_numpy(splu(laplacian.tocsc()).solve(right)).T
    filled[:, hidden] = solved.round().clamp(0, 255).to(torch.uint8)
    return filled


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
    for picture, hidden in zip(pictures, masks, strict=True):
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

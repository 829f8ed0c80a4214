"""Walks between latents and between classes."""

import torch
from torch import Tensor

from distgan.storage.latents import Latents


def walk(stations: Latents, steps: int, *, classes: int) -> tuple[Tensor, Tensor | None]:
    """Returns the inputs of a generator on the way from each station to the next.

    Latents go along great circles (Shoemake 1985, section 3.3), because a straight line between two draws from N(0, 1)
    in many dimensions leads through a region where there are hardly any (White 2016, section 2.1). If the generator has
    classes, their shares go in a straight line.

    Args:
        stations: at least two latents, with labels if there are classes.
        steps: images from one station to the next, without the latter.
        classes: the number of classes.

    Returns:
        Latents, ((N - 1) * steps + 1, latent_dim), and shares of the classes for each of them, or None.
    """
    shares = torch.nn.functional.one_hot(stations.y, classes).to(stations.z) if stations.y is not None else None
    legs = range(len(stations) - 1)
    at = torch.arange(steps, dtype=stations.z.dtype) / steps
    z = torch.cat([*(spherical(stations.z[i], stations.z[i + 1], at) for i in legs), stations.z[-1:]])
    if shares is None:
        return z, None
    y = [torch.lerp(shares[i], shares[i + 1], at[:, None]) for i in legs]
    return z, torch.cat([*y, shares[-1:]])


def spherical(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """Interpolates between two vectors (D,) at t, (N,) in [0, 1]: (N, D).

    sin((1 - t) w) / sin(w) a + sin(t w) / sin(w) b, where w is the angle between them (Shoemake 1985, section 3.3). If
    the angle is nearly 0 or half a turn, in a straight line.
    """
    angle = torch.acos(torch.nn.functional.cosine_similarity(a, b, dim=0).clamp(-1, 1))
    if torch.sin(angle) < 1e-3:  # in float32 the angle of a vector with itself may be 3e-4
        return torch.lerp(a, b, t[:, None])
    return (torch.sin((1 - t) * angle)[:, None] * a + torch.sin(t * angle)[:, None] * b) / torch.sin(angle)

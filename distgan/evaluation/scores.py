"""The formulas that turn features of images into metrics, in float64. Sums can be added over processes."""

import torch
from torch import Tensor

_ROWS = 1000  # of a matrix of distances at a time: memory grows with the number of samples, not with its square


class Moments:
    """Mean and covariance of features, summed batch by batch, in memory that does not grow with their number."""

    def __init__(self, dim: int) -> None:
        self.count = torch.zeros((), dtype=torch.float64)
        self.sum = torch.zeros(dim, dtype=torch.float64)
        self.outer = torch.zeros(dim, dim, dtype=torch.float64)

    def add(self, features: Tensor) -> None:
        """Adds features, (N, dim)."""
        features = features.double().cpu()
        self.count += len(features)
        self.sum += features.sum(0)
        self.outer += features.T @ features

    @property
    def sums(self) -> dict[str, Tensor]:
        """Returns the tensors to be summed over processes, in place."""
        return {"count": self.count, "sum": self.sum, "outer": self.outer}

    @property
    def mean(self) -> Tensor:
        """Returns the mean, (dim,)."""
        return self.sum / self.count

    @property
    def covariance(self) -> Tensor:
        """Returns the covariance, (dim, dim), unbiased: over count - 1."""
        return (self.outer - self.count * self.mean.outer(self.mean)) / (self.count - 1)


def frechet(real: Moments, fake: Moments) -> float:
    """Returns the squared Fréchet distance of two Gaussians with these moments (Heusel et al. 2017, eq. 6).

    The trace of (C1 C2)^(1/2) is that of (C1^(1/2) C2 C1^(1/2))^(1/2), which is symmetric, so that no complex numbers
    arise. Covariances of fewer samples than dimensions are singular, and the distance is then biased upwards.
    """
    values, vectors = torch.linalg.eigh(real.covariance)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    trace = torch.linalg.eigvalsh(root @ fake.covariance @ root).clamp(min=0).sqrt().sum()
    between = (real.mean - fake.mean).square().sum()
    return float(between + real.covariance.trace() + fake.covariance.trace() - 2 * trace)


def spread(real: Moments, fake: Moments) -> float:
    """Returns the root mean square distance between generated images, divided by that between real ones.

    It is 1 if they are equally diverse, and 0 if all generated images are equal. The root mean square distance of pairs
    is the root of twice the covariance's trace.
    """
    return float((fake.covariance.trace() / real.covariance.trace()).clamp(min=0).sqrt())


class ClassSums:
    """The sums over a classifier's logits that the Inception score needs, for each of its splits, in one pass."""

    def __init__(self, classes: int, *, num: int, splits: int = 10) -> None:
        """Begins with no image.

        Args:
            classes: the number of classes.
            num: the number of images that will be added.
            splits: the number of parts, in the order of the images, over which the score is averaged.
        """
        self._num, self._splits = num, splits
        self.count = torch.zeros(splits, dtype=torch.float64)
        self.negentropy = torch.zeros(splits, dtype=torch.float64)
        self.p = torch.zeros(splits, classes, dtype=torch.float64)

    def add(self, logits: Tensor, index: Tensor) -> None:
        """Adds logits (N, classes) of the images with these numbers, (N,) in [0, num)."""
        logits = logits.double().cpu()
        p, log_p = logits.softmax(1), logits.log_softmax(1)
        # The last split whose first image, floor(split * num / splits), is not after this one.
        split = ((index + 1) * self._splits - 1).div(self._num, rounding_mode="floor")
        self.count.index_add_(0, split, torch.ones(len(p), dtype=torch.float64))
        self.negentropy.index_add_(0, split, (p * log_p).sum(1))
        self.p.index_add_(0, split, p)

    @property
    def sums(self) -> dict[str, Tensor]:
        """Returns the tensors to be summed over processes, in place."""
        return {"count": self.count, "negentropy": self.negentropy, "p": self.p}

    @property
    def shares(self) -> Tensor:
        """Returns the mean of p(y|x), (classes,)."""
        return self.p.sum(0) / self.count.sum()

    def score(self) -> tuple[float, float]:
        """Returns exp E KL(p(y|x) || p(y)) (Salimans et al. 2016, section 4): mean and deviation over the splits."""
        marginal = self.p / self.count[:, None]
        kl = self.negentropy / self.count - marginal.xlogy(marginal).sum(1)
        return float(kl.exp().mean()), float(kl.exp().std(correction=0))


def kernel_distance(real: Tensor, fake: Tensor, *, block: int = 1000) -> tuple[float, float | None]:
    """Returns the kernel Inception distance: unbiased squared MMD with (x.y / dim + 1)^3 (Bińkowski et al. 2018, 4.1).

    The mean over disjoint blocks of `block` images, in their order, and its standard error (None for a single block).
    This estimate is unbiased and needs no random subsets. Images that do not fill a block are left out.

    Args:
        real, fake: features, (N, dim) and (M, dim).
        block: images of each kind in a block.
    """
    block = min(block, len(real), len(fake))
    pairs = zip(_blocks(real.double(), block), _blocks(fake.double(), block), strict=False)
    estimates = torch.stack([_mmd(x, y) for x, y in pairs if len(x) == len(y) == block])
    error = float(estimates.std() / len(estimates) ** 0.5) if len(estimates) > 1 else None
    return float(estimates.mean()), error


def prdc(real: Tensor, fake: Tensor, *, k: int = 5) -> dict[str, float]:
    """Returns precision and recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020, eqs. 4 and 5).

    An image is in the manifold of a set if it is nearer to an image of the set than that image's k-th neighbour is.

    Args:
        real, fake: features, (N, dim) and (M, dim), with N, M > k.
        k: the neighbour that sets the radius.
    """
    real, fake = real.double(), fake.double()
    real_radius, fake_radius = _radius(real, k), _radius(fake, k)
    # For each fake image, the number of real images in whose neighbourhood it is.
    in_real = torch.zeros(len(fake), dtype=torch.int64, device=fake.device)
    in_fake, covered = [], []
    for rows, radius in zip(_blocks(real), _blocks(real_radius), strict=True):
        distance = torch.cdist(rows, fake, compute_mode="use_mm_for_euclid_dist")
        in_real += (distance < radius[:, None]).sum(0)
        in_fake.append((distance < fake_radius).any(1))
        covered.append(distance.amin(1) < radius)
    return {
        "precision": float((in_real > 0).double().mean()),
        "recall": float(torch.cat(in_fake).double().mean()),
        "density": float(in_real.double().mean() / k),
        "coverage": float(torch.cat(covered).double().mean()),
    }


def _mmd(x: Tensor, y: Tensor) -> Tensor:
    n, dim = x.shape
    within = sum((_kernel(z, z, dim).sum() - _kernel(z, z, dim).trace()) / (n * (n - 1)) for z in (x, y))
    return within - 2 * _kernel(x, y, dim).mean()


def _kernel(x: Tensor, y: Tensor, dim: int) -> Tensor:
    return (x @ y.T / dim + 1) ** 3


def _radius(features: Tensor, k: int) -> Tensor:
    """Returns the distance of each to its k-th nearest neighbour, itself not counted."""
    distances = (torch.cdist(rows, features, compute_mode="use_mm_for_euclid_dist") for rows in _blocks(features))
    return torch.cat([distance.kthvalue(k + 1, dim=1).values for distance in distances])


def _blocks(rows: Tensor, size: int = _ROWS) -> list[Tensor]:
    return [rows[first : first + size] for first in range(0, len(rows), size)]

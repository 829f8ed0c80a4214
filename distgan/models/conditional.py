"""How networks take labels: class-conditional batch norm in the generator, projection in the discriminator."""

from torch import Tensor, nn


def embedded(embedding: nn.Embedding, y: Tensor) -> Tensor:
    """Returns the vectors of labels (N,), or of shares of classes (N, classes) the means over classes: (N, dim)."""
    return embedding(y) if y.ndim == 1 else y @ embedding.weight


class ConditionalBatchNorm2d(nn.Module):
    """Batch norm whose scale and shift belong to the image's class (Dumoulin et al. 2017; de Vries et al. 2017).

    (N, C, H, W) and labels (N,) -> (N, C, H, W). Scales begin at 1, shifts at 0; with orthogonal
    starting weights classes differ from the start. With shares of classes (N, classes) in place of labels, scale and
    shift are means over the classes.
    """

    def __init__(self, channels: int, *, classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.scale = nn.Embedding(classes, channels)
        self.shift = nn.Embedding(classes, channels)
        nn.init.ones_(self.scale.weight)
        nn.init.zeros_(self.shift.weight)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        scale, shift = (embedded(one, y) for one in (self.scale, self.shift))
        return scale[:, :, None, None] * self.norm(x) + shift[:, :, None, None]


def batch_norm(channels: int, *, classes: int) -> nn.Module:
    """Returns a generator's batch norm, class-conditional if there are classes."""
    return ConditionalBatchNorm2d(channels, classes=classes) if classes else nn.BatchNorm2d(channels)


class Projection(nn.Module):
    """The term of a logit that depends on the label (Miyato and Koyama 2018, eq. 3): <embedding(y), features>.

    Features (N, C) and labels (N,) -> (N,).
    """

    def __init__(self, channels: int, *, classes: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(classes, channels)

    def forward(self, features: Tensor, y: Tensor) -> Tensor:
        return (self.embedding(y) * features).sum(1)

"""The extractors: InceptionV3, which published FIDs use, and a small classifier that needs no download.

An extractor maps images, uint8 (N, C, H, W), to features (N, dim) and class logits (N, classes), both float32.
"""

import io
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from distgan.errors import UserError
from distgan.pictures import on_white


class Extractor(nn.Module):
    """Base of the extractors: float32, in eval mode, without gradients. A subclass sets the attributes."""

    name: str
    """Its name in `eval.extractor`."""
    dim: int
    """The number of features of an image."""
    classes: int
    """The number of classes."""
    resize: str
    """How it resizes images, for the protocol."""


class Inception(Extractor):
    """torch-fidelity's InceptionV3, which computes what the original TensorFlow graph of FID does (Heusel et al. 2017).

    It resizes to 299x299 as TensorFlow 1 did. Grey images go in as three equal channels, RGBA images on white.
    """

    name, dim, classes = "inception", 2048, 1008
    resize = "bilinear to 299x299, as in TensorFlow 1"

    def __init__(self, weights: Mapping[str, Tensor], *, layers: tuple[str, str] = ("2048", "logits_unbiased")) -> None:
        """Builds the network and loads its weights.

        Args:
            weights: the weights by name.
            layers: torch-fidelity's names of the features and of the logits; the defaults are those of FID.

        Raises:
            UserError: the weights belong to another network.
        """
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        super().__init__()
        self._layers = layers
        # torch-fidelity reads weights only from a pickle. This one is made here, of tensors that were read without one.
        pickle = io.BytesIO()
        torch.save(dict(weights), pickle)  # noqa: TID251
        pickle.seek(0)
        try:
            self.network = FeatureExtractorInceptionV3(
                "inception", list(dict.fromkeys(layers)), feature_extractor_weights_path=pickle
            )
        except RuntimeError as error:  # of load_state_dict
            raise UserError(
                "the extractor's weights are not those of InceptionV3: give the file that torch-fidelity publishes."
            ) from error

    @torch.inference_mode()
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        outputs = dict(
            zip(self.network.features_list, self.network(on_white(images).expand(-1, 3, -1, -1)), strict=True)
        )
        features, logits = (outputs[layer] for layer in self._layers)
        return features, logits


class Classifier(Extractor):
    """A small convolutional classifier of images (N, channels, *size); see `classifier.train`.

    Strided 3x3 convolutions with batch norm until the longer side is at most 4. The mean over positions is the
    features.
    """

    name, dim = "classifier", 128
    resize = "none"

    def __init__(self, *, size: tuple[int, int], channels: int, classes: int) -> None:
        super().__init__()
        self.classes = classes
        layers: list[nn.Module] = []
        width, longer = 16, max(size)
        while longer > 4:
            after = min(width, self.dim) if longer > 8 else self.dim
            layers += [nn.Conv2d(channels, after, 3, 2, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
            channels, width, longer = after, 2 * width, -(-longer // 2)
        self.convolutions = nn.Sequential(*layers)
        self.last = nn.Linear(self.dim, classes)
        self.float().eval()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x: Any = self.convolutions(images.float() / 127.5 - 1)
        features = x.mean((2, 3))
        return features, self.last(features)

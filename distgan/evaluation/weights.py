"""Finds an extractor's weights: in the user's file, the run's folder or the cache, by download or by training."""

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from distgan import data
from distgan.errors import UserError
from distgan.evaluation import classifier
from distgan.evaluation.extractors import Classifier, Extractor, Inception
from distgan.models import ImageSpec
from distgan.recipe import DataConfig, EvalConfig
from distgan.storage import bundle, cache, tensors


class Weights(NamedTuple):
    """An extractor's weights."""

    tensors: Mapping[str, Tensor]
    sha256: str
    """The hash of their file."""
    accuracy: float | None
    """The accuracy on images that it never saw, of a classifier from the cache; None for other weights."""
    file: Path


def find(config: EvalConfig, images: DataConfig | None, spec: ImageSpec, *, own: Path | None) -> Weights:
    """Reads the weights; trains or fetches them first if needed.

    Args:
        config: the extractor, and the user's file if there is one.
        images: the images that a classifier is trained on; None if the run is known to keep one.
        spec: the images that the extractor will be given.
        own: where the run keeps its classifier, if it may have one.

    Raises:
        UserError: the weights cannot be found, fetched or trained, or do not fit the extractor.
    """
    accuracy = None
    if config.extractor_weights is not None:
        file = Path(config.extractor_weights)
    elif config.extractor == "inception":
        file = _inception()
    elif own is not None and own.exists():
        file = own
    else:
        assert images is not None
        file, accuracy = _trained(images)
    read, sha256 = tensors.read_weights(file)
    weights = Weights(read, sha256, accuracy, file)
    build(config, weights, spec)  # wrong weights are refused now, before other ranks get them
    return weights


def build(config: EvalConfig, weights: Weights, spec: ImageSpec) -> Extractor:
    """Returns the extractor, on the CPU.

    Raises:
        UserError: the weights belong to another network.
    """
    if config.extractor == "inception":
        return Inception(weights.tensors)
    classes = len(weights.tensors["last.bias"]) if "last.bias" in weights.tensors else 1
    network = Classifier(size=spec.size, channels=spec.channels, classes=classes)
    tensors.load_into(network, weights.tensors, f"the extractor in {weights.file}")
    return network.requires_grad_(False)


def _trained(images: DataConfig) -> tuple[Path, float]:
    """Returns the file of these images' classifier, from the cache or trained now, and its accuracy."""
    found = data.load(images)
    if found.labels is None or found.classes is None or not (found.labels >= 0).any():
        strays = data.find(images).strays if images.source == "folder" else ""
        raise UserError(
            f"{images.source} has no labels to train the classifier on{strays and f', because {strays}'}: use the "
            "extractor inception, or give the weights of a classifier."
        )
    described = [classifier.PROCEDURE, found.fingerprint, list(found.pixels.shape), len(found.classes)]
    folder = cache.path(images, "extractors", described)
    if not bundle.is_whole(folder):
        print("training the classifier, once for these images", flush=True)
        started = time.monotonic()
        network, accuracy = classifier.train(found.pixels, found.labels, classes=len(found.classes))
        cache.put(folder, {"extractor": network.state_dict()}, {"accuracy": accuracy, "data": images.source})
        print(
            f"the classifier is right on {accuracy:.1%} of images that it never saw "
            f"({time.monotonic() - started:.0f} s): {folder}",
            flush=True,
        )
    return folder / "extractor.safetensors", bundle.read_state(folder)["accuracy"]


def _inception() -> Path:
    """Returns the file of torch-fidelity's InceptionV3 in torch's cache; fetches it if it is not there.

    Raises:
        UserError: it cannot be fetched; the message says which file to put where.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    file = Path(torch.hub.get_dir()) / "checkpoints" / URL_INCEPTION_V3.rsplit("/", 1)[1]
    if not file.exists():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            print(f"fetching InceptionV3's weights (91 MB), once: {file}", flush=True)
            torch.hub.download_url_to_file(
                URL_INCEPTION_V3, str(file), hash_prefix=tensors.INCEPTION_SHA256, progress=sys.stderr.isatty()
            )
        except (OSError, RuntimeError) as error:  # RuntimeError: another hash
            raise UserError(
                f"InceptionV3's weights cannot be fetched: on a machine with a network download {URL_INCEPTION_V3} and "
                f"put it at {file}, or give its path as the extractor's weights; the extractor classifier needs none."
            ) from error
    return file

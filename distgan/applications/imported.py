"""Takes in networks that PyTorch's textbook code for DCGAN has trained."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from distgan import files, models
from distgan.errors import UserError
from distgan.models import ImageSpec, dcgan
from distgan.recipe import ModelConfig
from distgan.storage import tensors
from distgan.storage.exported import save_generator

_SIZES = (32, 64, 128, 256)


def import_networks(generator: Path, discriminator: Path | None, to: Path) -> ImageSpec:
    """Writes a folder as `distgan export` does, of a generator and, if there is one, its discriminator.

    Layers have the textbook's names, main.0.weight and so on. Sizes are read from the weights' shapes.

    Args:
        generator: its state dict, as safetensors or as torch.save wrote it.
        discriminator: the same of the discriminator.
        to: the folder to write, new or empty.

    Raises:
        UserError: a file cannot be read, or its names and shapes are not the textbook's.
    """
    files.check_folder("--to", to)
    weights = tensors.read_state_dict(generator)
    found = dcgan.sizes(weights)
    if found is None or "latent_dim" not in found or found["image_size"] not in _SIZES:
        raise UserError(_refusal(generator, "generator", weights))
    if found["channels"] not in (1, 3, 4):
        raise UserError(f"{generator} draws {found['channels']} channels, but distgan knows 1, 3 or 4: give another.")
    spec = ImageSpec(image_size=found["image_size"], channels=found["channels"])
    judge = tensors.read_state_dict(discriminator) if discriminator is not None else None
    judged = dcgan.sizes(judge) if judge is not None else None
    if discriminator is not None and judge is not None:
        if judged is None or "latent_dim" in judged:
            raise UserError(_refusal(discriminator, "discriminator", judge))
        if (judged["image_size"], judged["channels"]) != (spec.image_size, spec.channels):
            raise UserError(
                f"{discriminator} is for images of {judged['image_size']}x{judged['image_size']}x{judged['channels']}, "
                f"but the generator draws {spec}: give the one that it was trained with."
            )
    model = ModelConfig(
        architecture="dcgan",
        width=found["width"],
        latent_dim=found["latent_dim"],
        d_width=judged["width"] if judged is not None else None,
        d_norm="batch" if judge is None or any(name.endswith("running_mean") for name in judge) else "none",
    )
    G, D = models.build(model, spec, seed=0)
    state_G = _loaded(G, weights, generator, "generator")
    state_D = None
    if discriminator is not None and judge is not None:
        state_D = _loaded(D, judge, discriminator, "discriminator")
    with files.written("--to", to):
        save_generator(to, state_G, model, spec, step=0, discriminator=state_D)
    return spec


def _loaded(network: nn.Module, state: Mapping[str, Tensor], file: Path, kind: str) -> dict[str, Tensor]:
    """Returns the network's state dict with these weights. Only batch norm's count of batches may be missing."""
    expected = network.state_dict()
    state = {**{name: value for name, value in expected.items() if name.endswith("num_batches_tracked")}, **state}
    if {name: value.shape for name, value in state.items()} != {name: value.shape for name, value in expected.items()}:
        raise UserError(_refusal(file, kind, state, expected))
    network.load_state_dict(state)
    variances = [value for name, value in network.state_dict().items() if name.endswith("running_var")]
    if any((value < 0).any() for value in variances):
        raise UserError(f"{file} has negative variances in batch norm: give the state dict of a trained network.")
    return network.state_dict()


def _refusal(file: Path, kind: str, state: Mapping[str, Tensor], expected: Mapping[str, Tensor] | None = None) -> str:
    """Says what a file has and what is expected."""
    if expected is None:
        wide = {
            "generator": "main.0.weight (latent_dim, 8 * width, 4, 4), main.1.* (batch norm), main.3.weight "
            "(8 * width, 4 * width, 4, 4), ..., the last (width, channels, 4, 4)",
            "discriminator": "main.0.weight (width, channels, 4, 4), main.2.weight (2 * width, width, 4, 4), main.3.* "
            "(batch norm), ..., the last (1, 8 * width, 4, 4)",
        }[kind]
        has = ", ".join(f"{name} {tuple(value.shape)}" for name, value in list(state.items())[:4]) or "nothing"
        return (
            f"{file} is not a {kind} of the textbook's DCGAN: give a file with {wide} at 64x64, one stage fewer at "
            f"32, one more at 128 or two more at 256. This file begins with {has}."
        )
    other = [name for name in expected if name not in state or state[name].shape != expected[name].shape]
    other += [name for name in state if name not in expected]
    name = other[0]
    shapes = [tuple(one[name].shape) if name in one else "absent" for one in (state, expected)]
    return (
        f"{file} is not a {kind} of the textbook's DCGAN: {name} is {shapes[0]}, but the other layers require it to be "
        f"{shapes[1]}: give the state dict of an unchanged network."
    )

"""Writes a generator as one ONNX file, which runs without distgan and without torch."""

import copy
import importlib.util
import logging
import math
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from distgan import files
from distgan.errors import UserError
from distgan.models import Generator, to_bytes

_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def check_onnx(file: Path, *, overwrite: bool = False) -> None:
    """Refuses what would fail only after the work.

    Raises:
        UserError: the name does not end in .onnx, the place cannot be written, or a package is missing.
    """
    if file.suffix != ".onnx":
        raise UserError(f"--onnx is {file}, but must end in .onnx.")
    files.check_place("--onnx", file, overwrite=overwrite)
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--onnx needs the packages {', '.join(missing)}: run pip install 'distgan[onnx]'.")


def write(generator: Generator, file: Path, *, as_floats: bool = False) -> float:
    """Writes the file and compares it, in onnxruntime, with torch.

    Inputs are `latents`, float32 (N, latent_dim), and with classes `labels`, int64 (N,); the output is `images`, uint8
    (N, C, H, W), or with `as_floats` float32 in [-1, 1]. N is free. Batch norm uses its running statistics, and
    spectral norm is folded into the weights.

    Returns:
        The largest difference of pixels from torch's: in [-1, 1] with `as_floats`, otherwise of 255.

    Raises:
        UserError: the file cannot be written, or its images differ from torch's: as floats by more than 1e-4, as uint8
            by more than 1.
    """
    network = _folded(generator)
    inputs = _inputs(generator, 2)
    batch = torch.export.Dim("N")
    with files.written("--onnx", file), files.whole(file) as partial, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        for form in [_Floats] if as_floats else [_Floats, _Bytes]:
            _exported(form(network), inputs, batch).save(partial, external_data=False)
            difference = _difference(partial, generator, form)
            if not difference <= _TOLERANCE[form]:  # NaN is refused, too
                raise UserError(
                    f"{file} was not written, because its images would differ by {difference:.2g} from torch's: update "
                    "onnx, onnxscript and onnxruntime, or report this."
                )
    return difference


class _Floats(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.network(latents, labels)


class _Bytes(_Floats):
    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        return to_bytes(self.network(latents, labels))


_TOLERANCE: dict[type[_Floats], float] = {_Floats: 1e-4, _Bytes: 1}
"""The largest difference from torch's images that a file may have."""


def _folded(generator: Generator) -> Generator:
    """Returns a copy on the CPU, in eval mode, in which parametrized weights are plain ones."""
    network = copy.deepcopy(generator).cpu().float().eval()
    for part in list(network.modules()):
        if parametrize.is_parametrized(part, "weight"):
            # Removal takes `weight` from the part's class, which the original shares: the copy gets one of its own.
            own = type(part)
            part.__class__ = type(own.__name__, own.__bases__, dict(own.__dict__))
            parametrize.remove_parametrizations(part, "weight", leave_parametrized=True)
    return network.requires_grad_(False)


def _inputs(generator: Generator, count: int, *, seed: int = 0) -> tuple[Tensor, ...]:
    z, y = generator.inputs(0, seed=seed, stream="onnx")
    return (z[:count].cpu().float(),) + ((y[:count].cpu(),) if y is not None else ())


def _exported(network: nn.Module, inputs: tuple[Tensor, ...], batch: torch.export.Dim) -> torch.onnx.ONNXProgram:
    names = ["latents", "labels"][: len(inputs)]
    program = torch.onnx.export(
        network,
        inputs,
        input_names=names,
        output_names=["images"],
        dynamic_shapes={name: {0: batch} for name in names},
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    assert program is not None
    return program


def _difference(file: Path, generator: Generator, form: "type[_Floats]") -> float:
    """Returns the largest difference from torch's images, for batches of 1, 3 and 64."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]
    network, largest = form(copy.deepcopy(generator).cpu().float().eval()), 0.0
    for count in (1, 3, 64):
        inputs = _inputs(generator, count, seed=count)
        (ours,) = session.run(None, {name: value.numpy() for name, value in zip(names, inputs, strict=True)})
        with torch.no_grad():
            apart = float((network(*inputs).double() - torch.from_numpy(ours).double()).abs().max())
        largest = apart if math.isnan(apart) else max(largest, apart)
    return largest

"""A generator as one ONNX file, and networks trained elsewhere taken in."""

import re
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import save_file
from support.commands import complaint
from support.generators import NAMES, exported
from support.runs import REPOSITORY
from torch import nn

from distgan import cli, load_generator, models
from distgan.applications import onnx_file
from distgan.models.spectral_norm import apply_spectral_norm
from distgan.storage import exported as storage


@pytest.mark.parametrize("architecture", [*models.ARCHITECTURES])
@pytest.mark.parametrize("names", [(), NAMES])
def test_onnxruntime_draws_what_torch_draws(tmp_path, architecture, names):
    folder = exported(tmp_path / "g", architecture=architecture, names=names, channels=1 if names else 3)
    generator = load_generator(folder)
    for form, options in (("uint8", []), ("float", ["--floats"])):
        file = tmp_path / f"{form}.onnx"
        assert cli.main(["export", str(folder), f"--onnx={file}", *options]) == 0
        session = onnxruntime.InferenceSession(str(file))
        inputs = {one.name: one.type for one in session.get_inputs()}
        assert inputs == {"latents": "tensor(float)", **({"labels": "tensor(int64)"} if names else {})}
        for count in (1, 5, 130):
            z = torch.randn(count, 16)
            y = torch.randint(len(names), (count,)) if names else None
            given = {"latents": z.numpy(), **({"labels": y.numpy()} if y is not None else {})}
            (images,) = session.run(["images"], given)
            with torch.no_grad():
                expected = generator(z, y)
            if form == "float":
                np.testing.assert_allclose(images, expected.numpy(), atol=1e-4)
            else:
                assert images.dtype == np.uint8
                difference = images.astype(int) - models.to_bytes(expected).numpy().astype(int)
                assert abs(difference).max() <= 1
                assert (difference == 0).mean() > 0.999
    assert sorted(file.name for file in tmp_path.iterdir()) == ["float.onnx", "g", "uint8.onnx"]


def test_spectral_norm_is_folded_into_the_weights(tmp_path):
    generator = load_generator(exported(tmp_path / "g", architecture="resnet"))
    apply_spectral_norm(generator, torch.Generator().manual_seed(0), embeddings=True)
    assert onnx_file.write(generator, tmp_path / "g.onnx", as_floats=True) < 1e-4
    stored = {one.name for one in onnx.load(tmp_path / "g.onnx").graph.initializer}
    assert "network.first.weight" in stored
    assert not [name for name in stored if "parametrizations" in name]
    assert nn.utils.parametrize.is_parametrized(generator.last)  # the generator itself keeps it


def test_a_file_that_draws_something_else_is_not_written(tmp_path, monkeypatch):
    generator = load_generator(exported(tmp_path / "g"))
    other = load_generator(exported(tmp_path / "other", latent_dim=16, architecture="resnet"))
    monkeypatch.setattr(onnx_file, "_folded", lambda generator: other)
    with pytest.raises(ValueError, match="would differ by"):
        onnx_file.write(generator, tmp_path / "g.onnx")
    assert not (tmp_path / "g.onnx").exists()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ["--to DIR", "--onnx FILE"]),
        (["--onnx=g.pb"], ["g.pb", ".onnx"]),
        (["--onnx=there.onnx"], ["there.onnx, which exists", "--overwrite"]),
        (["--onnx=no/g.onnx"], ["no folder no"]),
        (["--onnx=g.onnx", "--push-to-hub=me/it"], ["--push-to-hub has no meaning without --to"]),
        (["--to=out", "--floats"], ["--floats has no meaning without --onnx"]),
        (["--to=out", "--with-discriminator"], ["no config.yaml"]),
    ],
)
def test_mistakes_are_said(tmp_path, monkeypatch, capfd, argv, words):
    monkeypatch.chdir(tmp_path)
    folder = exported(tmp_path / "g")
    (tmp_path / "there.onnx").write_text("")
    said = complaint(capfd, "export", str(folder), *argv)
    assert all(word in said for word in words), said
    assert sorted(file.name for file in tmp_path.iterdir()) == ["g", "there.onnx"]


def test_without_the_packages_the_command_for_them_is_said(tmp_path, monkeypatch, capfd):
    folder = exported(tmp_path / "g")
    find = onnx_file.importlib.util.find_spec
    monkeypatch.setattr(onnx_file.importlib.util, "find_spec", lambda name: None if "onnx" in name else find(name))
    said = complaint(capfd, "export", str(folder), f"--onnx={tmp_path}/g.onnx")
    assert "onnx, onnxscript, onnxruntime: run pip install 'distgan[onnx]'" in said
    monkeypatch.setattr(onnx_file.importlib.util, "find_spec", lambda name: None if name == "av" else find(name))
    said = complaint(capfd, "interpolate", str(folder), f"--out={tmp_path}/w.mp4")
    assert "pip install 'distgan[video]'" in said


def test_a_discriminator_is_handed_on_if_that_is_asked_for(small_run, tmp_path):
    plain, both = tmp_path / "plain", tmp_path / "both"
    assert cli.main(["export", str(small_run), f"--to={plain}"]) == 0
    assert cli.main(["export", str(small_run), f"--to={both}", "--with-discriminator"]) == 0
    assert storage.find(str(plain)).discriminator() is None
    theirs, ours = (storage.find(str(folder)).discriminator() for folder in (small_run, both))
    assert all(torch.equal(theirs.state_dict()[name], tensor) for name, tensor in ours.state_dict().items())


# Networks from elsewhere ----------------------------------------------------------------------------------------------


def textbook(size=64, latent=100, width=8, channels=3):
    """Generator and discriminator as PyTorch's tutorial and examples write them, with fewer or more stages by size."""
    stages = {32: 3, 64: 4, 128: 5}[size]
    wide = width * 2 ** (stages - 1)
    g = [nn.ConvTranspose2d(latent, wide, 4, 1, 0, bias=False), nn.BatchNorm2d(wide), nn.ReLU(True)]
    for i in range(stages - 1):
        a, b = wide // 2**i, wide // 2 ** (i + 1)
        g += [nn.ConvTranspose2d(a, b, 4, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU(True)]
    g += [nn.ConvTranspose2d(width, channels, 4, 2, 1, bias=False), nn.Tanh()]
    d = [nn.Conv2d(channels, width, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, True)]
    for i in range(stages - 1):
        a, b = width * 2**i, width * 2 ** (i + 1)
        d += [nn.Conv2d(a, b, 4, 2, 1, bias=False), nn.BatchNorm2d(b), nn.LeakyReLU(0.2, True)]
    d += [nn.Conv2d(wide, 1, 4, 1, 0, bias=False), nn.Sigmoid()]
    networks = []
    for layers in (g, d):
        network = nn.Module()
        network.main = nn.Sequential(*layers)
        networks.append(network)
    with torch.no_grad():  # statistics of batch norm that are not the starting ones
        networks[1].main(networks[0].main(torch.randn(32, latent, 1, 1)))
    return networks


@pytest.mark.parametrize("form", ["pickle", "safetensors", "parallel"])
@pytest.mark.parametrize(("size", "latent", "channels"), [(64, 100, 3), (32, 7, 1), (128, 64, 3)])
def test_the_textbooks_networks_draw_and_judge_the_same_here(tmp_path, form, size, latent, channels):
    generator, discriminator = textbook(size, latent, channels=channels)
    files = []
    for name, network in (("G", generator), ("D", discriminator)):
        state = network.state_dict()
        if form == "parallel":  # as DataParallel saves it
            state = {f"module.{key}": value for key, value in state.items()}
        file = tmp_path / f"{name}.{'safetensors' if form == 'safetensors' else 'pth'}"
        save_file(state, file) if form == "safetensors" else torch.save(state, file)  # noqa: TID251
        files.append(file)
    to = tmp_path / "to"
    argv = ["import", f"--generator={files[0]}", f"--discriminator={files[1]}", f"--to={to}"]
    assert cli.main(argv) == 0
    found = storage.find(str(to))
    z = torch.randn(5, latent)
    with torch.no_grad():
        images = generator.eval().main(z[:, :, None, None])
        torch.testing.assert_close(found.generator(z), images)
        judged = discriminator.eval().main(images).flatten()
        torch.testing.assert_close(torch.sigmoid(found.discriminator()(images)), judged)
    assert found.generator.sample(2).shape == (2, channels, size, size)


def test_what_is_no_textbook_network_is_refused_with_what_is_expected(tmp_path, capfd):
    generator, discriminator = textbook()
    files = {
        "G": generator.state_dict(),
        "D": discriminator.state_dict(),
        "D32": textbook(32)[1].state_dict(),
        "other": nn.Linear(3, 4).state_dict(),
        "shape": {**generator.state_dict(), "main.4.bias": torch.zeros(5)},
        "more": {**generator.state_dict(), "main.99.bias": torch.zeros(5)},
        "nested": {"netG": generator.state_dict(), "epoch": 3},
        "module": generator.main,  # a pickle of code
        "empty": {},
    }
    for name, content in files.items():
        torch.save(content, tmp_path / f"{name}.pth")  # noqa: TID251
    (tmp_path / "noise.pth").write_bytes(b"noise")
    for chosen, words in (
        (
            ["--generator=other"],
            ["main.0.weight (latent_dim, 8 * width, 4, 4)", "begins with weight (4, 3), bias (4,)"],
        ),
        (["--generator=D"], ["is not a generator of the textbook's DCGAN"]),
        (["--generator=G", "--discriminator=G"], ["is not a discriminator of the textbook's DCGAN"]),
        (["--generator=G", "--discriminator=D32"], ["images of 32x32x3", "draws 64x64x3"]),
        (["--generator=shape"], ["main.4.bias is (5,), but the other layers require it to be (32,)"]),
        (["--generator=more"], ["main.99.bias is (5,), but the other layers require it to be absent"]),
        (["--generator=nested"], ["holds netG, epoch", "torch.save(network.state_dict(), FILE)"]),
        (["--generator=module"], ["neither safetensors nor a state dict"]),
        (["--generator=noise"], ["neither safetensors nor a state dict"]),
        (["--generator=empty"], ["begins with nothing"]),
        (["--generator=nowhere"], ["nowhere.pth cannot be read"]),
    ):
        argv = [f"{word.replace('=', f'={tmp_path}/')}.pth" for word in chosen]
        said = complaint(capfd, "import", *argv, f"--to={tmp_path}/to")
        assert all(word in said for word in words), said
        assert not (tmp_path / "to").exists()


class Evil:
    def __reduce__(self):
        return exec, ("open('ran', 'w')",)


def test_a_pickle_that_runs_code_is_not_run(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    torch.save({"main.0.weight": Evil()}, "evil.pth")  # noqa: TID251
    complaint(capfd, "import", "--generator=evil.pth", "--to=to")
    assert not (tmp_path / "ran").exists()


def test_documented_programs_run_the_file(tmp_path):
    """The Python blocks of docs/applications.md: onnxruntime with numpy, and from Keras."""
    folder = exported(tmp_path / "g", latent_dim=64)
    assert cli.main(["export", str(folder), f"--onnx={tmp_path}/generator.onnx"]) == 0
    blocks = re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs" / "applications.md").read_text(), re.S)
    assert blocks
    for block in blocks:
        command = [sys.executable, "-c", block]
        environment = {"KERAS_BACKEND": "torch", "PATH": "", "HOME": str(tmp_path)}
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr

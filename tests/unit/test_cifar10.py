"""CIFAR-10 in the versions that its author publishes, and Fashion-MNIST as torchvision keeps it."""

import gzip
import io
import os
import shutil
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.runs import REPOSITORY

from distgan import cli, data
from distgan.data import cifar
from distgan.data.decode import picture
from distgan.recipe import DataConfig

NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
FILES = [f"data_batch_{i}.bin" for i in range(1, 6)]


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).integers(0, 256, (60, 3, 32, 32), dtype=np.uint8)


@pytest.fixture
def binary(tmp_path, pixels):
    """torchvision's root folder with the binary version: 10 images in each file, the last ones in the test split."""
    folder = tmp_path / "root" / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    for k, name in enumerate([*FILES, "test_batch.bin"]):
        rows = [bytes([i % 10]) + pixels[i].tobytes() for i in range(10 * k, 10 * k + 10)]
        (folder / name).write_bytes(b"".join(rows))
    (folder / "batches.meta.txt").write_text("\n".join(NAMES) + "\n\n")
    return folder


def archive(folder, path, names=None, prefix="cifar-10-batches-bin/"):
    """As published: compressed, the files in an order of their own."""
    with tarfile.open(path, "w:gz") as tar:
        for name in names or ["test_batch.bin", "data_batch_4.bin", "batches.meta.txt", *FILES[:3], FILES[4]]:
            tar.add(folder / name, f"{prefix}{name}")
    return path


def load(path, **settings):
    return data.load(DataConfig(source="cifar10", path=str(path), **settings))


def test_the_binary_version_is_read_from_its_folder_the_root_and_the_archive(tmp_path, binary, pixels):
    tar = archive(binary, tmp_path / "cifar-10-binary.tar.gz", prefix="../../outside/")
    for path in (binary, binary.parent, tar, tmp_path):
        images = load(path)
        assert np.array_equal(images.pixels.numpy(), pixels[:50])
        assert images.labels.tolist() == [i % 10 for i in range(50)]
        assert images.classes == tuple(NAMES)
        test = load(path, split="test")
        assert np.array_equal(test.pixels.numpy(), pixels[50:])
        assert test.labels.tolist() == list(range(10))
    assert load(tar).fingerprint == load(binary).fingerprint != load(tar, split="test").fingerprint
    assert {file.name for file in tmp_path.iterdir()} == {"root", tar.name}  # nothing was unpacked
    config = DataConfig(source="cifar10", path=str(tar))
    previewed, labels, _ = data.preview(data.find(config), config, 8)  # every 7th, over the ends of files
    assert np.array_equal(previewed.numpy(), pixels[:50:7])
    assert labels.tolist() == [i % 10 for i in range(0, 50, 7)]
    luma = np.stack([np.array(Image.fromarray(one.transpose(1, 2, 0)).convert("L")) for one in pixels[:50]])
    assert np.array_equal(load(binary, channels=1).pixels[:, 0].numpy(), luma)
    (binary / "batches.meta.txt").unlink()
    assert load(binary).classes == tuple(NAMES)


def test_the_binary_version_goes_through_data_and_check(tmp_path, binary, capsys):
    assert cli.main(["data", "cifar10", "--path", str(binary.parent), "--out", str(tmp_path / "data.png")]) == 0
    said = capsys.readouterr().out
    assert "images       50\n" in said
    assert "50 of 32x32 RGB" in said
    assert "7 horse" in said
    run = [f"--run.dir={tmp_path / 'run'}", "--data.source=cifar10", f"--data.path={binary}", "--train.batch_size=10"]
    assert cli.main(["train", "--check", *run, "--model.width=4"]) == 0


def rewrite(file, change):
    file.write_bytes(change(file.read_bytes()))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / FILES[2]).unlink(), r"data_batch_3\.bin.* is missing"),
        (lambda folder: rewrite(folder / FILES[4], lambda b: b[:-1]), r"data_batch_5\.bin.* has 30,729 bytes"),
        (lambda folder: rewrite(folder / FILES[4], lambda b: b""), r"data_batch_5\.bin.* has 0 bytes"),
        (lambda folder: rewrite(folder / FILES[1], lambda b: b"\x0a" + b[1:]), r"data_batch_2\.bin.* the label 10"),
        (lambda folder: rewrite(folder / "batches.meta.txt", lambda b: b"cat dog"), r"batches\.meta\.txt.* names 2"),
    ],
    ids=["missing", "cut", "empty", "label", "names"],
)
def test_damage_to_the_binary_version_is_one_sentence_with_the_file(tmp_path, binary, damage, words):
    damage(binary)
    there = [file.name for file in binary.iterdir()]
    for path in (binary, archive(binary, tmp_path / "cifar.tar.gz", there)):
        with pytest.raises(ValueError, match=words) as error:
            load(path)
        assert "\n" not in str(error.value)


def test_damaged_and_hostile_archives_are_refused(tmp_path, binary, pixels, monkeypatch):
    tar = archive(binary, tmp_path / "cifar-10-binary.tar.gz")
    whole, rng, refused = tar.read_bytes(), np.random.default_rng(0), 0
    for _ in range(60):
        content = bytearray(whole)
        at = int(rng.integers(20, len(content)))
        if rng.random() < 0.5:
            content[at] ^= 1 << int(rng.integers(8))
        else:
            del content[at:]
        tar.write_bytes(content)
        try:
            images = load(tar)
        except ValueError as error:
            refused += 1
            assert "cifar-10-binary.tar.gz is damaged or cut short" in str(error)
        else:  # between the end of the deflated data and the checksums there is nothing
            assert np.array_equal(images.pixels.numpy(), pixels[:50])
    assert refused > 55
    monkeypatch.setattr(cifar, "_LARGEST", 2**22)  # of a gigabyte, which would take seconds
    tar.write_bytes(gzip.compress(bytes(2**22 + 1)))
    with pytest.raises(ValueError, match="would unpack to more than"):
        load(tar)
    with tarfile.open(tar, "w") as uncompressed:
        uncompressed.add(binary / "data_batch_1.bin", "data_batch_1.bin")
    with pytest.raises(
        ValueError, match="is a tar archive without compression, though its name says otherwise: unpack"
    ):
        load(tar)
    with tarfile.open(tar, "w:gz") as linked:
        for name in FILES:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, str(binary / name)
            linked.addfile(member)
    with pytest.raises(ValueError, match=r"holds no data_batch_1\.bin"):
        load(tar)


def python_version(root):
    (root / "cifar-10-batches-py").mkdir(parents=True)
    for name in ("data_batch_1", "test_batch", "batches.meta"):
        (root / "cifar-10-batches-py" / name).write_bytes(b"cos\nsystem\n(S'touch hacked'\ntR.")
    return root / "cifar-10-batches-py"


def test_of_other_versions_it_is_said_what_they_are_and_what_to_fetch(tmp_path):
    folder = python_version(tmp_path / "data")
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as tar:
        tar.add(folder, folder.name)
    for path in (folder, folder.parent, tmp_path / "cifar-10-python.tar.gz", tmp_path):
        with pytest.raises(ValueError, match=r"is the Python version of CIFAR-10, which is a pickle.*binary version"):
            load(path)
    hundred = tmp_path / "hundred" / "cifar-100-binary"
    hundred.mkdir(parents=True)
    for name in ("train.bin", "test.bin", "fine_label_names.txt", "coarse_label_names.txt"):
        (hundred / name).write_bytes(bytes(3074))
    with tarfile.open(tmp_path / "cifar.tgz", "w:gz") as tar:
        tar.add(hundred, hundred.name)
    for path in (hundred, hundred.parent, tmp_path / "cifar.tgz"):
        with pytest.raises(ValueError, match=r"is CIFAR-100, but data\.source is cifar10"):
            load(path)
    (tmp_path / "cifar.zip").write_bytes(b"")
    with pytest.raises(ValueError, match=r"cifar\.zip, but must be a folder, or the original CIFAR-10's \.tar\.gz"):
        load(tmp_path / "cifar.zip")


def test_settings_that_the_originals_do_not_have_are_refused(tmp_path, binary):
    with pytest.raises(ValueError, match=r"data\.split is validation, but the original CIFAR-10 has train and test"):
        load(binary, split="validation")
    with pytest.raises(ValueError, match=r"data\.config is plain_text, which the files in .* do not use"):
        load(binary, config="plain_text")


@pytest.mark.parametrize("ending", [".gz", ""])
def test_fashion_mnist_as_torchvision_keeps_it(tmp_path, pixels, ending):
    grey, raw = pixels[:, 0], tmp_path / "root" / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    pack = gzip.compress if ending else bytes
    for name, part in {"train": slice(0, 50), "t10k": slice(50, 60)}.items():
        images = b"\0\0\x08\x03" + struct.pack(">3I", *grey[part].shape) + grey[part].tobytes()
        labels = [i % 10 for i in range(60)][part]
        (raw / f"{name}-images-idx3-ubyte{ending}").write_bytes(pack(images))
        (raw / f"{name}-labels-idx1-ubyte{ending}").write_bytes(
            pack(b"\0\0\x08\x01" + struct.pack(">I", len(labels)) + bytes(labels))
        )
    for path in (raw, raw.parent, raw.parent.parent):
        train, test = (
            data.load(DataConfig(source="fashion_mnist", path=str(path), split=split)) for split in ("train", "test")
        )
        assert np.array_equal(train.pixels[:, 0].numpy(), grey[:50])
        assert np.array_equal(test.pixels[:, 0].numpy(), grey[50:])
        assert train.labels.tolist() == [i % 10 for i in range(50)]
    rewrite(raw / f"train-images-idx3-ubyte{ending}", lambda b: b[:-1])
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte.* is damaged or cut short|what its header says"):
        data.load(DataConfig(source="fashion_mnist", path=str(raw)))


@pytest.mark.long
def test_cifar10_itself(tmp_path, capsys):
    """All of a copy in the hub's layout, where there is one."""
    place = Path(os.environ.get("DISTGAN_CIFAR10", REPOSITORY.parent / "shared" / "cifar10"))
    if not place.is_dir():
        pytest.skip("needs a copy of uoft-cs/cifar10: set DISTGAN_CIFAR10 to its folder")
    assert cli.main(["data", "cifar10", "--path", str(place), "--out", str(tmp_path / "data.png")]) == 0
    said = capsys.readouterr().out
    assert "images       50,000\n" in said
    assert all(f"{i} {name}" in said for i, name in enumerate(NAMES))
    run = [f"--run.dir={tmp_path / 'run'}", f"--data.path={place}", "--config", "configs/cifar10_dcgan.yaml"]
    assert cli.main(["train", "--check", *run, f"--data.cache={tmp_path}", "--model.width=4"]) == 0
    for split, count in {"train": 5000, "test": 1000}.items():
        images = load(place, split=split, cache=str(tmp_path))
        assert np.bincount(images.labels.numpy()).tolist() == [count] * 10
        # Of natural pictures neighbouring pixels are alike, and their mean is near 0.47 (commonly 0.491, 0.482, 0.447).
        assert images.pixels.float().mean((0, 2, 3)).div(255).tolist() == pytest.approx([0.491, 0.482, 0.447], abs=0.01)
    shutil.rmtree(tmp_path / "stores")


def test_an_image_of_planes_is_what_pillow_makes_of_it(pixels):
    stream = io.BytesIO()
    Image.fromarray(pixels[0].transpose(1, 2, 0)).save(stream, "PNG")
    for channels in (1, 3):
        for size in ((32, 32), (64, 64)):
            of_bytes = picture(stream.getvalue(), size=size, channels=channels, scale=None)
            assert np.array_equal(picture(pixels[0], size=size, channels=channels, scale=None), of_bytes)

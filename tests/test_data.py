"""Sources and batches, on real files read by the real library."""

import io

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from distgan import data
from distgan.config import DataConfig


def cifar_folder(folder, pictures, *, column="img", parts=2):
    """A local copy of the hub's layout: plain_text/train-0000i-of-0000n.parquet with PNG bytes and a class label."""
    features = datasets.Features({column: datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
    (folder / "plain_text").mkdir(parents=True)
    for i in range(parts):
        rows = pictures[i::parts]
        encoded = []
        for picture in rows:
            stream = io.BytesIO()
            Image.fromarray(picture).save(stream, "PNG")
            encoded.append({"bytes": stream.getvalue(), "path": None})
        split = datasets.Dataset.from_dict({column: encoded, "label": [0] * len(rows)}, features=features)
        split.to_parquet(folder / "plain_text" / f"train-{i:05d}-of-{parts:05d}.parquet")
    test = datasets.Dataset.from_dict({column: [], "label": []}, features=features)
    test.to_parquet(folder / "plain_text" / "test-00000-of-00001.parquet")
    return folder


@pytest.fixture(scope="module")
def pictures():
    return np.random.default_rng(0).integers(0, 256, (11, 32, 32, 3), dtype=np.uint8)


def test_cifar10_from_a_local_folder_is_what_the_files_hold(tmp_path, pictures):
    folder = cifar_folder(tmp_path / "cifar10", pictures)
    images = data.load(DataConfig(source="cifar10", path=str(folder)))
    expected = np.concatenate([pictures[0::2], pictures[1::2]]).transpose(0, 3, 1, 2)
    assert images.pixels.dtype == torch.uint8
    assert np.array_equal(images.pixels.numpy(), expected)
    larger = data.load(DataConfig(source="cifar10", path=str(folder), image_size=64))
    assert larger.pixels.shape == (11, 3, 64, 64)
    assert larger.fingerprint == images.fingerprint
    other = data.load(DataConfig(source="cifar10", path=str(cifar_folder(tmp_path / "other", pictures[::-1]))))
    assert other.fingerprint != images.fingerprint


def test_digits_are_scikit_learns():
    images = data.load(DataConfig())
    assert images.pixels.shape == (1797, 1, 32, 32)
    small = torch.nn.functional.interpolate(images.pixels.float(), (8, 8), mode="area").squeeze(1)
    original = torch.from_numpy(load_digits().images).float() * 255 / 16
    correlation = np.corrcoef(small.flatten(), original.flatten())[0, 1]
    assert correlation > 0.97
    assert images.pixels.float().mean().item() == pytest.approx(original.mean().item(), rel=0.02)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: [file.unlink() for file in folder.rglob("train*")], ["no train-*.parquet"]),
        (lambda folder: cut(folder / "plain_text" / "train-00001-of-00002.parquet"), ["train-00001-of-00002.parquet"]),
        (
            lambda folder: cut(folder / "plain_text" / "train-00000-of-00002.parquet", 0),
            ["train-00000-of-00002.parquet"],
        ),
    ],
    ids=["other layout", "truncated", "empty file"],
)
def test_a_folder_that_is_no_cifar10_is_refused(tmp_path, pictures, damage, words):
    folder = cifar_folder(tmp_path / "cifar10", pictures)
    damage(folder)
    with pytest.raises(ValueError, match=r"data\.path") as error:
        data.load(DataConfig(source="cifar10", path=str(folder)))
    assert all(word in str(error.value) for word in words)


def test_other_columns_and_empty_splits_are_refused(tmp_path, pictures):
    wrong = cifar_folder(tmp_path / "wrong", pictures, column="image")
    with pytest.raises(ValueError, match="no column img; its columns are image, label"):
        data.load(DataConfig(source="cifar10", path=str(wrong)))
    empty = cifar_folder(tmp_path / "empty", pictures[:0], parts=1)
    with pytest.raises(ValueError, match="empty"):
        data.load(DataConfig(source="cifar10", path=str(empty)))


def test_without_network_and_cache_the_local_way_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))  # HF_HUB_OFFLINE is set in conftest.py
    with pytest.raises(ValueError, match=r"--data\.path=DIR"):
        data.load(DataConfig(source="cifar10"))


@pytest.mark.parametrize("placement", ["auto", "device", "host"])
def test_shares_of_batches_make_up_the_global_batch(pictures, placement):
    images = data.Images(torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous(), "")
    config = DataConfig(flip=True, placement=placement)

    def batch(share, step=0, k=0):
        feed = data.Batches(images, config, seed=0, batch_size=6, d_steps=2, share=share, device=torch.device("cpu"))
        return feed.at(step, k)[0]

    whole = [batch(slice(0, 6), step, k) for step in (0, 1) for k in (0, 1)]
    for i, (step, k) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        parts = [batch(slice(2 * r, 2 * r + 2), step, k) for r in range(3)]
        assert torch.equal(torch.cat(parts), whole[i])
    seen = torch.cat(whole)
    originals = images.pixels.float() / 127.5 - 1
    kinds = []
    for image in seen:
        as_is, mirrored = ((originals == x).flatten(1).all(1).any().item() for x in (image, image.flip(-1)))
        assert as_is != mirrored
        kinds.append(mirrored)
    assert 0 < sum(kinds) < len(kinds)  # some as they are, some mirrored
    assert seen.min() >= -1
    assert seen.max() <= 1


def cut(file, to=-100):
    file.write_bytes(file.read_bytes()[:to])

"""Sources and batches, on real files read by the real library."""

import dataclasses
import io
import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from support.pictures import idx_folder
from support.programs import processes

from distgan import data, seeding
from distgan.data import sources, store
from distgan.recipe import DataConfig


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
        labels = [(i + parts * j) % 10 for j in range(len(rows))]
        split = datasets.Dataset.from_dict({column: encoded, "label": labels}, features=features)
        split.to_parquet(folder / "plain_text" / f"train-{i:05d}-of-{parts:05d}.parquet")
    test = datasets.Dataset.from_dict({column: [], "label": []}, features=features)
    test.to_parquet(folder / "plain_text" / "test-00000-of-00001.parquet")
    return folder


def in_file_order(pictures):
    return np.concatenate([pictures[0::2], pictures[1::2]]).transpose(0, 3, 1, 2)


@pytest.fixture(scope="module")
def pictures():
    return np.random.default_rng(0).integers(0, 256, (11, 32, 32, 3), dtype=np.uint8)


def test_cifar10_from_a_local_folder_is_what_the_files_hold(tmp_path, pictures):
    folder = cifar_folder(tmp_path / "cifar10", pictures)
    images = data.load(DataConfig(source="cifar10", path=str(folder)))
    expected = in_file_order(pictures)
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
    with pytest.raises(ValueError, match=r"data\.path|not a readable parquet file") as error:
        data.load(DataConfig(source="cifar10", path=str(folder)))
    assert all(word in str(error.value) for word in words)


def test_columns_are_found_or_named_and_empty_splits_refused(tmp_path, pictures):
    other = cifar_folder(tmp_path / "other", pictures, column="picture")
    found = data.load(DataConfig(source="hub", id="owner/name", path=str(other)))
    assert np.array_equal(found.pixels.numpy(), in_file_order(pictures))
    assert found.labels.tolist() == [i % 10 for i in (*range(0, 11, 2), *range(1, 11, 2))]
    assert found.classes == tuple("0123456789")
    for column, words in {"pictur": 'did you mean "picture"', "label": "holds no images"}.items():
        with pytest.raises(ValueError, match=words):
            data.load(DataConfig(source="cifar10", path=str(other), image_column=column))
    with pytest.raises(ValueError, match=r"data\.label_column.*holds no class labels"):
        data.load(DataConfig(source="cifar10", path=str(other), label_column="picture"))
    empty = cifar_folder(tmp_path / "empty", pictures[:0], parts=1)
    with pytest.raises(ValueError, match="empty"):
        data.load(DataConfig(source="cifar10", path=str(empty)))


def test_without_network_and_cache_the_local_way_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))  # HF_HUB_OFFLINE is set in support/runs.py
    with pytest.raises(ValueError, match=r"--data\.path=DIR"):
        data.load(DataConfig(source="cifar10"))


def feed_of(images, config, shares, *, labels=True, d_steps=1, g_batch="shared", batch=6):
    device, steps = torch.device("cpu"), {"d_steps": d_steps, "g_batch": g_batch}
    return data.Feed(
        images, config, labels=labels, latent_dim=2, seed=0, batch_size=batch, shares=shares, device=device, **steps
    )


@pytest.mark.parametrize("placement", ["auto", "device", "host", "disk"])
def test_shares_of_batches_make_up_the_global_batch(tmp_path, pictures, placement):
    folder = cifar_folder(tmp_path / "cifar10", pictures)
    images = data.load(DataConfig(source="cifar10", path=str(folder)))
    config = DataConfig(flip=True, placement=placement)
    originals = images.pixels.float() / 127.5 - 1

    def batch(share, update):
        (labelled,) = feed_of(images, config, [share]).for_discriminator(update, 0)
        (unlabelled,) = feed_of(images, config, [share], labels=False).for_discriminator(update, 0)
        pixels = labelled.real
        assert torch.equal(pixels, unlabelled.real)
        assert unlabelled.y is None
        for image, label in zip(pixels, labelled.y, strict=True):  # each its own
            matching = sum((originals == x).flatten(1).all(1) for x in (image, image.flip(-1))) > 0
            assert label == images.labels[matching].item()
        return pixels

    whole = [batch(slice(0, 6), update) for update in range(4)]
    for update in range(4):
        parts = [batch(*data.shares(6, rank=rank, world=3), update) for rank in range(3)]
        assert torch.equal(torch.cat(parts), whole[update])
    seen = torch.cat(whole)
    kinds = []
    for image in seen:
        as_is, mirrored = ((originals == x).flatten(1).all(1).any().item() for x in (image, image.flip(-1)))
        assert as_is != mirrored
        kinds.append(mirrored)
    assert 0 < sum(kinds) < len(kinds)  # some as they are, some mirrored
    assert seen.min() >= -1
    assert seen.max() <= 1


def test_placements_and_pieces_give_the_same_batches_bit_for_bit(tmp_path, pictures):
    images = data.load(DataConfig(source="cifar10", path=str(cifar_folder(tmp_path / "cifar10", pictures))))

    def batches(placement, shares):
        config = DataConfig(flip=True, placement=placement)
        feed = feed_of(images, config, shares)
        order = [0, 1, 1, 2, 3, 3, 0, 4, 5]  # the last again, as G's half asks for it, and one out of turn
        seen = [list(feed.for_discriminator(step, 0)) for step in order]
        assert all(torch.equal(a.real, b.real) and torch.equal(a.z, b.z) for a, b in zip(seen[0], seen[6], strict=True))
        kept = [batch for i in (0, 1, 3, 4, 7, 8) for batch in seen[i]]
        assert [batch.last for batch in kept] == [i == len(shares) - 1 for _ in range(6) for i in range(len(shares))]
        assert sum(batch.weight for batch in seen[0]) == pytest.approx(1)
        draws = [batch.draw("a stream", 2) for batch in kept]
        return tuple(map(torch.cat, ([b.real for b in kept], [b.y for b in kept], [b.z for b in kept], draws)))

    expected = batches("auto", [slice(0, 6)])
    for placement in ("auto", "device", "host", "disk"):
        for shares in (data.shares(6, rank=0, world=1, most=most) for most in (None, 2)):
            assert all(map(torch.equal, batches(placement, shares), expected))


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """30,000 images in a store: more than seven windows."""
    folder, rng = tmp_path_factory.mktemp("many"), np.random.default_rng(0)
    pixels = rng.integers(0, 256, (30_000, 1, 32, 32), dtype=np.uint8)
    pixels.tofile(folder / "images.bin")
    images = data.load(DataConfig())
    labels = torch.arange(30_000) % 10
    return dataclasses.replace(images, pixels=torch.from_numpy(pixels), labels=labels, folder=folder)


def test_a_window_gives_the_same_batches_from_disk_to_any_number_of_ranks_and_from_any_step(many):
    def batches(placement, world=1, first=0, window=4096):
        config = DataConfig(flip=True, placement=placement, window=window)
        shares = [data.shares(600, rank=rank, world=world) for rank in range(world)]
        feeds = [feed_of(many, config, share, batch=600) for share in shares]
        steps = range(first, 60)  # one epoch and a fifth
        drawn = [[next(feed.for_discriminator(step, 0)) for feed in feeds] for step in steps]
        return [(torch.cat([b.real for b in parts]), torch.cat([b.y for b in parts])) for parts in drawn]

    expected = batches("host")
    assert torch.cat([real for real, _ in expected[:50]]).flatten(1)[:, :20].unique(dim=0).shape[0] == 30_000
    for others in (batches("disk"), batches("disk", world=2), batches("disk", world=3)):
        assert all(map(torch.equal, itertools.chain(*others), itertools.chain(*expected)))
    later = batches("disk", first=47)
    assert all(map(torch.equal, itertools.chain(*later), itertools.chain(*expected[47:])))
    assert not torch.equal(batches("disk", first=59, window=8192)[0][0], expected[59][0])


def test_blocks_are_asked_for_a_window_ahead_and_again_in_the_next_epoch(many, monkeypatch):
    asked = []
    monkeypatch.setattr(os, "posix_fadvise", lambda file, start, length, kind: asked.append((start, length, kind)))
    feed = feed_of(many, DataConfig(placement="disk", window=4096), [slice(0, 600)], batch=600)
    feed._gather("0", 0, 0)
    block = 256 * 32 * 32
    ahead = [start for start, _, kind in asked if kind == os.POSIX_FADV_WILLNEED]
    blocks = {start // block for start in ahead}
    assert 17 <= len(blocks) <= 34  # those of a window, and of the next window's first images, from all over it
    assert sorted(ahead) == sorted({start for b in blocks for start in range(b * block, (b + 1) * block, 128 * 1024)})
    wanted = set(seeding.order(0, 0, 4096, total=30_000, window=4096) // 256)
    assert wanted <= blocks
    asked.clear()
    for number in range(1, 100):  # two epochs
        feed._gather("0", number, 0)
    again = [start // block for start, _, _ in asked if start % block == 0]
    assert 1.5 * 117 < len(again) < 2.5 * 117  # in each epoch each of them once, except a few


def test_a_store_that_has_become_shorter_is_named(many, tmp_path):
    (tmp_path / "images.bin").write_bytes((many.folder / "images.bin").read_bytes()[: 100 * 1024])
    shorter = dataclasses.replace(many, folder=tmp_path)
    feed = feed_of(shorter, DataConfig(placement="disk"), [slice(0, 600)], batch=600)
    with pytest.raises(OSError, match=f"{tmp_path} have become shorter during the run: remove that folder"):
        next(feed.for_discriminator(0, 0))


def test_a_store_larger_than_what_a_process_may_allocate_can_be_opened(tmp_path):
    """As on a machine whose memory is smaller: a mapping that could be written would be refused."""
    code = """if True:
        import resource, sys
        from pathlib import Path
        from distgan.data import store
        with open(sys.argv[1], "wb") as stream:
            stream.truncate(8 << 30)
        resource.setrlimit(resource.RLIMIT_DATA, (4 << 30, 4 << 30))
        pixels = store._mapped(Path(sys.argv[1]), (2 << 20, 1, 64, 64))
        assert pixels[-1].sum() == 0
    """
    subprocess.run([sys.executable, "-c", code, tmp_path / "images.bin"], check=True)


def test_the_shares_of_all_ranks_cover_a_batch_once_in_order():
    for world, most, sizes in [(1, None, [12]), (3, None, [4] * 3), (2, 2, [2] * 6), (2, 4, [3] * 4)]:
        slices = [part for rank in range(world) for part in data.shares(12, rank=rank, world=world, most=most)]
        assert [part.stop - part.start for part in slices] == sizes
        assert [i for part in slices for i in range(12)[part]] == list(range(12))


@pytest.mark.parametrize("content", [b"[]", b'{"shape": "x", "classes": null}', b"\xff\xfe", b"{}", b""])
def test_a_damaged_description_of_a_store_is_made_again(tmp_path, content):
    config = DataConfig(cache=str(tmp_path))
    images = data.load(config)
    (images.folder / "store.json").write_bytes(content)
    assert torch.equal(data.load(config).pixels, images.pixels)


def test_a_file_in_a_stores_place_is_replaced(tmp_path):
    config = DataConfig(cache=str(tmp_path))
    images = data.load(config)
    pixels = images.pixels.clone()
    shutil.rmtree(images.folder)
    images.folder.write_bytes(b"")
    assert torch.equal(data.load(config).pixels, pixels)


def cut(file, to=-100):
    file.write_bytes(file.read_bytes()[:to])


# Folders, IDX files, and damage ---------------------------------------------------------------------------------------


def encoded(picture, kind, **options):
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, kind, **options)
    return stream.getvalue()


def test_idx_files_are_read_as_they_are(tmp_path, pictures):
    grey = pictures[..., 0]
    folder = idx_folder(tmp_path / "train", grey, range(10), "t10k")
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz does not exist"):
        data.load(DataConfig(source="fashion_mnist", path=str(folder)))
    (folder / "t10k-labels-idx1-ubyte.gz").rename(folder / "moved")
    with pytest.raises(ValueError, match=r"t10k-labels-idx1-ubyte\.gz does not exist"):
        data.load(DataConfig(source="fashion_mnist", path=str(folder), split="test"))
    (folder / "moved").rename(folder / "t10k-labels-idx1-ubyte.gz")
    with pytest.raises(ValueError, match=r"11 images, but .* has 10 labels"):
        data.load(DataConfig(source="fashion_mnist", path=str(folder), split="test"))
    idx_folder(folder, grey[:10], range(10), "t10k")
    images = data.load(DataConfig(source="fashion_mnist", path=str(folder), split="test"))
    assert np.array_equal(images.pixels.numpy(), grey[:10, None])
    assert images.labels.tolist() == list(range(10))
    assert images.classes[9] == "Ankle boot"


def test_a_folder_of_pictures_of_every_size_and_mode(tmp_path):
    """One red half-plane in every mode: upright, cropped to the middle, opaque, eight bits."""
    wide = np.zeros((40, 100, 3), dtype=np.uint8)
    wide[:20] = (255, 0, 0)  # red above, black below
    image, folder = Image.fromarray(wide), tmp_path / "pictures"
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
    image.save(folder / "a" / "rgb.png")
    image.convert("P").save(folder / "a" / "palette.gif")
    image.convert("CMYK").save(folder / "a" / "cmyk.jpg", quality=95)
    clear = image.convert("RGBA")
    clear.putalpha(Image.fromarray(np.where(wide[..., 0] > 0, 255, 0).astype(np.uint8)))
    clear.save(folder / "b" / "alpha.png")
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    image.rotate(180).save(folder / "b" / "rotated.jpg", exif=exif, quality=95)
    deep = np.where(wide[..., 0] > 0, 65535, 0).astype(np.uint16)
    Image.fromarray(deep).save(folder / "b" / "sixteen.png")
    images = data.load(DataConfig(source="folder", path=str(folder), image_size=32))
    assert images.classes == ("a", "b")
    assert images.labels.tolist() == [0, 0, 0, 1, 1, 1]
    names = ["cmyk", "palette", "rgb", "alpha", "rotated", "sixteen"]
    for name, pixels in zip(names, images.pixels.float(), strict=True):
        above, below = pixels[:, 2:14].mean((1, 2)), pixels[:, 18:30].mean((1, 2))
        expected = {"sixteen": (255, 255, 255)}.get(name, (255, 0, 0)), {"alpha": (255, 255, 255)}.get(name, (0, 0, 0))
        assert above.tolist() == pytest.approx(expected[0], abs=6), name
        assert below.tolist() == pytest.approx(expected[1], abs=6), name
    grey = data.load(DataConfig(source="folder", path=str(folder), image_size=64, channels=1))
    assert grey.pixels.shape == (6, 1, 64, 64)
    assert grey.pixels[2, 0, :28].float().mean() == pytest.approx(76, abs=1)  # luma of red


def test_a_bad_picture_is_named_or_skipped_and_counted(tmp_path, pictures):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(encoded(pictures[i], "PNG"))
    cut(tmp_path / "1.png")
    with pytest.raises(ValueError, match=r"1\.png cannot be decoded.*data\.skip_bad"):
        data.load(DataConfig(source="folder", path=str(tmp_path)))
    images = data.load(DataConfig(source="folder", path=str(tmp_path), skip_bad=True))
    assert images.skipped == 1
    assert np.array_equal(images.pixels.numpy(), pictures[[0, 2]].transpose(0, 3, 1, 2))
    with pytest.raises(ValueError, match=r"train\.batch_size is 3, but there are 2 images"):
        data.load(DataConfig(source="folder", path=str(tmp_path), skip_bad=True), batch_size=3)


def test_a_decompression_bomb_is_refused(tmp_path):
    Image.new("1", (20_000, 10_000)).save(tmp_path / "bomb.png")
    with pytest.raises(ValueError, match=r"bomb\.png would decode to more pixels"):
        data.load(DataConfig(source="folder", path=str(tmp_path)))


def test_the_store_is_prepared_once_and_a_half_written_one_never_used(tmp_path, pictures, monkeypatch):
    folder = cifar_folder(tmp_path / "cifar10", pictures)
    config = DataConfig(source="cifar10", path=str(folder), cache=str(tmp_path / "cache"))
    first = data.load(config)
    copy = DataConfig(source="cifar10", path=str(shutil.copytree(folder, tmp_path / "copy")), cache=config.cache)
    prepared = []
    monkeypatch.setattr(store, "_prepare", lambda *args, work=store._prepare: (prepared.append(args), work(*args)))
    assert data.load(config).folder == data.load(copy).folder == first.folder  # by content, wherever it lies
    assert not prepared
    for name in ("images.bin", "labels.bin", "store.json"):
        cut(first.folder / name, -1)
        again = data.load(config)
        assert np.array_equal(again.pixels.numpy(), in_file_order(pictures))
    assert len(prepared) == 3
    assert [file.name for file in first.folder.parent.iterdir() if ".tmp" in file.name] == []


def test_a_cache_that_cannot_be_written_or_is_too_small(tmp_path, pictures, monkeypatch):
    folder = cifar_folder(tmp_path / "cifar10", pictures)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot be written.*--data\.cache=DIR"):
        data.load(DataConfig(source="cifar10", path=str(folder), cache=str(tmp_path / "file" / "cache")))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(ValueError, match=r"need 0\.0 MB .* where 0\.0 MB are free"):
        data.load(DataConfig(source="cifar10", path=str(folder), cache=str(tmp_path / "small")))


def prepare_at_once(config, start, results):
    start.wait()
    images = data.load(config)
    results.put((str(images.folder), images.pixels.double().sum().item(), len(images.labels)))


@pytest.mark.parametrize("locks", [True, False], ids=["locks", "no locks"])
def test_jobs_that_prepare_the_same_data_at_once_do_no_harm(tmp_path, locks):
    """Without file locks, as on some cluster file systems, each prepares the store and one of them is kept."""
    start, results = processes.Barrier(3), processes.Queue()
    config = DataConfig(cache=str(tmp_path))
    target = prepare_at_once if locks else prepare_without_locks
    jobs = [processes.Process(target=target, args=(config, start, results)) for _ in range(3)]
    for job in jobs:
        job.start()
    seen = {results.get(timeout=60) for _ in jobs}
    for job in jobs:
        job.join(60)
    assert [job.exitcode for job in jobs] == [0, 0, 0]
    assert seen == {(str(data.load(config).folder), data.load(DataConfig()).pixels.double().sum().item(), 1797)}
    assert [folder.name for folder in (tmp_path / "stores").iterdir() if ".tmp" in folder.name] == []


def prepare_without_locks(*args):
    store.fcntl.flock = no_locks
    prepare_at_once(*args)


def no_locks(*args):
    raise OSError(38, "Function not implemented")


def test_a_disk_that_fills_while_the_store_is_written_is_said_and_nothing_left(small_disk, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 2**40})())
    with pytest.raises(ValueError, match=r"cannot be written \(No space left on device\): choose another"):
        data.load(DataConfig(cache=str(small_disk)))  # 1.8 MB
    assert [file for file in small_disk.rglob("*.bin")] == []


def test_a_preview_is_of_the_whole_source(tmp_path, pictures):
    """Sorted by class as a folder is, its first pictures would show one class alone; each kind of source can spread."""
    for i in range(8):
        (tmp_path / "folder" / str(i)).mkdir(parents=True)
        for j in range(5):
            Image.new("L", (32, 32), 10 * i).save(tmp_path / "folder" / str(i) / f"{j}.png")
    config = DataConfig(source="folder", path=str(tmp_path / "folder"))
    seen = store.preview(sources.find(config), config, 8)[0]
    assert seen[:, 0, 0, 0].tolist() == [10 * i for i in range(8)]
    parquet = DataConfig(source="cifar10", path=str(cifar_folder(tmp_path / "parquet", pictures)))
    assert np.array_equal(store.preview(sources.find(parquet), parquet, 11)[0], in_file_order(pictures))
    assert np.array_equal(store.preview(sources.find(parquet), parquet, 6)[0][:3], in_file_order(pictures)[:6:2])
    idx = DataConfig(source="fashion_mnist", path=str(idx_folder(tmp_path / "idx", pictures[..., 0], [*range(10), 0])))
    assert np.array_equal(store.preview(sources.find(idx), idx, 6)[0][:, 0], pictures[::2, :, :, 0])


@pytest.mark.parametrize(
    "settings",
    [
        {"source": "digits", "split": "test"},
        {"source": "folder", "label_column": "label"},
        {"source": "digits", "image_column": "img"},
        {"source": "cifar10", "id": "owner/name"},
    ],
)
def test_settings_that_a_source_does_not_take_are_refused(settings):
    (key,) = settings.keys() - {"source"}
    with pytest.raises(ValueError, match=rf"data\.{key} is .*, which data\.source {settings['source']} does not use"):
        DataConfig(**settings)


def test_fashion_mnist_as_debian_packages_it(tmp_path):
    folder = Path("/usr/share/datasets/fashion-mnist")
    if not folder.is_dir():
        pytest.skip("needs Debian's package dataset-fashion-mnist")
    images = data.load(DataConfig(source="fashion_mnist", path=str(folder), split="test", cache=str(tmp_path)))
    assert images.pixels.shape == (10_000, 1, 32, 32)
    assert torch.bincount(images.labels).tolist() == [1000] * 10
    assert images.classes[int(images.labels[0])] == "Ankle boot"


def damaged(content, rng):
    """Bits flipped, a piece cut out, the end missing, or rubbish put in."""
    content = bytearray(content)
    at, length = int(rng.integers(len(content))), int(rng.integers(1, 40))
    match int(rng.integers(4)):
        case 0:
            content[at] ^= 1 << int(rng.integers(8))
        case 1:
            del content[at : at + length]
        case 2:
            del content[at:]
        case 3:
            content[at : at + length] = rng.bytes(length)
    return bytes(content)


KINDS = {"png": "PNG", "jpg": "JPEG", "gif": "GIF", "webp": "WEBP", "tif": "TIFF", "bmp": "BMP", "ppm": "PPM"}


@pytest.mark.parametrize("kind", [*KINDS, "images", "labels", "parquet"])
def test_200_damaged_files_give_a_sentence_or_the_right_pictures(tmp_path, pictures, kind):
    """Only PNG, gzip and parquet keep checksums: a picture of another kind that is damaged can be a picture all the
    same, of other pixels, and there only the sentence is tested."""
    rng = np.random.default_rng(1)
    config = {"source": "folder", "path": str(tmp_path / "data"), "cache": str(tmp_path / "cache")}
    if kind in ("images", "labels"):
        folder = idx_folder(tmp_path / "data", pictures[:4, :, :, 0], [1, 2, 3, 4])
        (victim,), config["source"] = folder.glob(f"train-{kind}-*.gz"), "fashion_mnist"
        expected = pictures[:4, None, :, :, 0]
    elif kind == "parquet":
        folder = cifar_folder(tmp_path / "data", pictures[:4], parts=1)
        victim, config["source"] = folder / "plain_text" / "train-00000-of-00001.parquet", "cifar10"
        expected = pictures[:4].transpose(0, 3, 1, 2)
    else:
        (tmp_path / "data").mkdir()
        victim = tmp_path / "data" / f"picture.{kind}"
        victim.write_bytes(encoded(pictures[0], KINDS[kind]))
        expected = pictures[:1].transpose(0, 3, 1, 2)
    whole, refused = victim.read_bytes(), 0
    for _ in range(200):
        victim.write_bytes(damaged(whole, rng))
        try:
            images = data.load(DataConfig(**config))
        except ValueError as error:
            refused += 1
            assert "\n" not in str(error)
        else:
            assert images.pixels.shape[1:] == expected.shape[1:]
            if kind not in KINDS or kind == "png":
                assert np.array_equal(images.pixels.numpy(), expected)
                assert kind != "labels" or images.labels.tolist() == [1, 2, 3, 4]
    assert refused > 20


def test_a_generators_own_batch_is_the_next_one_and_a_shared_one_is_the_discriminators_last(tmp_path, pictures):
    images = data.load(DataConfig(source="cifar10", path=str(cifar_folder(tmp_path / "cifar10", pictures))))
    config, share = DataConfig(), data.shares(6, rank=0, world=1)

    def batches(**options):
        feed = feed_of(images, config, share, d_steps=2, **options)
        for step in range(2):
            yield from (next(feed.for_discriminator(step, k)) for k in range(2))
            yield next(feed.for_generator(step))

    shared, own = list(batches()), list(batches(g_batch="own"))
    assert [batch.shared for batch in shared] == [False, True, True, False, True, True]
    assert shared[1] is shared[2]
    assert not any(batch.shared for batch in own)
    assert [batch.update for batch in own] == [batch.update for batch in shared] == [0, 1, 1, 2, 3, 3]
    # One order of images and one sequence of latents for both networks: no image twice in the first six batches.
    sequence = list(batches(g_batch="own"))
    (alone,) = (feed_of(images, config, share, d_steps=6),)
    for k, batch in enumerate(sequence):
        expected = next(alone.for_discriminator(0, k))
        assert torch.equal(batch.real, expected.real)
        assert torch.equal(batch.z, expected.z)
        assert torch.equal(batch.draw("a stream", 2), expected.draw("a stream", 2))

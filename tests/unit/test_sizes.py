"""Every source at the size that people have: tens of thousands of images, many files and row groups, tails.

Every image is of one colour, which is its number: so order and labels show after any resizing.
"""

import gzip
import json
import resource
import shutil
import struct
import zlib
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pytest
import torch
from pyarrow import parquet
from support.programs import launch
from support.runs import QUICK, TINY

from distgan import cli, compare, data
from distgan.data import sources
from distgan.data.store import spread
from distgan.evaluation import classifier
from distgan.recipe import DataConfig
from distgan.run.watch import WATCHED, unseen_images

pytestmark = pytest.mark.long
TRAIN, TEST = 20_003, 1_111
SIZES = [(8, 8), (5, 9), (12, 7)]


def png(number, size):
    """An image of one colour, made without an encoder: it is quick, and there are tens of thousands."""
    width, height = size
    row = b"\0" + bytes([number >> 16, number >> 8 & 255, number & 255]) * width
    chunks = [(b"IHDR", struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0))]
    chunks += [(b"IDAT", zlib.compress(row * height, 1)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )


def label(number):
    return number // 7 % 10


def table(file, numbers, *, group):
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
    pictures = [{"bytes": png(number, SIZES[number % 3]), "path": None} for number in numbers]
    columns = {"img": pictures, "label": [label(number) for number in numbers]}
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = pyarrow.table(columns, schema=features.arrow_schema)
    parquet.write_table(rows, file, row_group_size=group)


def numbers_of(pixels):
    """The images' numbers."""
    return pixels[:, :, 16, 16].int() @ pixels.new_tensor([65536, 256, 1], dtype=int).int()


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """One row group in the first file, many in the others, and tails of three lengths."""
    folder = tmp_path_factory.mktemp("sizes") / "copy" / "plain_text"
    ends = [0, 9_001, 15_257, TRAIN]
    for i, group in enumerate([10_000, 100, 333]):
        table(folder / f"train-{i:05d}-of-00003.parquet", range(ends[i], ends[i + 1]), group=group)
    table(folder / "test-00000-of-00001.parquet", range(TRAIN, TRAIN + TEST), group=100)
    return folder.parent


@pytest.fixture(scope="module")
def cached(copy, tmp_path_factory):
    """What `datasets` finds in its cache after it loaded the same from the hub."""
    patch = pytest.MonkeyPatch()
    cache = tmp_path_factory.mktemp("hub")
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache))
    files = {split: str(copy / "plain_text" / f"{split}-*.parquet") for split in ("train", "test")}
    datasets.load_dataset("parquet", "plain_text", data_files=files)
    (made,) = cache.glob("parquet/*/*/*/dataset_info.json")
    text = made.read_text().replace(made.parents[2].name, "plain_text")
    made.write_text(text.replace('"dataset_name": "parquet"', '"dataset_name": "cifar10"'))
    for arrow in made.parent.glob("*.arrow"):
        arrow.rename(arrow.with_name(arrow.name.replace("parquet-", "cifar10-")))
    shutil.copytree(made.parent, cache / "uoft-cs___cifar10" / "plain_text" / "0.0.0" / "abc")
    shutil.rmtree(cache / "parquet")
    yield
    patch.undo()


def of_copy(copy, **settings):
    return DataConfig(source="cifar10", path=str(copy), **settings)


def test_a_copy_of_many_rows(copy):
    images, test = data.load(of_copy(copy)), data.load(data.test_split(of_copy(copy)))
    assert numbers_of(images.pixels).tolist() == list(range(TRAIN))
    assert images.labels.tolist() == [label(number) for number in range(TRAIN)]
    assert numbers_of(test.pixels).tolist() == list(range(TRAIN, TRAIN + TEST))
    assert test.labels.tolist() == [label(number) for number in range(TRAIN, TRAIN + TEST)]
    assert (images.pixels == images.pixels[:, :, :1, :1]).all()


def test_the_hub_has_the_same_in_the_same_order(copy, cached):
    """All without decoding; of the test split the pixels, too."""
    ours, theirs = (sources.find(config).records(1) for config in (of_copy(copy), DataConfig(source="cifar10")))
    for one, other in zip(ours, theirs, strict=True):
        assert (one.content, one.label) == (other.content, other.label)
    ours, theirs = (
        data.load(config) for config in (of_copy(copy, split="test"), DataConfig(source="cifar10", split="test"))
    )
    assert ours.fingerprint == theirs.fingerprint
    config = DataConfig(source="cifar10")
    pixels, labels, _ = data.preview(data.find(config), config, 64)
    assert numbers_of(pixels).tolist() == list(range(0, TRAIN, -(-TRAIN // 64)))
    assert labels.tolist() == [label(number) for number in range(0, TRAIN, -(-TRAIN // 64))]


@pytest.mark.parametrize("count", [1, 2, 63, 64, 65, 255, 256, 257, 4096, TRAIN - 1, TRAIN])
def test_a_preview_of_any_length_is_of_the_whole_copy(copy, count):
    found = [(record.name, record.label) for record in spread(sources.find(of_copy(copy)), count)]
    assert len(found) <= count
    every = -(-TRAIN // count)
    starts = [0, 9_001, 15_257]
    expected = []
    for number in range(0, TRAIN, every):
        start = max(one for one in starts if one <= number)
        file = copy / "plain_text" / f"train-{starts.index(start):05d}-of-00003.parquet"
        expected.append((f"row {number - start} of {file}", label(number)))
    assert found == expected


@pytest.mark.parametrize("group", [1, 100, 256, 1000])
@pytest.mark.parametrize("count", [1, 255, 256, 257, 511, 512, 513, 700])
def test_tails_of_every_length(tmp_path, count, group):
    table(tmp_path / "train-0.parquet", range(count), group=group)
    table(tmp_path / "train-1.parquet", [], group=group)
    table(tmp_path / "train-2.parquet", range(count, count + 3), group=group)
    source = sources.find(of_copy(tmp_path))
    for every in (1, 2, 100, 255, 256, 257, 300, 514, 10_000):
        found = [record.content for record in source.records(every)]
        assert found == [png(number, SIZES[number % 3]) for number in range(0, count + 3, every)]


def test_a_file_of_one_row_group_is_not_held_in_memory(tmp_path):
    """60 MB of pictures; and a preview reads none of the row groups that it needs nothing of."""
    rng = np.random.default_rng(0)
    picture = pyarrow.struct([("bytes", pyarrow.binary())])
    rows = pyarrow.array([{"bytes": png(i, (8, 8)) + rng.bytes(20_000)} for i in range(3_000)], picture)
    file = tmp_path / "train-0.parquet"
    parquet.write_table(pyarrow.table({"image": rows}), file, row_group_size=10_000, write_batch_size=64)
    records, most = sources.find(of_copy(tmp_path)).records(1), 0
    before = pyarrow.total_allocated_bytes()
    for _ in records:
        most = max(most, pyarrow.total_allocated_bytes() - before)
    assert 0 < most < 20e6  # 256 rows twice are 10 MB
    parquet.write_table(pyarrow.table({"image": rows}), file, row_group_size=100)
    whole = file.read_bytes()
    found = parquet.ParquetFile(file).metadata.row_group(15).column(0)
    start, size = found.dictionary_page_offset or found.data_page_offset, found.total_compressed_size
    file.write_bytes(whole[:start] + bytes(size) + whole[start + size :])
    assert len(list(sources.find(of_copy(tmp_path)).records(1000))) == 3  # rows 0, 1000 and 2000
    with pytest.raises(ValueError, match=r"train-0\.parquet is not a readable parquet file"):
        list(sources.find(of_copy(tmp_path)).records(1))


def test_a_copy_of_more_files_than_a_process_may_open(tmp_path):
    for i in range(120):
        table(tmp_path / f"train-{i:05d}-of-00120.parquet", range(2 * i, 2 * i + 2), group=2)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    open_now = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_now + 40, limits[1]))
    try:
        found = [record.label for record in sources.find(of_copy(tmp_path)).records(1)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert found == [label(number) for number in range(240)]


def drawn(numbers):
    """32x32 grey images whose first pixels are their numbers."""
    pixels = np.zeros((len(numbers), 32, 32), dtype=np.uint8)
    for i in range(3):
        pixels[:, 0, i] = np.array(numbers) >> (16 - 8 * i) & 255
    return pixels


def test_idx_files_of_60_000(tmp_path):
    for name, numbers in {"train": range(60_000), "t10k": range(60_000, 70_000)}.items():
        images = b"\0\0\x08\x03" + struct.pack(">3I", len(numbers), 32, 32) + drawn(numbers).tobytes()
        (tmp_path / f"{name}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images, 1))
        labels = b"\0\0\x08\x01" + struct.pack(">I", len(numbers)) + bytes(label(number) for number in numbers)
        (tmp_path / f"{name}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels, 1))
    config = DataConfig(source="fashion_mnist", path=str(tmp_path))
    for split, numbers in {config: range(60_000), data.test_split(config): range(60_000, 70_000)}.items():
        for number, record in zip(numbers, data.find(split).records(1), strict=True):
            assert record.content[0, :3].tolist() == [number >> 16, number >> 8 & 255, number & 255]
            assert record.label == label(number)
    weights = torch.tensor([65536, 256, 1], dtype=torch.int32)
    pixels, labels, _ = data.preview(data.find(config), config, 64)
    assert (pixels[:, 0, 0, :3].int() @ weights).tolist() == list(range(0, 60_000, 938))
    assert labels.tolist() == [label(number) for number in range(0, 60_000, 938)]


def test_the_binary_version_of_50_000(tmp_path):
    """As large as CIFAR-10 itself; decoded in part only."""
    for k, name in enumerate([*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]):
        rows = np.zeros((10_000, 3073), dtype=np.uint8)
        numbers = np.arange(10_000 * k, 10_000 * k + 10_000)
        rows[:, 0] = label(numbers)
        for i in range(3):
            rows[:, 1 + 1024 * i : 1 + 1024 * (i + 1)] = (numbers >> (16 - 8 * i) & 255)[:, None]
        rows.tofile(tmp_path / name)
    config = of_copy(tmp_path)
    for i, record in enumerate(sources.find(config).records(1)):
        assert (record.content[1, 31, 31], record.content[2, 0, 0], record.label) == (i >> 8 & 255, i & 255, label(i))
    assert i == 49_999
    test = data.find(data.test_split(config)).records(1)
    found = [256 * int(record.content[1, 0, 0]) + int(record.content[2, 0, 0]) for record in test]
    assert found == list(range(50_000, 60_000))
    pixels, labels, _ = data.preview(data.find(config), config, 64)
    assert numbers_of(pixels).tolist() == list(range(0, 50_000, 782))
    assert labels.tolist() == [label(number) for number in range(0, 50_000, 782)]


def test_a_folder_of_thousands(tmp_path):
    for number in range(2_001):
        file = tmp_path / f"class {number % 3}" / f"{number:05d}.png"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(png(number, SIZES[number % 2]))
    config = DataConfig(source="folder", path=str(tmp_path))
    expected = [number for remainder in range(3) for number in range(remainder, 2_001, 3)]
    images = data.load(config)
    assert numbers_of(images.pixels).tolist() == expected
    assert images.labels.tolist() == [number % 3 for number in expected]
    pixels, _, _ = data.preview(data.find(config), config, 64)
    assert numbers_of(pixels).tolist() == expected[::32]


def few_steps():
    """Of the evaluation's classifier: how good it is does not matter here."""
    classifier._STEPS, classifier._EPOCHS = 10, 0


def test_the_verbs_where_a_split_has_many_rows(copy, tmp_path, capsys, monkeypatch):
    """`data`, `--check`, training with the guard's unseen images and an evaluation with its floor. Here the
    test split is the large one: the classifier of the evaluation trains on the other, for seconds."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in (copy / "plain_text").iterdir():
        split, _, rest = file.name.partition("-")
        (folder / f"{'test' if split == 'train' else 'train'}-{rest}").symlink_to(file)
    run = [*TINY, f"--run.dir={tmp_path / 'run'}", "--data.source=cifar10", f"--data.path={folder}", "--guard.after=0"]
    looked = ["data", "cifar10", "--path", str(folder), "--split=test", "--out", str(tmp_path / "data.png")]
    assert cli.main(looked) == 0
    said = capsys.readouterr().out
    assert "images       20,003\n" in said
    assert all(f"of {size} RGB" in said for size in ("8x8", "5x9", "12x7"))
    monkeypatch.setattr(classifier, "_STEPS", 10)
    monkeypatch.setattr(classifier, "_EPOCHS", 0)
    assert cli.main(["train", "--check", *run]) == 0
    unseen = unseen_images(DataConfig(source="cifar10", path=str(folder)), None, classes=10)
    every = -(-TRAIN // WATCHED)
    assert numbers_of(unseen.pixels).tolist() == list(range(0, TRAIN, every))
    assert unseen.labels.tolist() == [label(number) for number in range(0, TRAIN, every)]
    log = tmp_path / "log"
    assert launch(run, log=log, setups=[few_steps]) == [0], log.read_text()
    assert "guard/memory is off" not in log.read_text()
    evaluate = [str(tmp_path / "run"), *QUICK, "--reference=test", "--json", str(tmp_path / "found.json")]
    assert launch(evaluate, verb="evaluate", log=log, setups=[few_steps]) == [0], log.read_text()
    assert json.loads((tmp_path / "found.json").read_text())["floor"]
    assert cli.main(["compare", str(tmp_path / "run"), "--out", str(tmp_path / "compare.png")]) == 0
    pixels = data.load(of_copy(copy)).pixels
    assert compare.nearest(pixels[[5, 9_001, TRAIN - 1]], pixels).index.tolist() == [5, 9_001, TRAIN - 1]

"""`distgan sample`: one picture, a PNG of each image, or an array; classes by name or number."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from support.commands import complaint
from support.generators import exported
from support.programs import launch

from distgan import cli, load_generator
from distgan.data import sources
from distgan.recipe import DataConfig

NAMES = ("cat", "T-shirt/top", "big, red", "big", "1", "empty")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return exported(tmp_path_factory.mktemp("plain") / "generator")


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    return exported(tmp_path_factory.mktemp("labelled") / "generator", channels=1, names=NAMES)


def sample(*argv):
    return cli.main(["sample", *map(str, argv)])


def read(folder):
    return [np.array(Image.open(file)) for file in sorted(folder.iterdir())]


@pytest.mark.parametrize("num", [1, 64, 150])
def test_every_form_holds_the_images_that_the_generator_samples(plain, tmp_path, num):
    expected = load_generator(plain).sample(num, seed=3).permute(0, 2, 3, 1).numpy()
    options = [plain, "--num", num, "--seed", 3]
    assert sample(*options, f"--out={tmp_path}/pictures/") == 0
    assert [file.name for file in sorted((tmp_path / "pictures").iterdir())] == [f"{i:06d}.png" for i in range(num)]
    assert np.array_equal(read(tmp_path / "pictures"), expected)
    assert sample(*options, f"--out={tmp_path}/images.npz") == 0
    with np.load(tmp_path / "images.npz", allow_pickle=False) as found:
        assert found.files == ["arr_0"]
        assert found["arr_0"].dtype == np.uint8
        assert np.array_equal(found["arr_0"], expected)
    assert sample(*options, f"--out={tmp_path}/grid.PNG") == 0
    grid = np.array(Image.open(tmp_path / "grid.PNG"))
    assert np.array_equal(grid if num == 1 else grid[2:34, 2:34], expected[0])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["grid.PNG", "images.npz", "pictures"]


def test_two_processes_draw_what_one_draws(labelled, tmp_path):
    for world in (1, 2):
        for form in ("p/", "a.npz", "g.png"):
            (tmp_path / str(world)).mkdir(exist_ok=True)
            argv = [str(labelled), "--num=150", "--classes=cat,big", f"--out={tmp_path}/{world}/{form}"]
            assert launch(argv, verb="sample", world=world) == [0] * world
    one, two = (
        {file.relative_to(tmp_path / world): file.read_bytes() for file in (tmp_path / world).rglob("*.png")}
        for world in ("1", "2")
    )
    assert one == two
    assert len(one) == 301
    arrays = [np.load(tmp_path / world / "a.npz") for world in ("1", "2")]
    assert all(np.array_equal(arrays[0][name], arrays[1][name]) for name in ("arr_0", "arr_1"))


def test_labels_stand_in_names_and_arrays_and_grey_has_three_channels_there(labelled, tmp_path):
    generator = load_generator(labelled)
    expected = generator.sample(100, seed=1).squeeze(1).numpy()
    y = torch.cat([generator.labels(first, seed=1) for first in (0, 64)])[:100].numpy()
    assert len(set(y)) == 5
    assert sample(labelled, "--num=100", "--seed=1", f"--out={tmp_path}/p/") == 0
    slugs = ["cat", "T-shirt_top", "big_red", "big", "1"]
    assert [file.name for file in sorted((tmp_path / "p").iterdir())] == [
        f"{i:06d}-{slugs[label]}.png" for i, label in enumerate(y)
    ]
    assert np.array_equal(read(tmp_path / "p"), expected)
    assert sample(labelled, "--num=100", "--seed=1", f"--out={tmp_path}/a.npz") == 0
    with np.load(tmp_path / "a.npz", allow_pickle=False) as found:
        assert found["arr_0"].shape == (100, 32, 32, 3)
        assert all(np.array_equal(found["arr_0"][..., c], expected) for c in range(3))
        assert found["arr_1"].dtype == np.int64
        assert np.array_equal(found["arr_1"], y)
    found = sources.find(DataConfig(source="folder", path=str(tmp_path / "p")))
    assert found.count == 100


@pytest.mark.parametrize(
    ("classes", "labels"),
    [
        ("cat", [0]),
        ("T-shirt/top,cat", [1, 0]),
        ("cat,3, 0", [0, 3, 0]),
        ("big, red", [2]),  # the longest name that fits, commas and all
        ("big,cat", [3, 0]),
        ("big,big, red,cat", [3, 2, 0]),
        ("1", [4]),  # a name before a number
        ("2,1", [2, 4]),
    ],
)
def test_classes_by_name_or_number(labelled, tmp_path, classes, labels):
    generator = load_generator(labelled)
    assert sample(labelled, "--classes", classes, "--num=70", f"--out={tmp_path}/a.npz") == 0
    with np.load(tmp_path / "a.npz") as found:
        assert np.array_equal(found["arr_1"], np.repeat(labels, 70))
        assert np.array_equal(found["arr_0"][..., 0], generator.sample_rows(labels, 70).squeeze(1).numpy())
    named = [NAMES[label] for label in labels]
    assert torch.equal(generator.sample_rows(named, 3), generator.sample_rows(labels, 3))
    assert torch.equal(generator.sample(3, label=named[0]), generator.sample(3, label=labels[0]))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--classes=catt"], ['"catt"', 'did you mean "cat"?']),
        (["--classes=zebra,cat"], ['"zebra"', "known are cat, T-shirt/top, big, red, big, 1, empty"]),
        (["--classes=cat,"], ['""']),
        (["--classes=cat,6"], ["class 6", "0 to 5"]),
        (["--classes=-1"], ['"-1"']),
        (["--classes=empty"], ["class empty", "none of the training images"]),
        (["--classes=cat", "--num=0"], ["number of samples is 0"]),
        (["--out=images.npy"], ["images.npy", ".png", ".npz", "/"]),
        (["--out=folder"], ["--out is folder", ".png", ".npz", "/"]),
        (["--out="], ["--out is empty"]),
        (["--out=no/such/"], ["no folder no"]),
        (["--out=no/such.npz"], ["no folder no"]),
        (["--out=file/"], ["file, which is a file"]),
        (["--out=full"], ["full, which is not empty (it has cat)"]),
        (["--out=full/"], ["full, which is not empty (it has cat)"]),
    ],
)
def test_what_cannot_be_drawn_or_written_is_said(labelled, tmp_path, monkeypatch, capfd, argv, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "full" / "cat").mkdir(parents=True)  # training images
    (tmp_path / "full" / "cat" / "0.jpg").write_text("")
    said = complaint(capfd, "sample", str(labelled), *argv)
    assert all(word in said for word in words), said
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["0.jpg", "cat", "file", "full"]


def test_class_names_of_every_kind_make_file_names_and_can_be_asked_for(tmp_path):
    names = ("n" * 250, "\u7f8a" * 90, "\U0001f600", "a/b", "a b", " lead", "lead", "e\u0301", "a\n\x1b[31m")
    generator = exported(tmp_path / "generator", names=names)
    given = ",".join([*names[:7], "\u00e9", *names[8:]])
    assert sample(generator, "--classes", given, "--num=1", f"--out={tmp_path}/p/") == 0
    made = [file.stem.partition("-")[2] for file in sorted((tmp_path / "p").iterdir())]
    assert made == ["n" * 100, "\u7f8a" * 33, "2", "3", "4", "_lead", "lead", "\u00e9", "a_31m"]
    assert sample(generator, "--classes=lead , lead,  lead", "--num=1", f"--out={tmp_path}/a.npz") == 0
    with np.load(tmp_path / "a.npz") as found:
        assert found["arr_1"].tolist() == [6, 5, 6]


def test_names_are_refused_where_there_are_no_labels(plain, tmp_path, capfd):
    for classes in ("cat", "0"):
        said = complaint(capfd, "sample", str(plain), f"--classes={classes}", f"--out={tmp_path}/a.png")
        assert f"class {classes} is asked for, but the generator was trained without labels" in said
    with pytest.raises(ValueError, match=r'class "dog" is asked for'):
        load_generator(exported(tmp_path / "named", names=NAMES)).sample(1, label="dog")


def test_an_old_array_is_replaced_and_an_empty_folder_filled(plain, tmp_path):
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / ".hidden").write_text("")
    assert sample(plain, "--num=2", f"--out={tmp_path}/p") == 0
    assert len(list((tmp_path / "p").glob("*.png"))) == 2
    for num in (5, 3):
        assert sample(plain, f"--num={num}", f"--out={tmp_path}/a.npz") == 0
        with np.load(tmp_path / "a.npz") as found:
            assert len(found["arr_0"]) == num


@pytest.mark.parametrize("form", ["a.npz", "p/", "old/", "grid.png"])
def test_a_disk_that_fills_is_said_and_nothing_half_is_left(plain, small_disk, capfd, form):
    (small_disk / "old").mkdir()
    (small_disk / "filler").write_bytes(bytes(900_000))
    said = complaint(capfd, "sample", str(plain), "--num=700", f"--out={small_disk}/{form}")
    assert "cannot be written (No space left on device): choose another place." in said
    assert sorted(file.name for file in small_disk.rglob("*")) == ["filler", "old"]


MEASURE = """
import sys, resource
from distgan import cli
cli.main(["sample", sys.argv[1], "--num=64", "--out=" + sys.argv[2]])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
cli.main(["sample", sys.argv[1], "--num=10000", "--out=" + sys.argv[2]])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_any_number_is_drawn_in_constant_memory(plain, tmp_path):
    """10,000 images are 31 MB."""
    out = tmp_path / "a.npz"
    result = subprocess.run([sys.executable, "-c", MEASURE, plain, out], capture_output=True, text=True, check=True)
    assert out.stat().st_size > 30e6
    assert float(result.stdout.split()[-1]) < 12


def test_the_package_runs_as_the_program(plain, tmp_path):
    def run(*argv):
        return subprocess.run([sys.executable, "-m", "distgan", *argv], capture_output=True, text=True)

    assert run("--help").stdout.startswith("usage: distgan VERB")
    result = run("sample", str(plain), f"--out={tmp_path}/grid.png")
    assert (result.returncode, result.stdout) == (0, f"{tmp_path}/grid.png\n")
    result = run("sampel")
    assert (result.returncode, result.stderr[:46]) == (2, 'distgan: error: there is no verb "sampel": use')

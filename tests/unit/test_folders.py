"""Folders as people have them: links, leftovers, splits, other kinds of pictures, and runs beside the pictures."""

import hashlib
import json
import os

import numpy as np
import pytest
from PIL import Image, features
from safetensors.torch import save_file
from support.commands import complaint
from support.programs import launch
from support.runs import TINY, metrics

from distgan import cli, data
from distgan.data import sources
from distgan.data.arrangement import arrange, endings
from distgan.evaluation import Classifier
from distgan.recipe import DataConfig

SMALL = [*TINY, "--train.steps=2", "--train.batch_size=4", "--data.source=folder"]


def picture(file, colour=0, size=32):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), (colour, colour, colour)).save(file)
    return file


def folder(root, *names):
    """Pictures of these names, each of another grey."""
    for i, name in enumerate(names):
        picture(root / name, 10 * i)
    return root


def found(root, **settings):
    return sources.find(DataConfig(source="folder", path=str(root), **settings))


def labels(source):
    return [record.label for record in source.records(1)]


def names(source, root):
    return [os.path.relpath(record.name, root) for record in source.records(1)]


def arranged(*given, split="train", archive=False, tables=None):
    """Of names alone; `tables` are the contents of dataset.json files, by name."""
    contents = {name: json.dumps({"labels": said}).encode() for name, said in (tables or {}).items()}
    read = contents.__getitem__
    return arrange([*given, *contents], split=split, where="HERE", read=read, archive=archive)


# Links ----------------------------------------------------------------------------------------------------------------


def test_links_to_folders_and_pictures_are_followed_and_loops_end(tmp_path):
    folder(tmp_path / "elsewhere", "cats/1.png", "cats/deep/2.png", "one.png")
    root = folder(tmp_path / "pictures", "dog/1.png")
    (root / "cat").symlink_to(tmp_path / "elsewhere" / "cats")
    (root / "dog" / "linked.png").symlink_to(tmp_path / "elsewhere" / "one.png")
    (root / "dog" / "again").symlink_to(root)
    (tmp_path / "elsewhere" / "cats" / "back").symlink_to(root)
    (root / "dog" / "gone.png").symlink_to("nowhere.png")
    (root / "dog" / "itself").symlink_to("itself")
    (tmp_path / "link").symlink_to(root)
    for path in (root, tmp_path / "link"):
        source = found(path)
        assert names(source, path) == ["cat/1.png", "cat/deep/2.png", "dog/1.png", "dog/linked.png"]
        assert source.classes == ("cat", "dog")
        assert labels(source) == [0, 0, 1, 1]
        assert "2 broken links (" in source.left_out
        assert "2 links (" in source.left_out
        assert "dog/gone.png" in source.left_out
    assert data.load(DataConfig(source="folder", path=str(root))).pixels[:, 0, 0, 0].tolist() == [0, 10, 0, 20]


def test_folders_that_link_to_each_other_are_each_read_once(tmp_path):
    """By their paths there are thousands of pictures."""
    numbers = range(7)
    root = folder(tmp_path / "pictures", *(f"{i}/1.png" for i in numbers))
    for i in numbers:
        for other in {*numbers} - {i}:
            (root / str(i) / f"link{other}").symlink_to(root / str(other))
    source = found(root)
    assert names(source, root) == [f"{i}/1.png" for i in numbers]
    assert "42 links (" in source.left_out
    assert "to a folder that is read already" in source.left_out


def test_links_into_hidden_folders_are_followed_and_hidden_links_are_not(tmp_path):
    root = folder(tmp_path / "pictures", ".data/cats/1.png", "dog/1.png")
    (root / "cat").symlink_to(".data/cats")
    (root / "tom").symlink_to(".data/cats")
    (root / ".hidden").symlink_to("dog")
    source = found(root)
    assert names(source, root) == ["cat/1.png", "dog/1.png"]
    assert "2 files hidden or made by tools (.data, .hidden)" in source.left_out
    assert "1 link (tom) to a folder that is read already" in source.left_out


def test_pipes_are_counted_and_files_that_cannot_be_read_are_refused_or_skipped(tmp_path):
    root = folder(tmp_path / "pictures", "1.png", "2.png")
    os.mkfifo(root / "pipe.png")
    (root / "3.png").symlink_to(root / "pipe.png")
    assert "2 special files (3.png, pipe.png), such as pipes or devices" in found(root).left_out
    (root / "4.png").symlink_to("/proc/self/mem")  # a file that nobody can read, root neither
    with pytest.raises(ValueError, match=r"4\.png cannot be read \("):
        data.load(DataConfig(source="folder", path=str(root)))
    images = data.load(DataConfig(source="folder", path=str(root), skip_bad=True))
    assert (images.skipped, len(images.pixels)) == (1, 2)


def test_a_folder_of_plain_pictures_keeps_its_store(tmp_path):
    """Runs from before splits, links and archives resume: the key of the store is made of the same things."""
    root = folder(tmp_path / "pictures", "b/1.png", "a/x/2.png", "a.b/3.png")
    source, order = found(root), ["a/x/2.png", "a.b/3.png", "b/1.png"]
    expected = hashlib.sha256(json.dumps([json.dumps(order), ("a", "a.b", "b")]).encode())
    for name in order:
        expected.update(hashlib.sha256((root / name).read_bytes()).digest())
    assert source.fingerprint() == expected.hexdigest()
    assert source.left_out == ""


# What is left out -----------------------------------------------------------------------------------------------------


def test_what_is_hidden_made_by_tools_or_no_picture_is_left_out_and_counted(tmp_path, capfd):
    root = folder(
        tmp_path / ".data" / "pictures",
        "cat/1.png",
        "dog/1.PNG",
        "dog/.hidden.png",
        ".ipynb_checkpoints/1-checkpoint.png",
        "cat/.ipynb_checkpoints/1-checkpoint.png",
        "__MACOSX/cat/._1.png",
        "@eaDir/1.png",
        ".git/x.png",
    )
    for name in ("dog/Thumbs.db", ".DS_Store", "notes.txt", "cat/a.txt", "cat/1.json", "README"):
        (root / name).write_text("")
    source = found(root)
    assert source.classes == ("cat", "dog")
    assert names(source, root) == ["cat/1.png", "dog/1.PNG"]
    said = f"left out of {root}: 8 files hidden or made by tools ("
    assert source.left_out.startswith(said)
    assert source.left_out.endswith("4 files that Pillow does not read (2 .txt, 1 without an ending, 1 .json)")
    argv = [*SMALL, f"--data.path={root}", "--train.batch_size=2", f"--run.dir={tmp_path / 'run'}", "--check"]
    assert cli.main(["train", *argv]) == 0
    assert capfd.readouterr().err.count(said) == 1
    assert cli.main(["data", str(root), "--out", str(tmp_path / "seen.png")]) == 0
    assert capfd.readouterr().out.count(said) == 1


def test_a_folder_without_pictures_says_what_it_has_instead(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(
        ValueError, match=r"there are no pictures in it \(left out: 1 file that Pillow does not read \(1 \.txt"
    ):
        found(tmp_path)


@pytest.mark.parametrize(
    ("name", "source", "shown"),
    [
        ("train-00000-of-00001.parquet", "hub --data.id=OWNER/NAME", "OWNER/NAME"),
        ("cifar-10-batches-bin/data_batch_1.bin", "cifar10", "cifar10"),
        ("cifar-10-binary.tar.gz", "cifar10", "cifar10"),
        ("train-images-idx3-ubyte.gz", "fashion_mnist", "fashion_mnist"),
    ],
)
def test_files_of_another_source_are_known(tmp_path, name, source, shown):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("")
    alone = file if name.endswith(".tar.gz") else file.parent
    for path, words, place in (
        (tmp_path, "no pictures in it", tmp_path),
        (file, "neither a folder nor a zip archive", alone),
    ):
        with pytest.raises(ValueError, match=words) as error:
            found(path)
        said = f": give it with --data.source={source}, or see it with `distgan data {shown} --path {place}`."
        assert str(error.value).endswith(said)


def test_a_path_that_cannot_be_looked_at_is_a_sentence(tmp_path, capfd):
    long = str(tmp_path / ("a" * 300))
    for source, words in (("folder", "no such folder"), ("cifar10", "no such folder"), ("hub", "no such folder")):
        with pytest.raises(ValueError, match=words):
            sources.find(DataConfig(source=source, path=long, id="a/b" if source == "hub" else None))
    assert "is neither a source" in complaint(capfd, "data", long)


def test_a_class_whose_name_is_not_utf8_is_refused(tmp_path):
    root = folder(tmp_path, "cat/1.png", os.fsdecode(b"\xff\xfe/1.png"))
    with pytest.raises(ValueError, match=r"the folder of the class .* has a name that is not UTF-8"):
        found(root)


def test_the_pictures_of_a_run_are_left_out(tmp_path):
    """Its sample grids would be trained on."""
    root = folder(tmp_path, "cat/1.png", "runs/a/samples/step_00000100.png", "runs/a/wandb/x.png", "runs/b/2.png")
    for name in ("config.yaml", "metrics.jsonl"):
        (root / "runs" / "a" / name).write_text("")
    source = found(root)
    assert names(source, root) == ["cat/1.png", "runs/b/2.png"]
    assert "4 files of a run (runs/a)" in source.left_out


def test_whatever_pillow_reads_is_read(tmp_path):
    kinds = [".bmp", ".gif", ".ico", ".jfif", ".jpe", ".jpeg", ".jpg", ".pbm", ".pcx", ".pgm", ".png", ".ppm", ".qoi"]
    kinds += [".sgi", ".tga", ".tif", ".tiff", ".apng", ".dib", ".JPG"]
    kinds += [".webp"] if features.check("webp") else []
    kinds += [".avif"] if features.check("avif") else []
    kinds += [".jp2", ".j2k", ".jpx"] if features.check("jpg_2000") else []
    for i, kind in enumerate(kinds):
        image = Image.new("L" if kind in (".pgm", ".pbm") else "RGB", (32, 32), "white")
        image = image.convert("1") if kind == ".pbm" else image
        image.save(tmp_path / f"{i}{kind}")
    for kind in (".pdf", ".eps", ".mpg", ".h5", ".heic"):
        (tmp_path / f"other{kind}").write_text("")
    picture(tmp_path / "black.png")  # pictures that are all of one colour are refused
    images = data.load(DataConfig(source="folder", path=str(tmp_path)))
    assert len(images.pixels) == len(kinds) + 1
    assert images.pixels.float().mean(dim=(1, 2, 3)).topk(len(kinds)).values.min() > 250
    assert "5 files that Pillow does not read" in images.left_out
    assert {".jpg", ".webp", ".avif", ".jp2", ".jpe"} <= endings()


# Splits ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "splits", "classes", "count"),
    [
        (["train/cat/1.png", "train/dog/1.png", "val/dog/1.png"], ("train", "val"), ("cat", "dog"), 2),
        (["Training/cat/1.png", "TEST/cat/1.png"], ("Training", "TEST"), ("cat",), 1),
        (["train2017/1.png", "val2017/2.png"], ("train2017", "val2017"), None, 1),
        (["train_set/cat/1.png", "test-images/2.png", "dev/3.png"], ("train_set", "dev", "test-images"), ("cat",), 1),
        (["train/1.png", "train/2.png"], ("train",), None, 2),
        (["faces/train/cat/1.png", "faces/val/cat/1.png"], ("train", "val"), ("cat",), 1),
        (["Train/0/1.png", "Test/1.png", "Meta/1.png"], ("Train", "Test"), ("0",), 1),
        (
            ["training_set/training_set/cat/1.png", "test_set/test_set/dog/1.png"],
            ("training_set", "test_set"),
            ("cat",),
            1,
        ),
        (["test/1.png", "exam/2.png"], (), ("exam", "test"), 2),
        (["train/1.png", "bus/2.png", "car/2.png"], (), ("bus", "car", "train"), 3),
        (["valid/1.png", "invalid/2.png"], (), ("invalid", "valid"), 2),
        (["cat/train/1.png", "dog/train/1.png"], (), ("cat", "dog"), 2),
        (["contrains/1.png", "latest/1.png"], (), ("contrains", "latest"), 2),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_split_names_at_the_top_are_splits_and_a_class_of_such_a_name_is_a_class(given, splits, classes, count):
    one = arranged(*given)
    assert one.splits == splits
    assert one.classes == classes
    assert one.split == (splits[0] if splits else None)
    assert sorted(one.names) == sorted(given[:count])


def test_what_lies_beside_the_splits_is_in_none_of_them_and_counted():
    one = arranged("train/a/1.png", "val/a/1.png", "masks/1.png", "stray.png")
    assert one.names == ("train/a/1.png",)
    assert one.left_out == ("2 pictures (masks/1.png, stray.png) beside the splits",)


def test_a_split_is_chosen_by_its_name_or_its_kind_and_a_missing_one_refused():
    given = ("Train/cat/1.png", "val/cat/2.png", "dev/cat/3.png", "testing/cat/4.png")
    chosen = {"train": "Train", "Train": "Train", "training": "Train", "VAL": "val", "dev": "dev", "test": "testing"}
    assert {split: arranged(*given, split=split).split for split in chosen} == chosen
    for missing in ("validation", "extra"):  # of the first there are two
        with pytest.raises(
            ValueError, match=f"data.split is {missing}, but the splits in HERE are Train, dev, val, test"
        ):
            arranged(*given, split=missing)
    with pytest.raises(ValueError, match=r"data\.split is train, but the splits in HERE are test: choose"):
        arranged("test/1.png")
    with pytest.raises(ValueError, match=r"data\.split is test, but HERE is not divided into splits"):
        arranged("cat/1.png", split="test")


def test_a_label_means_the_same_in_every_split():
    """`val` has two of the three classes and `test` another one; by themselves their labels would begin at 0."""
    given = ["train/ant/1.png", "train/bee/1.png", "train/cat/1.png", "val/bee/1.png", "val/cat/1.png"]
    given += ["test/cat/1.png", "test/dog/1.png"]
    train, val, test = (arranged(*given, split=split) for split in ("train", "val", "test"))
    assert (train.labels, val.labels, test.labels) == ((0, 1, 2), (1, 2), (2, None))
    assert train.classes == val.classes == test.classes == ("ant", "bee", "cat")
    assert test.strays == "1 picture (test/dog/1.png) is of a class that train lacks"
    assert train.strays == val.strays == ""
    assert (train.unseen, val.unseen, test.unseen) == ("val", "train", "val")  # test cannot serve where labels are fed
    assert arranged("train/a/1.png", "val/a/1.png", "test/a/1.png").unseen == "test"
    assert arranged("train/1.png", "val/1.png", "test/1.png").unseen == "test"
    assert arranged("train/1.png").unseen is None


def patches(root, splits=("train", "test")):
    """Noisy pictures of three classes, dark to bright, in each split."""
    rng = np.random.default_rng(0)
    for split in splits:
        for i, name in enumerate(("ant", "bee", "cat")):
            (root / split / name).mkdir(parents=True)
            for j in range(60):
                pixels = rng.integers(80 * i, 80 * i + 80, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{j}.png")
    return root


def test_names_are_the_same_however_their_accents_are_encoded():
    found = arranged("train/e\u0301/a.png", "train/b/a.png", "val/\u00e9/a.png", "val/b/a.png", split="val")
    assert found.classes == ("b", "e\u0301")
    assert (found.labels, found.strays) == ((0, 1), "")


def test_many_classes_and_odd_names_keep_to_a_line():
    assert data.numbered([*"ab"]) == "0 a, 1 b"
    assert data.numbered(list(map(str, range(3000)))).endswith(", 19 19 and 2,980 more")
    assert data.numbered(["a\nb\x1b[31m", "\u00e9 \udcff"]) == "0 a\\nb\\x1b[31m, 1 \u00e9 \\udcff"


def test_a_run_on_splits_watches_and_measures_itself_by_the_others(tmp_path, capfd):
    root, run = patches(tmp_path / "pictures"), tmp_path / "run"
    argv = [*SMALL, f"--data.path={root}", "--model.conditional=true", f"--run.dir={run}", "--train.batch_size=8"]
    weights = tmp_path / "extractor.safetensors"
    save_file(Classifier(size=(32, 32), channels=3, classes=3).state_dict(), weights)  # to train one takes a minute
    quick = ["extractor=classifier", f"extractor_weights={weights}", "num=150", "metrics=kd_classifier,prdc"]
    argv += ["--eval.every=2", *(f"--eval.{setting}" for setting in quick)]
    log = tmp_path / "log"
    assert launch(argv, log=log) == [0], log.read_text()
    assert "guard/memory is off" not in log.read_text()
    record = metrics(run)[-1]
    assert record["eval/protocol"]["reference"] == "split train of folder"
    assert record["eval/protocol"]["reference_num"] == 180
    report = tmp_path / "report.json"
    assert cli.main(["evaluate", str(run), "--num=150", "--reference=test", f"--json={report}"]) == 0
    said = json.loads(report.read_text())
    assert said["protocol"]["reference"] == "split test of folder"
    assert said["floor"]["precision"] > 0.5  # of the training images, by the same measure
    loaded = data.load(DataConfig(source="folder", path=str(root), split="test"))
    assert loaded.labels.tolist() == [0] * 60 + [1] * 60 + [2] * 60


# A run's folder among the pictures ------------------------------------------------------------------------------------


def test_nothing_may_be_written_among_the_pictures(tmp_path, capfd, monkeypatch):
    root = folder(tmp_path / "pictures", *(f"cat/{i}.png" for i in range(4)))
    (tmp_path / "elsewhere").mkdir()
    picture(tmp_path / "elsewhere" / "1.png")
    (root / "dog").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "way_in").symlink_to(root / "cat")
    (tmp_path / "new").symlink_to(root / "cat" / "not yet")
    before = sorted(tmp_path.rglob("*"))
    own = tmp_path / "own" / "samples"
    argv = ["train", *SMALL, f"--data.path={root}"]
    inside = [
        root,
        root / "run",
        root / "cat" / "new" / "run",
        tmp_path / "elsewhere" / "run",
        tmp_path / "way_in" / "r",
    ]
    monkeypatch.chdir(tmp_path)
    for run in (*inside, tmp_path / "new", "pictures/../pictures/run", root / ".runs" / "a"):
        said = complaint(capfd, *argv, f"--run.dir={run}", *([] if run == root else ["--check"]))
        assert f"run.dir is {run}, which is inside {root}, the folder of pictures" in said
    said = complaint(capfd, *argv, "--run.dir=run", f"--data.cache={root / 'cache'}")
    assert f"data.cache is {root / 'cache'}, which is inside" in said
    said = complaint(capfd, "train", *TINY, f"--run.dir={root / 'run'}", "--eval.every=1", f"--eval.reference={root}")
    assert "run.dir is" in said
    assert "--out is" in complaint(capfd, "data", str(root), "--out", str(root / "data.png"))
    assert sorted(tmp_path.rglob("*")) == before
    picture(own / "1.png")
    said = complaint(capfd, "train", *SMALL, f"--data.path={own}", f"--run.dir={own.parent}")
    assert "keeps its own samples" in said
    assert cli.main([*argv, f"--run.dir={tmp_path / 'run'}", "--check"]) == 0


# Labels ---------------------------------------------------------------------------------------------------------------


def test_a_stray_picture_is_named_where_labels_are_needed(tmp_path, capfd):
    root = folder(tmp_path / "pictures", "stray.png", *(f"{name}/{i}.png" for name in ("cat", "dog") for i in range(5)))
    assert found(root).classes is None
    argv = [*SMALL, f"--data.path={root}", f"--run.dir={tmp_path / 'run'}"]
    said = complaint(capfd, "train", *argv, "--model.conditional=true")
    assert "have no labels, because 1 picture (stray.png) lies beside the class folders" in said
    assert "model.conditional is true" in said
    quick = ["--eval.extractor=classifier", "--eval.metrics=kd_classifier", "--eval.num=10"]
    said = complaint(capfd, "train", *argv, "--eval.every=1", *quick)
    assert "because 1 picture (stray.png) lies beside the class folders" in said
    assert cli.main(["data", str(root), "--out", str(tmp_path / "seen.png")]) == 0
    assert "classes      none, because 1 picture (stray.png) lies beside the class folders" in capfd.readouterr().out


def test_labels_of_a_dataset_json_take_the_place_of_class_folders(tmp_path):
    root = folder(tmp_path / "pictures", "00000/a.png", "00000/b.png", "00001/c.png")
    (root / "dataset.json").write_text(
        json.dumps({"labels": [["00000/a.png", 2], ["00001/c.png", 0], ["00000/b.png", 1]]})
    )
    source = found(root)
    assert source.classes == ("0", "1", "2")
    assert labels(source) == [2, 1, 0]
    assert source.left_out == ""
    relabelled = json.dumps({"labels": [["00000/a.png", 1], ["00001/c.png", 0], ["00000/b.png", 2]]})
    (root / "dataset.json").write_text(relabelled)
    assert found(root).fingerprint() != source.fingerprint()


@pytest.mark.parametrize(
    ("said", "labels", "strays"),
    [
        (None, (None, None), ""),
        ([], (None, None), ""),
        ([["0/a.png", 1]], (1, None), "1 picture (0/b.png) has no label in dataset.json"),
        ([["0/a.png", 1], ["0/b.png", None]], (1, None), "1 picture (0/b.png) has no label in dataset.json"),
        ([["./0/a.png", "1"], ["0\\b.png", 0.0], ["0/a.png", 1]], (1, 0), ""),
        (
            [["x/a.png", 1], ["x/b.png", 0]],
            (None, None),
            "no name in dataset.json, such as 'x/a.png', is that of a picture beside it",
        ),
        ([["0/a.png", [0.5, 1.0]], ["0/b.png", [1.0, 0.5]]], (None, None), ""),  # no classes: a camera's position
        ([["0/a.png", 1], ["0/b.png", 0], ["0/gone.png", 5]], (1, 0), ""),
        ("of other things", (0, 0), ""),  # not StyleGAN's, so folders are classes
    ],
)
def test_every_kind_of_dataset_json(said, labels, strays):
    one = arranged("0/a.png", "0/b.png", tables={"dataset.json": said})
    assert one.labels == labels
    assert one.strays == strays
    assert (one.classes is None) == (set(labels) == {None})


def test_impossible_labels_are_refused():
    for label in (-1, 10**9, 0.5, "cat", True):
        with pytest.raises(ValueError, match=f"dataset.json in HERE has the label {label!r}"):
            arranged("0/a.png", tables={"dataset.json": [["0/a.png", label]]})
    with pytest.raises(ValueError, match=r"dataset\.json in HERE gives '0/a\.png' two labels, 0 and 1"):
        arranged("0/a.png", tables={"dataset.json": [["0/a.png", 0], ["./0/a.png", 1]]})
    with pytest.raises(ValueError, match=r"dataset\.json in HERE has 7 among its labels: each must be a pair"):
        arranged("0/a.png", tables={"dataset.json": [["0/a.png", 0], 7]})


@pytest.mark.parametrize("content", [b'{"labels": [', b"\xff", b"[" * 100_000], ids=["cut", "binary", "deep"])
def test_a_damaged_dataset_json_is_refused(content):
    with pytest.raises(ValueError, match=r"dataset\.json in HERE is damaged"):
        arrange(["0/a.png", "dataset.json"], split="train", where="HERE", read=lambda name: content)


def test_beside_a_split_with_a_dataset_json_class_folders_are_no_labels():
    """They would begin at 0 again, whatever the file means by it."""
    given, said = ["train/0/1.png", "train/0/2.png", "val/a/1.png"], [["0/1.png", 1], ["0/2.png", 0]]
    for split, labels in (("train", (1, 0)), ("val", (None,))):
        assert arranged(*given, split=split, tables={"train/dataset.json": said}).labels == labels


def test_a_resume_on_other_images_is_told_what_differs(tmp_path, capfd):
    root = folder(tmp_path / "pictures", *(f"{name}/{i}.png" for name in ("ant", "cat", "dog") for i in range(2)))
    argv = [*SMALL, f"--data.path={root}", f"--run.dir={tmp_path / 'run'}"]
    assert launch(argv) == [0]
    assert launch([*argv, "--run.extend=1"]) == [0]  # the same images

    def refused(words):
        log = tmp_path / "log"
        log.unlink(missing_ok=True)
        assert launch([*argv, "--run.extend=2"], log=log) == [2], log.read_text()
        said = log.read_text()
        assert "was trained on other images than folder has now: " in said
        capfd.readouterr()
        assert cli.main(["train", "--check", *argv, "--run.extend=2"]) == 2  # and before any rank has joined another
        assert capfd.readouterr().err in said
        assert all(word in said for word in words), said

    (root / "cat").rename(root / "zebra")
    refused(["class 1 is now 'dog', was 'cat'; class 2 is now 'zebra', was 'dog'"])
    (root / "zebra").rename(root / "cat")
    picture(root / "bee" / "1.png", 200)
    refused(["there were 6 images, now there are 7; there were 3 classes, now there are 4 (new: bee)"])
    (root / "bee" / "1.png").unlink()
    picture(root / "cat" / "1.png", 77)
    refused(["their number and the names of classes are the same, but pictures, their order or labels differ"])
    picture(root / "cat" / "1.png", 30)
    state = max(tmp_path.glob("run/checkpoints/step_*")) / "state.json"
    assert json.loads(state.read_text())["data"] == {"count": 6, "classes": ["ant", "cat", "dog"]}

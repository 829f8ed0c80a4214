"""`distgan synthesize`: labelled data sets that other libraries read, and whether they help."""

import dataclasses
import json
import signal
import subprocess
import sys

import datasets
import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from scipy import stats
from support.commands import BIN, complaint
from support.generators import NAMES, exported
from support.programs import launch
from support.runs import wait_for

from distgan import cli, data, files, load_generator
from distgan.applications import benefit
from distgan.applications.benefit import Plan
from distgan.data import sources
from distgan.evaluation import weights as extractor_weights
from distgan.models import to_bytes
from distgan.recipe import DataConfig, EvalConfig
from distgan.storage import exported as storage
from distgan.train import train


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    return exported(tmp_path_factory.mktemp("labelled") / "generator", names=NAMES)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two classes that differ in colour, with a split for tests: 32x32."""
    root = tmp_path_factory.mktemp("data") / "pictures"
    rng = np.random.default_rng(0)
    for split, count in (("train", 40), ("test", 25)):
        for name, channel in (("red", 0), ("blue", 2)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                array = rng.integers(0, 120, (32, 32, 3), dtype=np.uint8)
                array[..., channel] += 100
                Image.fromarray(array).save(folder / f"{i:03d}.png")
    return root


@pytest.fixture(scope="module")
def run(pictures, tmp_path_factory):
    """A short run with labels on those pictures."""
    folder = tmp_path_factory.mktemp("run") / "run"
    argv = ["--data.source=folder", f"--data.path={pictures}", "--model.conditional=true", "--model.width=4"]
    argv += ["--model.latent_dim=8", "--train.batch_size=16", "--train.steps=4", "--track.to=none"]
    assert launch([*argv, f"--run.dir={folder}"]) == [0]
    return folder


def expected(folder, label, count, *, seed=0):
    generator = load_generator(folder)
    chunks = [
        to_bytes(generator.images(first, seed=seed, stream=f"synthetic.{label}", label=label))
        for first in range(0, count, 64)
    ]
    return torch.cat(chunks)[:count].permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("form", ["parquet", "folder"])
def test_other_libraries_read_what_is_written(labelled, tmp_path, form):
    out, order = tmp_path / "out", ["--count=big, red=3", "--count=0=70"]
    assert cli.main(["synthesize", str(labelled), f"--out={out}", *order, f"--form={form}", "--seed=4"]) == 0
    found = datasets.load_dataset(str(out), cache_dir=str(tmp_path / "cache"))["train"]
    by_class = {label: [] for label in ("cat", "big, red")}
    for row in found:
        name = found.features["label"].int2str(row["label"]) if form == "parquet" else row["label"]
        by_class[name].append(np.array(row["image"]))
    for label, (name, count) in {0: ("cat", 70), 2: ("big, red", 3)}.items():
        images = np.stack(by_class[name])
        drawn = expected(labelled, label, count, seed=4)
        assert images.shape == drawn.shape
        assert {image.tobytes() for image in images} == {image.tobytes() for image in drawn}
    ours = DataConfig(source="hub", path=str(out)) if form == "parquet" else DataConfig(source="folder", path=str(out))
    source = sources.find(ours)
    assert source.count == 73
    assert source.classes == (NAMES if form == "parquet" else ("0-cat", "2-big_red"))
    if form == "folder":
        assert len(torchvision.datasets.ImageFolder(out / "train")) == 73
    card = (out / "README.md").read_text()
    for words in ("Every image of this data set is synthetic", "| cat | 70 | 70 |", "| big, red | 3 | 3 |", "Seed: 4"):
        assert words in card


def test_class_names_of_every_kind_stay_what_they_are(tmp_path):
    names = ("test", "None", "01", "1", ".net", "..", "True", "a/b")
    folder = exported(tmp_path / "g", names=names)
    for form in ("parquet", "folder"):
        out = tmp_path / form
        assert cli.main(["synthesize", str(folder), f"--out={out}", "--per-class=2", f"--form={form}"]) == 0
        found = datasets.load_dataset(str(out), cache_dir=str(tmp_path / "cache"))["train"]
        labels = found["label"] if form == "folder" else map(found.features["label"].int2str, found["label"])
        assert sorted(labels) == sorted(2 * names)
    source = sources.find(DataConfig(source="folder", path=str(tmp_path / "folder")))
    assert source.count == 16
    assert len(source.classes) == 8


def test_what_another_program_has_written_meanwhile_is_not_lost(tmp_path):
    """Both checked an empty place before they began."""
    for existed in (False, True):
        place = tmp_path / str(existed)
        if existed:
            place.mkdir()
        with pytest.raises(OSError, match=r"written|not empty"), files.whole_folder(place) as partial:
            (partial / "ours").write_text("")
            place.mkdir(exist_ok=True)
            (place / "theirs").write_text("")
        assert [file.name for file in place.rglob("*")] == ["theirs"]
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_leaves_nothing_behind(labelled, tmp_path, number):
    argv = [BIN / "distgan", "synthesize", labelled, f"--out={tmp_path}/out", "--per-class=1000000"]
    running = subprocess.Popen(list(map(str, argv)), stderr=subprocess.PIPE)
    wait_for(lambda: list(tmp_path.iterdir()))
    running.send_signal(number)
    assert running.wait(60) != 0
    assert not list(tmp_path.iterdir())


def test_a_balanced_set_leaves_out_classes_that_were_never_seen(labelled, tmp_path):
    out = tmp_path / "out"
    assert cli.main(["synthesize", str(labelled), f"--out={out}", "--per-class=5", f"--json={tmp_path}/n.json"]) == 0
    assert json.loads((tmp_path / "n.json").read_text())["counts"] == {"cat": 5, "T-shirt/top": 5, "big, red": 5}


def test_two_processes_write_what_one_writes(run, tmp_path):
    """Also where a filter makes the number of samples that must be drawn unknown."""
    filtered = tmp_path / "filtered"
    assert cli.main(["synthesize", str(run), f"--out={filtered}", "--count=0=150", "--min-confidence=0.001"]) == 0
    rows = datasets.load_dataset(str(filtered), cache_dir=str(tmp_path / "cache"))["train"]
    argv = [str(run), "--count=0=150", f"--min-confidence={np.median(rows['confidence'])}"]
    for form in ("parquet", "folder"):
        for world in (1, 2):
            out = [f"--out={tmp_path}/{form}{world}", f"--form={form}", f"--json={tmp_path}/{form}{world}.json"]
            assert launch([*argv, *out], verb="synthesize", world=world) == [0] * world
        one, two = (
            {file.relative_to(tmp_path / name): file.read_bytes() for file in (tmp_path / name).rglob("*.*")}
            for name in (f"{form}1", f"{form}2")
        )
        assert one == two
        numbers = [json.loads((tmp_path / f"{form}{world}.json").read_text()) for world in (1, 2)]
        assert numbers[0] == numbers[1]
        assert max(numbers[0]["drawn"].values()) > 200


def test_a_filter_keeps_what_the_runs_classifier_believes(run, pictures, tmp_path):
    out, found = tmp_path / "out", storage.find(str(run))
    weights = extractor_weights.find(EvalConfig(extractor="classifier"), found.recipe.data, found.spec, own=None)
    judge = extractor_weights.build(EvalConfig(extractor="classifier"), weights, found.spec)

    def believed(count):
        drawn = torch.from_numpy(expected(run, 0, count)).permute(0, 3, 1, 2)
        return judge(drawn)[1].softmax(1)[:, 0]

    least = float(believed(200).median())
    argv = ["synthesize", str(run), f"--out={out}", "--count=0=40", f"--min-confidence={least}"]
    assert cli.main([*argv, f"--json={tmp_path}/n.json"]) == 0
    (drawn,) = json.loads((tmp_path / "n.json").read_text())["drawn"].values()
    assert drawn > 50  # half of them do not pass
    rows = datasets.load_dataset(str(out), cache_dir=str(tmp_path / "cache"))["train"]
    passed = [value for value in believed(drawn).tolist() if value >= least]
    assert [row["confidence"] for row in rows] == pytest.approx(passed, abs=1e-5)
    assert len(passed) == 40
    assert believed(drawn)[-1] >= least  # no more were drawn than were needed


MEASURE = """
import sys, resource
from distgan import cli
argv = ["synthesize", sys.argv[1], "--form=" + sys.argv[3]]
cli.main([*argv, "--out=" + sys.argv[2] + "/few", "--count=cat=1100"])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
cli.main([*argv, "--out=" + sys.argv[2] + "/many", "--count=cat=12000"])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.parametrize("form", ["parquet", "folder"])
def test_any_number_is_written_in_constant_memory(labelled, tmp_path, form):
    """12,000 images are 37 MB."""
    command = [sys.executable, "-c", MEASURE, labelled, tmp_path, form]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(result.stdout.split()[-1]) < 15


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ["--per-class N", "--count CLASS=N"]),
        (["--per-class=1", "--count=cat=1"], ["either --per-class N"]),
        (["--per-class=0"], ["is 0", "at least 1"]),
        (["--count=cat"], ["--count is cat", "cat=100"]),
        (["--count=catt=3"], ['"catt"', 'did you mean "cat"?']),
        (["--count=empty=3"], ["empty", "none of the training images"]),
        (["--count=cat=3", "--count=cat=4"], ["cat twice"]),
        (["--count=cat=0"], ["--count is cat=0"]),
        ([f"--count=cat={'9' * 5000}"], ["as in cat=100"]),
        (["--per-class=3", "--repeats=3"], ["--repeats has no meaning"]),
        (["--per-class=3", "--json=out"], ["written there, too"]),
        (["--per-class=1", "--min-confidence=1"], ["least confidence is 1"]),
        (["--per-class=1", "--min-confidence=0.5"], ["a filter needs the classifier"]),
        (["--per-class=1", "--out=full"], ["full, which is not empty"]),
        (["--per-class=1", "--out=full", "--overwrite"], ["full", "something else than a synthetic data set"]),
        (["--per-class=1", "--out=no/out"], ["no folder no"]),
        (["--benefit=20"], ["has no recipe", "give the folder of a run"]),
    ],
)
def test_mistakes_are_said_and_nothing_is_lost(labelled, tmp_path, monkeypatch, capfd, argv, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "README.md").write_text("mine")
    said = complaint(capfd, "synthesize", str(labelled), "--out=out", *argv)
    assert all(word in said for word in words), said
    assert [file.name for file in tmp_path.rglob("*")] == ["full", "README.md"]


def test_a_generator_without_labels_is_refused(tmp_path, capfd):
    folder = exported(tmp_path / "g")
    said = complaint(capfd, "synthesize", str(folder), f"--out={tmp_path}/out", "--per-class=3")
    assert "trained without labels" in said
    assert "distgan sample" in said


def test_a_filter_that_nothing_passes_gives_up(run, tmp_path, capfd):
    argv = ["synthesize", str(run), f"--out={tmp_path}/out", "--per-class=5", "--min-confidence=0.999999"]
    said = complaint(capfd, *argv)
    assert "reach the confidence 0.999999" in said
    assert not list(tmp_path.iterdir())


def test_only_a_synthetic_data_set_is_replaced(labelled, tmp_path):
    out = tmp_path / "out"
    for count in (30, 5):
        argv = ["synthesize", str(labelled), f"--out={out}", f"--count=cat={count}", "--form=folder", "--overwrite"]
        assert cli.main(argv) == 0
        assert len(list((out / "train" / "0-cat").iterdir())) == count
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


# The benefit ----------------------------------------------------------------------------------------------------------


def test_the_benefit_is_measured_with_generators_of_the_same_few_images(run, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(benefit, "_STEPS", 30)
    argv = ["synthesize", str(run), "--benefit=8,16", "--repeats=2", "--per-class=20", f"--out={tmp_path}/b"]
    assert cli.main([*argv, f"--json={tmp_path}/n.json"]) == 0
    said = capfd.readouterr().out
    numbers = json.loads((tmp_path / "n.json").read_text())
    for count in ("8", "16"):
        assert set(numbers["accuracies"][count]) == set(benefit.ARMS)
        for arm, values in numbers["accuracies"][count].items():
            assert len(values) == 2
            assert arm in said
    # Colours are told apart at once.
    assert min(numbers["accuracies"]["16"]["real"]) > 0.9
    for count in (8, 16):
        for seed in range(2):
            place = tmp_path / "b" / f"n{count}-seed{seed}"
            real = data.load(DataConfig(source="hub", path=str(place / "real")))
            assert torch.bincount(real.labels).tolist() == [count, count]
            trained_on = storage.find(str(place / "run")).recipe
            assert trained_on.data.path == str(place / "real")
            assert trained_on.run.seed == seed
    # The same command goes on: what is done is not done again.
    (tmp_path / "b" / "n16-seed1" / "accuracies.json").unlink()
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "b").rglob("model.safetensors")}
    assert cli.main([*argv, f"--json={tmp_path}/again.json"]) == 0
    assert json.loads((tmp_path / "again.json").read_text()) == numbers
    assert {file: file.stat().st_mtime_ns for file in before} == before
    # Another measurement does not get mixed with it.
    said = complaint(capfd, *[word.replace("--per-class=20", "--per-class=21") for word in argv])
    assert "another number of synthetic images" in said


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--benefit=41"], ["--benefit has 41", "only 40 images"]),
        (["--benefit=7,20"], ["train.batch_size is 16", "7 images of each of 2 classes"]),
        (["--benefit=0"], ["--benefit is 0"]),
        (["--benefit=8,8"], ["--benefit is 8,8", "twice"]),
        (["--benefit=8", "--min-confidence=0.9"], ["--min-confidence has no meaning"]),
        (["--benefit=8,x"], ["--benefit is 8,x"]),
        (["--benefit=8", "--repeats=0"], ["--repeats is 0"]),
        (["--benefit=8", "--per-class=0"], ["--per-class is 0"]),
        (["--benefit=8", "--count=red=3"], ["--count has no meaning with --benefit"]),
    ],
)
def test_mistakes_in_a_plan_are_said_before_any_training(run, tmp_path, capfd, argv, words):
    said = complaint(capfd, "synthesize", str(run), f"--out={tmp_path}/b", *argv)
    assert all(word in said for word in words), said
    assert not list(tmp_path.iterdir())


def test_test_images_are_never_among_the_real_ones(run, tmp_path, monkeypatch):
    monkeypatch.setattr(benefit, "_STEPS", 1)
    config = storage.find(str(run)).recipe
    benefit.benefit(config, Plan(counts=[40], seeds=1, synthetic=2), tmp_path / "b", train)
    real = data.load(DataConfig(source="hub", path=str(tmp_path / "b" / "n40-seed0" / "real"))).pixels
    seen, unseen = data.load(config.data).pixels, data.load(data.test_split(config.data)).pixels
    images = {image.numpy().tobytes() for image in real}
    assert images == {image.numpy().tobytes() for image in seen}
    assert not images & {image.numpy().tobytes() for image in unseen}


def test_a_training_that_was_stopped_is_not_measured(run, tmp_path, monkeypatch):
    """Only a Ctrl-C or a preemption ends a training early; here `run.stop_at` does."""
    monkeypatch.setattr(benefit, "_STEPS", 1)
    config, plan = storage.find(str(run)).recipe, Plan(counts=[10, 20], seeds=1, synthetic=2)

    def stopped(config):
        train(dataclasses.replace(config, run=dataclasses.replace(config.run, stop_at=2)))

    assert benefit.benefit(config, plan, tmp_path / "b", stopped) == {}
    assert not list((tmp_path / "b").rglob("accuracies.json"))
    found = benefit.benefit(config, plan, tmp_path / "b", train)
    assert [len(values) for values in found["20"].values()] == [1] * len(benefit.ARMS)


def test_the_interval_is_students():
    values = [0.61, 0.66, 0.58, 0.7, 0.64]
    mean, half = benefit.interval(values)
    low, high = stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=stats.sem(values))
    assert (mean - half, mean + half) == pytest.approx((low, high))


def test_augmentation_shifts_by_at_most_four_pixels_and_mirrors_half():
    pixels = torch.randint(256, (400, 3, 32, 32), dtype=torch.uint8)
    moved = benefit._augmented(pixels, 0, 0, mirror=True)
    inner = pixels[:, :, 8:24, 8:24]
    mirrored = 0
    for before, after in zip(inner, moved, strict=True):
        for flipped in (False, True):
            image = after.flip(2) if flipped else after
            places = [
                (row, column)
                for row in range(4, 13)
                for column in range(4, 13)
                if torch.equal(image[:, row : row + 16, column : column + 16], before)
            ]
            if places:
                mirrored += flipped
                break
        assert len(places) == 1
    assert 150 < mirrored < 250
    unmirrored = benefit._augmented(pixels, 0, 0, mirror=False)
    assert not torch.equal(unmirrored, moved)

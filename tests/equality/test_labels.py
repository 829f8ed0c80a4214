"""Labels, from the data to the pictures that are asked for."""

import json

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from support.commands import complaint
from support.programs import launch
from support.runs import QUICK, TINY, VARIANTS

from distgan import cli, load_generator
from distgan.pictures import grid

CONDITIONAL = [*TINY, *VARIANTS["sngan-labels-resnet-translation"]]


@pytest.fixture(scope="module")
def labelled_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("labelled") / "run"
    assert launch([*CONDITIONAL, f"--run.dir={folder}"], world=2) == [0, 0]
    return folder


def test_the_training_grid_has_a_row_of_each_class(labelled_run):
    generator = load_generator(labelled_run)
    assert sum(generator.class_counts) == 1797
    assert len(generator.class_counts) == 10
    with Image.open(labelled_run / "samples" / "step_00000011.png") as last:
        assert last.tobytes() == grid(generator.sample_rows(range(10), 8, seed=0), columns=8).tobytes()


def test_classes_are_drawn_a_row_each(labelled_run, tmp_path, capfd):
    out = tmp_path / "grid.png"
    assert cli.main(["sample", str(labelled_run), "--classes=7,0", "--num=3", "--seed=5", f"--out={out}"]) == 0
    generator = load_generator(labelled_run)
    rows = torch.cat([generator.sample(3, seed=5, label=label) for label in (7, 0)])
    with Image.open(out) as picture:
        assert picture.tobytes() == grid(rows, columns=3).tobytes()
    capfd.readouterr()
    for classes, words in (("0,10", "class 10 is asked for, but the generator has the classes 0 to 9"), ("a", "0,3,7")):
        assert words in complaint(capfd, "sample", str(labelled_run), f"--classes={classes}", f"--out={out}")


def test_a_labelled_generator_is_measured_and_handed_on_like_any_other(labelled_run, tmp_path):
    found = []
    for world in (1, 2):
        argv = [str(labelled_run), *QUICK, f"--json={tmp_path / f'{world}.json'}"]
        assert launch(argv, verb="evaluate", world=world) == [0] * world
        found.append(json.loads((tmp_path / f"{world}.json").read_text())["metrics"])
    assert found[1] == pytest.approx(found[0], rel=1e-6)
    assert cli.main(["export", str(labelled_run), f"--to={tmp_path / 'shared'}"]) == 0
    theirs, ours = load_generator(tmp_path / "shared"), load_generator(labelled_run)
    assert torch.equal(theirs.sample(4, label=3), ours.sample(4, label=3))
    card = (tmp_path / "shared" / "README.md").read_text()
    assert "- Classes: 0 0, 1 1," in card
    assert "pipeline_tag" not in card
    found = {}
    exec(card.split("```python\n")[1].split("```")[0].replace("PATH_OR_ID", str(tmp_path / "shared")), found)
    assert torch.equal(found["images"], ours.sample(64, seed=1, label=9))


def test_unseen_images_without_labels_are_done_without(tmp_path):
    """As where a data set hides those of its test split."""
    pictures = np.random.default_rng(0).integers(0, 256, (24, 32, 32, 3), dtype=np.uint8)
    (tmp_path / "copy" / "plain_text").mkdir(parents=True)
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
    for split, labels in (("train", [i % 10 for i in range(24)]), ("test", [-1] * 24)):
        rows = {"img": [Image.fromarray(picture) for picture in pictures], "label": labels}
        file = tmp_path / "copy" / "plain_text" / f"{split}-00000-of-00001.parquet"
        datasets.Dataset.from_dict(rows, features=features).to_parquet(file)
    log = tmp_path / "log"
    source = ["--data.source=cifar10", f"--data.path={tmp_path / 'copy'}", "--train.steps=3"]
    assert launch([*CONDITIONAL, *source, f"--run.dir={tmp_path / 'run'}"], log=log) == [0]
    said = "guard/memory is off: it needs images that nobody trains on, and some of them have labels that the training"
    assert said in log.read_text()
    assert launch([*TINY, *source, f"--run.dir={tmp_path / 'unlabelled'}"]) == [0]


def test_labels_of_images_that_have_none_are_refused(tmp_path, capfd):
    (tmp_path / "pictures").mkdir()
    for i in range(16):
        Image.new("L", (32, 32), i).save(tmp_path / "pictures" / f"{i}.png")
    source = ["--data.source=folder", f"--data.path={tmp_path / 'pictures'}", "--data.channels=1"]
    said = complaint(capfd, "train", *TINY, *source, "--model.conditional=true", f"--run.dir={tmp_path / 'run'}")
    assert "model.conditional is true" in said
    assert "have no labels" in said
    (tmp_path / "one" / "class").mkdir(parents=True)
    for i in range(16):
        Image.new("L", (32, 32), i).save(tmp_path / "one" / "class" / f"{i}.png")
    source[1] = f"--data.path={tmp_path / 'one'}"
    said = complaint(capfd, "train", *TINY, *source, "--model.conditional=true", f"--run.dir={tmp_path / 'run'}")
    assert "of one class" in said
    assert not (tmp_path / "run").exists()

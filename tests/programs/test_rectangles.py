"""A whole run of RGBA images that are not square, and what its users do with it."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from support.programs import float64, launch
from support.runs import TINY, metrics, tensors

from distgan import cli, load_generator
from distgan.evaluation.extractors import Classifier

KEYS = ("loss/discriminator", "loss/generator", "score/real", "score/fake_before", "score/fake_after")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """RGBA pictures of two classes, 40x70: a red or a blue disk on nothing."""
    folder = tmp_path_factory.mktemp("pictures") / "p"
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:40, :70]
    for name, colour in {"red": (255, 0, 0), "blue": (0, 0, 255)}.items():
        (folder / name).mkdir(parents=True)
        for i in range(30):
            disk = (x - rng.integers(15, 55)) ** 2 + (y - rng.integers(10, 30)) ** 2 < 100
            clear = np.zeros((40, 70, 4), np.uint8)
            clear[disk] = (*colour, 255 - i)
            Image.fromarray(clear).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Of a classifier that was not trained, because a training takes a minute."""
    file = tmp_path_factory.mktemp("weights") / "extractor.safetensors"
    torch.manual_seed(0)  # noqa: TID251
    save_file(Classifier(size=(32, 48), channels=4, classes=2).state_dict(), file)
    return file


@pytest.fixture(scope="module")
def recipe(pictures, weights):
    quick = ["every=6", "extractor=classifier", f"extractor_weights={weights}", "num=64", "metrics=kd_classifier,prdc"]
    return [
        *TINY,
        *("--data.source=folder", f"--data.path={pictures}", "--data.image_size=[32,48]", "--data.channels=4"),
        *("--data.fit=pad", "--model.conditional=true", "--augment.policy=color,translation,cutout"),
        *(f"--eval.{setting}" for setting in quick),
    ]


@pytest.fixture(scope="module")
def run(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert launch([*recipe, f"--run.dir={folder}"]) == [0]
    return folder


def read(file):
    with Image.open(file) as image:
        return image.mode, np.array(image)


def test_a_run_trains_measures_itself_and_resumes_bit_for_bit(run, recipe, tmp_path):
    parts = tmp_path / "parts"
    assert launch([*recipe, f"--run.dir={parts}", "--run.stop_at=4"]) == [0]
    assert launch([*recipe, f"--run.dir={parts}"]) == [0]
    assert tensors(parts, 11) == tensors(run, 11)
    assert any("eval/kd_classifier" in record for record in metrics(run))
    mode, sheet = read(run / "samples" / "step_00000004.png")
    assert mode == "RGBA"
    assert (sheet.shape[0] - 2) % 34 == (sheet.shape[1] - 2) % 50 == 0
    log = tmp_path / "log"
    assert launch([*recipe, f"--run.dir={run}", "--data.fit=crop", "--run.extend=1"], log=log) == [2]
    assert "data.fit: pad in the run, crop now" in log.read_text()


def test_two_processes_make_the_same_updates(recipe, tmp_path):
    losses = []
    for world in (1, 2):
        folder = tmp_path / str(world)
        argv = [*recipe, f"--run.dir={folder}", "--track.log_every=1", "--train.steps=5", "--eval.every=null"]
        assert launch(argv, world=world, setups=[float64]) == [0] * world
        losses.append([record[key] for record in metrics(folder) for key in KEYS])
    assert len(losses[0]) == 25
    assert losses[1] == pytest.approx(losses[0], rel=1e-9, abs=0)


def test_its_images_are_drawn_measured_and_handed_on(run, weights, tmp_path, capfd):
    folder, array, to = tmp_path / "drawn", tmp_path / "a.npz", tmp_path / "export"
    assert cli.main(["sample", str(run), "--num=40", "--seed=1", f"--out={folder}/"]) == 0
    assert cli.main(["sample", str(run), "--num=40", "--seed=1", f"--out={array}"]) == 0
    assert cli.main(["export", str(run), f"--to={to}", "--with-discriminator"]) == 0
    assert "A generator of 32x48 RGBA images" in (to / "README.md").read_text()
    images = load_generator(to).sample(40, seed=1).permute(0, 2, 3, 1).numpy()
    assert images.shape == (40, 32, 48, 4)
    with np.load(array) as found:
        assert np.array_equal(found["arr_0"], images)
    files = sorted(folder.iterdir())
    assert len(files) == 40
    for file, image in zip(files, images, strict=True):
        mode, pixels = read(file)
        assert mode == "RGBA"
        assert np.array_equal(pixels, image)

    for given, reference in ((run, "train"), (to, str(folder))):
        argv = ["--extractor=classifier", f"--extractor-weights={weights}", "--num=40", f"--json={tmp_path}/n.json"]
        argv += ["--metrics=kd_classifier,prdc", f"--reference={reference}"]
        assert cli.main(["evaluate", str(given), *argv]) == 0
        report = json.loads((tmp_path / "n.json").read_text())
        assert report["protocol"]["reference_num"] == (60 if reference == "train" else 40)
        assert report["metrics"]["kd_classifier"] < 1e6
    Image.new("RGB", (48, 32)).save(tmp_path / "drawn" / "opaque.png")
    assert cli.main(["evaluate", str(to), *argv]) == 0  # it is opaque
    Image.new("RGB", (32, 48)).save(tmp_path / "drawn" / "a.png")
    assert cli.main(["evaluate", str(to), *argv]) == 2
    assert "a.png is 48x32x4, but the generator draws 32x48x4 (height x width" in capfd.readouterr().err


def test_its_images_are_searched_repaired_and_walked_between(run, pictures, tmp_path, capfd):
    few, latents = ["--steps=2", "--restarts=1", "--num=3"], tmp_path / "l.safetensors"
    argv = [str(run), str(pictures), *few]
    assert cli.main(["invert", *argv, f"--out={latents}"]) == 2
    assert "is 40x70x4, but the generator draws 32x48x4" in capfd.readouterr().err
    assert cli.main(["invert", *argv, "--fit", f"--out={latents}", f"--grid={tmp_path}/g.png"]) == 0
    _, sheet = read(tmp_path / "g.png")
    given = sheet[2:34, 2:50]
    assert (given[:2] == 0).all()  # padded, as training did
    assert given[..., 3].max() > 200
    argv = ["inpaint", str(run), "train", *few, "--mask=center", f"--out={tmp_path}/r", f"--grid={tmp_path}/i.png"]
    assert cli.main(argv) == 0
    mode, repaired = read(tmp_path / "r" / "train-00000.png")
    assert (mode, repaired.shape) == ("RGBA", (32, 48, 4))
    assert cli.main(["interpolate", str(run), f"--latents={latents}", "--steps=2", f"--out={tmp_path}/w.gif"]) == 0
    with Image.open(tmp_path / "w.gif") as walk:
        assert walk.size == (6 * 48, 6 * 32)
    assert cli.main(["compare", str(run), str(run), f"--out={tmp_path}/c.png"]) == 0
    argv = ["synthesize", str(run), "--per-class=4", "--form=folder", f"--out={tmp_path}/s"]
    assert cli.main(argv) == 0
    assert "8 of 32x48x4" in (tmp_path / "s" / "README.md").read_text()
    assert {read(file)[0] for file in (tmp_path / "s").rglob("*.png")} == {"RGBA"}

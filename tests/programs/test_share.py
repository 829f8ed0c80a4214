"""A generator handed on: exported, pushed, fetched; a run started from another's weights; data looked at."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from support.programs import launch
from support.runs import TINY, steps, tensors

from distgan import cli, load_generator


@pytest.fixture
def run(small_run):
    return small_run


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The calls made to the hub, pinned: what is uploaded lies in a folder, and is fetched from there."""
    stored = tmp_path / "hub"

    def create_repo(self, repo_id, *, exist_ok):
        return f"https://hub/{repo_id}"

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        shutil.copytree(folder_path, stored / repo_id)

    def snapshot_download(repo_id, *, allow_patterns):
        if not (stored / repo_id).is_dir():
            raise huggingface_hub.errors.LocalEntryNotFoundError("offline")
        fetched = tmp_path / "fetched" / repo_id
        fetched.mkdir(parents=True)
        for name in allow_patterns:
            if (stored / repo_id / name).exists():
                shutil.copy(stored / repo_id / name, fetched)
        return str(fetched)

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return stored


def test_an_export_carries_weights_recipe_card_and_samples_and_loads_from_the_hub(run, hub, tmp_path, capfd):
    to = tmp_path / "export"
    assert cli.main(["export", str(run), "--to", str(to), "--push-to-hub", "me/digits"]) == 0
    assert capfd.readouterr().out == f"{to}\nhttps://hub/me/digits\n"
    assert {file.name for file in to.iterdir()} == {
        *("model.safetensors", "config.json", "recipe.yaml", "samples.png", "README.md"),
    }
    expected = load_generator(run).sample(5, seed=1)
    for place in (to, "me/digits"):
        assert torch.equal(load_generator(place).sample(5, seed=1), expected)
    card = (to / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header["library_name"] == "distgan"
    for words in ("dcgan on digits", "11 generator updates", "132 real images", "mirrored at random", "None measured"):
        assert words in card
    with Image.open(to / "samples.png") as samples:
        assert samples.size == (8 * 34 + 2, 8 * 34 + 2)
    assert cli.main(["export", str(run), "--to", str(to)]) == 2  # in use
    assert "not an empty folder" in capfd.readouterr().err
    assert cli.main(["export", str(tmp_path), "--to", str(tmp_path / "other")]) == 2
    assert not (tmp_path / "other").exists()


def test_a_repository_without_safetensors_or_out_of_reach_gets_a_sentence(hub):
    (hub / "me" / "pickled").mkdir(parents=True)
    torch.save({}, hub / "me" / "pickled" / "pytorch_model.bin")  # noqa: TID251
    with pytest.raises(ValueError, match=r"it has no model\.safetensors"):
        load_generator("me/pickled")
    assert not list((hub.parent / "fetched").rglob("*.bin"))
    with pytest.raises(ValueError, match="hub cannot be reached"):
        load_generator("me/nothing")


def test_a_new_run_starts_from_another_runs_weights(run, tmp_path):
    new = tmp_path / "new"
    argv = [*TINY, f"--run.dir={new}", f"--train.init_from={run}", "--optim.lr=1e-20", "--ema.half_life=0"]
    assert launch([*argv, "--run.stop_at=1"], world=2) == [0, 0]
    theirs = run / "checkpoints" / "step_00000011"
    ours = new / "checkpoints" / "step_00000001"
    for name in ("generator", "discriminator"):
        before, after = (load_file(folder / f"{name}.safetensors") for folder in (theirs, ours))
        for key in before:
            if "running" not in key and "num_batches" not in key:
                torch.testing.assert_close(after[key], before[key], rtol=0, atol=1e-9)
    assert json.loads((ours / "state.json").read_text())["step"] == 1
    elsewhere = run.rename(run.with_name("moved"))  # a run that has begun does not need the other one any more
    try:
        assert launch(argv) == [0]
    finally:
        elsewhere.rename(run)
    assert steps(new) == [1, 6, 11]
    log = tmp_path / "log"
    wider = [*TINY, f"--run.dir={tmp_path / 'wider'}", f"--train.init_from={run}", "--model.width=5"]
    assert launch(wider, log=log) == [2]
    assert "belongs to another network" in log.read_text()
    assert not (tmp_path / "wider").exists()


def test_frozen_blocks_stay_as_they_were_and_the_rest_goes_on_exactly(run, tmp_path):
    """On two processes, stopped and resumed on one and on two."""
    common = [*TINY, f"--train.init_from={run}", "--train.freeze_d=2"]
    for name, stops in (("whole", [None]), ("parts", [4, 9, None])):
        for stop in stops:
            argv = [*common, f"--run.dir={tmp_path / name}", *([f"--run.stop_at={stop}"] if stop else [])]
            assert launch(argv, world=2) == [0, 0]
    assert tensors(tmp_path / "parts", 11) == tensors(tmp_path / "whole", 11)
    theirs = load_file(run / "checkpoints" / "step_00000011" / "discriminator.safetensors")
    ours = tmp_path / "whole" / "checkpoints" / "step_00000011"
    kept = load_file(ours / "discriminator.safetensors")
    slots = {name.rsplit("/", 1)[0] for name in load_file(ours / "discriminator_optimizer.safetensors")}
    frozen = {"main.0.weight", "main.2.weight", "main.3.weight", "main.3.bias"}  # two convolutions and a batch norm
    weights = {name for name in theirs if name.endswith(("weight", "bias"))}
    assert {name for name in weights if torch.equal(kept[name], theirs[name])} == frozen
    assert slots == weights - frozen


def test_data_shows_what_the_networks_will_be_fed(tmp_path, capfd):
    pictures, out = tmp_path / "pictures", tmp_path / "seen.png"
    for name in ("cats", "dogs"):
        (pictures / name).mkdir(parents=True)
        Image.new("RGB", (50, 40), "blue").save(pictures / name / "one.png")
    argv = ["data", str(pictures), "--image-size", "64", "--cache", str(tmp_path / "cache"), "--out", str(out)]
    assert cli.main(argv) == 0
    text = capfd.readouterr().out
    for words in ("images       2", "2: 0 cats, 1 dogs", "2 of 50x40 RGB", "64x64x3", "not prepared yet", str(out)):
        assert words in text
    assert cli.main([*argv, "--prepare"]) == 0
    assert "(prepared)" in capfd.readouterr().out
    assert len(list(Path(tmp_path / "cache" / "stores").glob("*/store.json"))) == 1
    with Image.open(out) as grid:
        assert grid.getpixel((30, 30)) == (0, 0, 255)
    assert cli.main(["data", str(tmp_path / "nowhere")]) == 2
    assert "neither a source" in capfd.readouterr().err

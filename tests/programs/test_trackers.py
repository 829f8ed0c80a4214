"""What trackers recorded of real runs, read back from their own files: wandb offline, TensorBoard, trackio, MLflow."""

import functools
import json
import os
import sqlite3
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file
from support.commands import complaint, wandb_records
from support.programs import launch
from support.runs import TINY

from distgan.evaluation.extractors import Classifier
from distgan.run import tracking

LABELLED = [*TINY, "--model.conditional=true", "--run.seed=3", "--track.group=digits", "--track.tags=try, small"]


def measured(folder: Path) -> list[str]:
    """Evaluations by a classifier that was not trained, which is all that a tracker needs."""
    weights = folder / "classifier.safetensors"
    save_file(Classifier(size=(32, 32), channels=1, classes=10).state_dict(), weights)
    settings = ["--eval.every=9", "--eval.num=300", "--eval.metrics=fd_classifier,is_classifier,kd_classifier,prdc"]
    return [*settings, "--eval.extractor=classifier", f"--eval.extractor_weights={weights}"]


def die_at(step: int) -> None:
    """Ends the process, as kill -9 does, when this step is recorded and the checkpoint before it written."""
    log = tracking.Tracker.log

    def then_die(self, now: int, *described) -> None:
        log(self, now, *described)
        if now == step:
            while not (self._folder.checkpoints / "step_00000006").exists():
                time.sleep(0.01)
            time.sleep(1)  # trackio writes twice a second
            os._exit(9)

    tracking.Tracker.log = then_die


def with_variables(**variables: str) -> None:
    os.environ |= variables


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that died after step 9, went on from step 6 on two ranks, and its log."""
    folder = tmp_path_factory.mktemp("trackers")
    run, log = folder / "run", folder / "log"
    argv = [*LABELLED, *measured(folder), f"--run.dir={run}", "--track.to=wandb,tensorboard"]
    argv += ["--track.artifacts=generator,checkpoint"]
    array = functools.partial(with_variables, SLURM_ARRAY_JOB_ID="77", SLURM_JOB_ID="79", FORCE_COLOR="1")
    assert launch(argv, setups=[array, functools.partial(die_at, 9)], log=folder / "died") == [9]
    assert launch(argv, setups=[array], log=log, world=2) == [0, 0]
    return run, log


@pytest.fixture(scope="module")
def in_wandb(run):
    """What wandb recorded after the resume."""
    first, second = sorted((run[0] / "wandb").glob("offline-run-*"), key=lambda folder: folder.stat().st_mtime)
    assert first.name.rsplit("-", 1)[1] == second.name.rsplit("-", 1)[1]  # one run; rank one recorded nothing
    return wandb_records(second)


def of_kind(records: list[dict], kind: str) -> list[dict]:
    return [record[kind] for record in records if record["type"] == kind]


def test_tensorboard_has_the_lines_of_the_metrics_each_step_once_and_the_grids(run):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = run[0] / "tensorboard"
    assert [path.is_file() for path in folder.iterdir()] == [True, True]  # one run, of two invocations of rank zero
    read = accumulator.EventAccumulator(str(folder), size_guidance=dict.fromkeys(("images", "scalars", "tensors"), 0))
    read.Reload()
    for name in lines(run[0])[-1]:
        expected = [(line["step"], line[name]) for line in lines(run[0]) if name in line]
        if name == "eval/protocol":
            # This reader, other than TensorBoard itself, keeps texts that were recorded before the crash.
            texts = {one.step: one.tensor_proto.string_val[0] for one in read.Tensors(f"{name}/text_summary")}
            assert [(step, json.loads(text)) for step, text in texts.items()] == expected
        else:
            found = [(one.step, one.value) for one in read.Scalars(name)]
            assert found == [(step, float(np.float32(value))) for step, value in expected], name
    grids = read.Images("samples")
    assert [one.step for one in grids] == [4, 8, 11]
    (run[0].parent / "read.png").write_bytes(grids[1].encoded_image_string)
    with Image.open(run[0].parent / "read.png") as read_back, Image.open(run[0] / "samples/step_00000008.png") as grid:
        assert np.array_equal(np.asarray(read_back), np.asarray(grid))
    recipe = read.Tensors("recipe/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "    latent_dim: 8\n" in recipe


def test_wandb_takes_images_seen_as_the_axis_and_knows_which_numbers_are_best_when_small(in_wandb):
    described = {one.get("name") or one["glob_name"]: one for one in of_kind(in_wandb, "metric")}
    assert described["*"]["step_metric"] == "images_seen"
    summaries = {name: one["summary"] for name, one in described.items() if "summary" in one}
    best = {"min": ["fd_classifier", "kd_classifier"]}
    best["max"] = ["is_classifier", "precision", "recall", "density", "coverage", "drawn"]
    assert summaries == {f"eval/{name}": {way: True, "last": True} for way, names in best.items() for name in names}
    assert all(described[name]["step_metric"] == "images_seen" for name in summaries)
    hidden = {name for name, one in described.items() if one["options"].get("hidden")}
    assert hidden == {"step", "images_seen", "eval/protocol.*", "lr/*", "ramp/*"}
    rows = [one["item"] for one in of_kind(in_wandb, "history")]
    assert rows
    assert all(row["images_seen"] == 12 * row["_step"] for row in rows)  # on rows of grids alone, too
    summary = of_kind(in_wandb, "summary")[-1]["update"]
    values = [row["eval/fd_classifier"] for row in rows if "eval/fd_classifier" in row]
    assert summary["eval/fd_classifier"] == {"min": min(values), "last": values[-1]}


def test_wandb_has_grids_with_captions_tags_a_group_and_system_metrics(in_wandb):
    captions = [
        one["item"]["samples.captions"] for one in of_kind(in_wandb, "history") if "samples.captions" in one["item"]
    ]
    assert captions[0] == ["step 8, 96 images seen; rows from the top: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9"]
    described = of_kind(in_wandb, "run")[0]
    assert described["run_group"] == "digits"
    assert described["tags"] == ["try", "small", "seed-3", "slurm-77"]
    assert any("memory_percent" in one["item"] for one in of_kind(in_wandb, "stats"))


def test_wandb_keeps_the_generators_and_the_checkpoint_where_asked(run, in_wandb):
    kept = {one["name"].rsplit("-", 1)[0]: one for one in of_kind(in_wandb, "artifact") if one["type"] == "model"}
    folders = {"generator": run[0] / "generator", "generator-best": run[0] / "generator-best"}
    folders["checkpoint"] = run[0] / "checkpoints" / "step_00000011"
    assert kept.keys() == folders.keys()
    for name, folder in folders.items():
        assert "step-11" in kept[name]["aliases"]
        files = {entry["path"]: Path(entry["local_path"]) for entry in kept[name]["manifest"]["contents"]}
        assert files.keys() == {file.name for file in folder.iterdir()}
        for file, copy in files.items():
            assert copy.read_bytes() == (folder / file).read_bytes()
            assert (run[0] / "wandb").resolve() in copy.parents  # not in somebody's home


def test_a_file_gets_short_plain_lines_that_begin_with_what_matters(run):
    said = run[1].read_text()
    assert all(character.isprintable() or character == "\n" for character in said)
    logged = [line for line in said.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in logged] == ["9/11", "11/11"]
    for line in logged:
        assert len(line) <= 120
        parts = line.split("  ")
        assert [part.split()[0] for part in parts[1:4]] == ["fd_classifier", "loss", "score"]
        assert any(part.endswith(" left") for part in parts)


def test_a_tracker_that_fails_is_a_warning(tmp_path):
    """Its folder is a file; and one that fails later does so at each log point."""
    run, log = tmp_path / "run", tmp_path / "log"
    run.mkdir()
    (run / "tensorboard").write_text("in the way")
    assert launch([*TINY, f"--run.dir={run}", "--track.to=tensorboard"], log=log) == [0]
    assert "distgan: warning: tensorboard: this invocation is not recorded there: " in log.read_text()
    assert len(lines(run)) == 4
    (run / "tensorboard").unlink()
    argv = [*TINY, f"--run.dir={run}", "--track.to=tensorboard", "--run.extend=3"]
    assert launch(argv, log=log, setups=[log_nothing]) == [0]
    assert log.read_text().count("distgan: warning: tensorboard: out of order\n") == 2
    assert len(lines(run)) == 6


def log_nothing() -> None:
    def fail(*_) -> None:
        raise RuntimeError("out\nof order")

    tracking._RECORDERS["tensorboard"].log = fail


def test_a_tracker_that_is_not_installed_is_named_before_anything_starts(tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "trackio", None)
    said = complaint(capfd, "train", *TINY, f"--run.dir={tmp_path / 'run'}", "--track.to=[wandb,trackio]")
    assert "track.to has trackio, which is not installed: run pip install 'distgan[trackio]', or leave it out." in said
    assert not (tmp_path / "run").exists()


def stopped_and_resumed(folder: Path, tracker: str, **variables: str) -> tuple[Path, str]:
    """A run that died after step 9 and went on from step 6; and all that it said."""
    run, log = folder / "run", folder / "log"
    argv = [*LABELLED, *measured(folder), f"--run.dir={run}", f"--track.to={tracker}"]
    argv += ["--track.artifacts=generator"] if tracker == "mlflow" else []
    within = functools.partial(with_variables, **variables)
    assert launch(argv, setups=[within, functools.partial(die_at, 9)], log=log) == [9], log.read_text()
    assert launch(argv, setups=[within], log=log) == [0], log.read_text()
    return run, log.read_text()


def test_trackio_has_each_step_once_the_grids_the_recipe_and_the_group(tmp_path):
    pytest.importorskip("trackio", reason="trackio is not installed: pip install 'distgan[trackio]'")
    run, said = stopped_and_resumed(tmp_path, "trackio", TRACKIO_DIR=str(tmp_path / "trackio"))
    assert all(character.isprintable() or character == "\n" for character in said)
    read = sqlite3.connect(tmp_path / "trackio" / "distgan.db")
    rows = [(step, json.loads(text)) for step, text in read.execute("select step, metrics from metrics order by id")]
    assert len({name for (name,) in read.execute("select run_name from metrics")}) == 1
    numbers = {step: values for step, values in rows if "samples" not in values}
    assert len(numbers) == sum("samples" not in values for _, values in rows)
    for line in lines(run):
        recorded = numbers[line.pop("step")]
        if line["images_seen"] != 9 * 12:  # its speed is that of the first time
            assert recorded == line
    pictures = {step: values["samples"] for step, values in rows if "samples" in values}
    assert list(pictures) == [4, 8, 11]
    assert pictures[8]["caption"].endswith("rows from the top: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9")
    assert (tmp_path / "trackio" / "media" / pictures[8]["file_path"]).exists()
    (config,) = {text for (text,) in read.execute("select config from configs")}
    recorded = json.loads(config)
    assert (recorded["model.latent_dim"], recorded["_Group"]) == (8, "digits")


def test_mlflow_has_each_step_once_the_grids_the_recipe_the_tags_and_the_generator(tmp_path):
    pytest.importorskip("mlflow", reason="mlflow is not installed: pip install 'distgan[mlflow]'")
    run, _ = stopped_and_resumed(tmp_path, "mlflow")
    read = sqlite3.connect(run / "mlflow" / "mlflow.db")
    (described,) = read.execute("select run_uuid, status, artifact_uri from runs")
    assert described[1] == "FINISHED"
    for name in ("step", "images_seen", "eval/fd_classifier", "loss/generator"):
        found = read.execute("select step, value from metrics where key = ? order by step", [name]).fetchall()
        assert found == [(line["step"], line[name]) for line in lines(run) if name in line]
    tags = dict(read.execute("select key, value from tags"))
    assert (tags["group"], tags["tags"]) == ("digits", "try,small,seed-3")
    assert json.loads(tags["eval/protocol"]) == lines(run)[-1]["eval/protocol"]
    assert dict(read.execute("select key, value from params"))["model.latent_dim"] == "8"
    artifacts = run / "mlflow" / "artifacts" / described[0] / "artifacts"
    assert (artifacts / "generator" / "model.safetensors").read_bytes() == (
        run / "generator" / "model.safetensors"
    ).read_bytes()
    pictures = sorted(int(file.name.split("step+")[1].split("+")[0]) for file in (artifacts / "images").glob("*.png"))
    assert pictures == [4, 8, 11]


def test_an_mlflow_server_that_does_not_answer_is_a_warning(tmp_path):
    pytest.importorskip("mlflow", reason="mlflow is not installed: pip install 'distgan[mlflow]'")
    log = tmp_path / "log"
    within = functools.partial(with_variables, MLFLOW_TRACKING_URI="http://127.0.0.1:9")
    assert launch([*TINY, f"--run.dir={tmp_path / 'run'}", "--track.to=mlflow"], setups=[within], log=log) == [0]
    assert "distgan: warning: mlflow: this invocation is not recorded there: " in log.read_text()

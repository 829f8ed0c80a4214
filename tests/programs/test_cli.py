"""What bad input gets: one sentence, exit code 2, no traceback, nothing written over."""

import fcntl
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from support.commands import BIN, complaint
from support.programs import launch, other_images
from support.runs import REPOSITORY, TINY, metrics, steps

from distgan import cli, recipe
from distgan.storage import exported

RANK_0 = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


# What is wrong without the images is said before they are looked for.
NO_DATA = ["--data.source=cifar10", "--data.path=/no/such/place"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["--optim.lrr=1"], ["optim.lrr", "optim.lr"]),
        (["--steps=10"], ["steps", "train.steps"]),
        (["--lr=1e-4"], ["lr", 'did you mean "optim.lr"?']),
        (["--optim.lr=fast"], ["optim.lr", "fast", "a number"]),
        (["--train.steps=1.5"], ["train.steps", "1.5", "a whole number"]),
        (["--data.image_size=50"], ["data.image_size is 50", "multiples of 4 up to 256", "32, 48 or [64,128]"]),
        (["--data.image_size=[4,28]"], ["data.image_size is [4, 28]", "the longer one at least 32"]),
        (["--data.image_size=[64]"], ["data.image_size is [64]", "two whole numbers in brackets, such as [64,128]"]),
        (
            ["--data.image_size=[4,64]", *NO_DATA],
            ["data.image_size is [4, 64]", "dcgan", "multiples of 4 and at least 16", "[16,64]"],
        ),
        (
            ["--data.image_size=[8,64]", "--model.architecture=resnet", *NO_DATA],
            ["data.image_size is [8, 64]", "resnet", "multiples of 4 and at least 16", "[16,64]"],
        ),
        (["--data.fit=squeeze"], ["data.fit is squeeze", "crop, pad, stretch"]),
        (["--data.source=cifar100"], ["data.source", "cifar100", "digits, cifar10, fashion_mnist, hub, folder"]),
        (["--model.architecture=dcgam", *NO_DATA], ["model.architecture", "dcgam", "dcgan"]),
        (["--loss.name=hing"], ["loss.name", "hing", 'did you mean "hinge"?']),
        (["--loss.name=wasserstein"], ["wasserstein", "penalty.name=wgan_gp", "optim.clip_weights", "spectral"]),
        (
            ["--optim.clip_weights=0.01"],
            ["optim.clip_weights is 0.01", "loss.name is non_saturating", "set optim.clip_weights to null"],
        ),
        (
            ["--loss.name=wasserstein", "--optim.clip_weights=0.01", "--penalty.name=wgan_gp"],
            ["optim.clip_weights is 0.01", "wgan_gp", "set one of them to null"],
        ),
        (
            ["--loss.name=wasserstein", "--optim.clip_weights=0.01", "--model.d_norm=spectral"],
            ["optim.clip_weights is 0.01", "spectral", "set one of them to null"],
        ),
        (
            ["--penalty.name=r1", *NO_DATA],
            ["penalty.name is r1", "model.d_norm is batch, which is dcgan's own", "batch norm in the discriminator"],
        ),
        (["--penalty.name=r1", "--model.d_norm=batch"], ["batch norm in the discriminator", "model.d_norm"]),
        (["--penalty.name=r3", "--model.d_norm=none"], ["penalty.name", "r3", "known are wgan_gp, r1, r2."]),
        (["--penalty.name=r1,r1"], ["penalty.name", "twice"]),
        (["--penalty.weight=3"], ["penalty.weight is 3", "set penalty.name, or penalty.weight to null"]),
        (["--penalty.lambda=3"], ["penalty.lambda", "known are penalty.name, penalty.weight, penalty.every."]),
        (["--model.name=resnet"], ["model.name", "known are model.architecture, model.width"]),
        (["--train.lr=3"], ["train.lr", 'did you mean "optim.lr"?']),
        (["--spectral=true"], ["spectral", "the groups are run, data, model, loss", "--help"]),
        (["--loss=hinge"], ["loss is a group of keys", 'did you mean "loss.name=hinge"?']),
        (["--model.d_norm=sn"], ["model.d_norm is sn", "must be one of batch, spectral, none or null."]),
        (["--data.channels=2"], ["data.channels is 2", "must be one of 1, 3, 4 or null."]),
        (["--optim.betas=0.5,0.9"], ["optim.betas is 0.5,0.9", "numbers in brackets, such as [0.5,0.999]"]),
        (["--optim.betas", "0.5", "0.9"], ["optim.betas is 0.5", "numbers in brackets"]),
        (["--penalty.every=4"], ["penalty.every is 4", "set penalty.name"]),
        (["--penalty.name=r1", "--penalty.weight=-1"], ["penalty.weight", "-1", "above 0"]),
        (["--optim.clip_weights=0"], ["optim.clip_weights", "0", "above 0"]),
        (["--augment.policy=color,cut"], ["augment.policy", '"cut"', "cutout"]),
        (["--augment.policy=[color,cut]"], ["augment.policy", '"cut"', "color,translation", "null means none"]),
        (["--train.d_step=3"], ["train.d_step", 'did you mean "train.d_steps"?']),
        (["--augment.policy=color,color"], ["augment.policy", "twice"]),
        (
            ["--model.architecture=resnet", "--model.d_norm=batch", *NO_DATA],
            ["model.d_norm is batch", "none or spectral"],
        ),
        (["--optim.schedule=linear", "--run.extend=5"], ["run.extend is 5", "optim.schedule linear", "init_from"]),
        (["--optim.schedule=step"], ["optim.schedule", "step", "constant, linear, cosine"]),
        (["--model.d_width=0"], ["model.d_width", "0", "at least 1"]),
        (["--train.steps=0"], ["train.steps", "0", "at least 1"]),
        (["--model.width=-4"], ["model.width", "-4", "at least 1"]),
        (["--model.latent_dim=0"], ["model.latent_dim", "0", "at least 1"]),
        (["--optim.lr=0"], ["optim.lr", "0", "above 0"]),
        (["--optim.lr=.inf"], ["optim.lr", "inf", "above 0"]),
        (["--optim.betas=[0.5]"], ["optim.betas", "2 elements"]),
        (["--optim.betas=[0.5,1]"], ["optim.betas", "below 1"]),
        (["--train.precision=fp16"], ["train.precision", "fp16", "GPU"]),
        (["--data.path=/tmp"], ["data.path", "digits"]),
        (["--data.source=hub"], ["data.id", "owner/name"]),
        (["--data.source=folder"], ["data.path", "pictures"]),
        (["--train.batch_size=2000"], ["1797 images", "2000"]),
        (["--eval.every=0"], ["eval.every", "0", "at least 1"]),
        (["--eval.metrics=fid, kidd"], ["eval.metrics", "kidd", "fid, is, kid, prdc"]),
        (["--eval.metrics=prdc", "--eval.every=5"], ["eval.metrics", "prdc", "first"]),
        (["--eval.extractor=vgg"], ["eval.extractor", "vgg", "inception, classifier"]),
        (
            ["--eval.every=5", "--eval.extractor=classifier", "--eval.num=100"],
            ["number of samples is 100", "129", "eval.every=null"],
        ),
        (["--ramp.lr=1e-4"], ["ramp.lr is set, but ramp.images is not"]),
        (["--ramp.images=100"], ["ramp.images is 100, but nothing is ramped", "ramp.lr, ramp.beta2"]),
        (["--ramp.images=9", "--ramp.lr=0"], ["ramp.lr is 0", "above 0"]),
        (["--ramp.images=9", "--ramp.beta2=1"], ["ramp.beta2 is 1", "below 1"]),
        (["--ramp.images=9", "--ramp.lr=1e-4", "--optim.schedule=cosine"], ["ramp.lr", "optim.schedule is cosine"]),
        (["--ramp.images=9", "--ramp.half_life=5"], ["ramp.half_life is 5", "ema.ramp is 0.05", "ema.ramp to null"]),
        (["--ramp.images=9", "--ramp.penalty_weight=5"], ["ramp.penalty_weight is 5", "set penalty.name and"]),
        (["--ramp.images=9", "--ramp.probability=0.5"], ["ramp.probability is 0.5", "augment.policy to ada"]),
        (["--ema.start=10000"], ["ema.start is 10000", "train.steps is 10000"]),
        (["--augment.policy=ada", "--augment.probability=0"], ["augment.probability is 0", "ramp.probability"]),
        (["--ema.start=5", "--ema.half_life=0"], ["ema.start is 5", "nothing is averaged"]),
        (["--augment.policy=ada,color"], ["augment.policy is ada,color", "ada is a whole pipeline"]),
        (["--augment.policy=color", "--augment.probability=0.5"], ["augment.probability is 0.5", "ada and ada_r3gan"]),
        (["--augment.policy=ada", "--augment.probability=2"], ["augment.probability is 2", "from 0 to 1"]),
        (["--augment.target=0.3"], ["augment.target is 0.3", "no probability is adapted", "augment.target to 0.6"]),
        (
            ["--augment.policy=ada", "--loss.name=relativistic", *NO_DATA],
            ["augment.policy is ada", "with loss.name relativistic the sign says nothing", "augment.probability"],
        ),
        (["--augment.policy=ada", "--loss.name=least_squares", *NO_DATA], ["least_squares the sign says nothing"]),
        (
            ["--loss.name=relativistic", "--penalty.name=r1,r2", "--penalty.every=8", "--model.d_norm=none"],
            ["penalty.every is 8", "loss.name is relativistic", "25 Gaussians", "penalty.every to 1"],
        ),
        (
            ["--model.architecture=biggan", "--loss.name=wasserstein", "--optim.clip_weights=0.01", *NO_DATA],
            ["optim.clip_weights is 0.01", "spectral, which is biggan's own"],
        ),
        (["--model.architecture=biggan", "--model.latent_dim=30"], ["model.latent_dim is 30", "4 equal parts"]),
        (["--model.architecture=biggan", "--data.image_size=[16,48]"], ["[16, 48]", "biggan needs", "[32,48]"]),
        (["--model.architecture=r3gan", "--model.width=12"], ["model.width is 12", "a multiple of 8"]),
        (
            ["--model.architecture=r3gan", "--model.width=8", "--eval.standing=4"],
            ["eval.standing is 4", "no batch norm"],
        ),
        (["--eval.truncation=0"], ["eval.truncation", "0", "above 0"]),
        (["--train.freeze_d=2"], ["train.freeze_d is 2", "random weights", "train.init_from"]),
        (["--guard.on_trouble=panic"], ["guard.on_trouble", "panic", "warn, stop, rollback"]),
        (["--guard.patience=0"], ["guard.patience", "0", "at least 1"]),
        (["--train.init_from=/no/such/run"], ["train.init_from", "/no/such/run", "no whole checkpoint"]),
        (["--train.compile=graph"], ["train.compile", "need a GPU", "off"]),
        (["--train.init_from=README.md"], ["train.init_from", "README.md", "Pickles"]),
        (["--data.source=cifar10", "--data.path=/no/such/place"], ["data.path", "/no/such/place", "no such folder"]),
        (["--config=/no/such/recipe.yaml"], ["/no/such/recipe.yaml", "does not exist"]),
        (["--config=README.md"], ["YAML"]),
        (["--config=docs/quickstart.png"], ["docs/quickstart.png", "not a text file"]),
        (["--config=configs"], ["--config is configs", "neither a file nor one of distgan's recipes", "quickstart"]),
        (["--config=quickstrat"], ["--config is quickstrat", 'did you mean "quickstart"?']),
        (["--config=elsewhere/quickstart.yaml"], ["elsewhere/quickstart.yaml", "--config quickstart"]),
        (["quickstart"], ["quickstart", "--group.key=value"]),
    ],
    ids=lambda value: value[0] if value and value[0].startswith("--") else None,
)
def test_a_wrong_setting_is_named_with_what_is_allowed(tmp_path, capfd, monkeypatch, overrides, words):
    monkeypatch.chdir(REPOSITORY)
    run = tmp_path / "run"
    for verb in (["train"], ["train", "--check"]):
        said = complaint(capfd, *verb, f"--run.dir={run}", *overrides)
        assert all(word in said for word in words), said
    assert not run.exists()


@pytest.mark.parametrize(
    ("environment", "overrides", "words"),
    [
        (RANK_0 | {"WORLD_SIZE": "3"}, ["--train.batch_size=64"], ["64", "3", "63 or 66"]),
        ({"WORLD_SIZE": "2"}, [], ["WORLD_SIZE is 2", "accelerate launch"]),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, [], ["MASTER_ADDR and MASTER_PORT", "not set"]),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, [], ["bf16", "fp32"]),
        ({"ACCELERATE_USE_FSDP": "true"}, [], ["FSDP"]),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, [], ["DeepSpeed"]),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, [], ["accumulation"]),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, [], ["dynamo"]),
    ],
    ids=["batch", "world", "address", "precision", "fsdp", "deepspeed", "accumulation", "dynamo"],
)
def test_what_the_launcher_asks_for_is_adopted_or_refused(tmp_path, capfd, monkeypatch, environment, overrides, words):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    said = complaint(capfd, "train", f"--run.dir={tmp_path / 'run'}", *overrides)
    assert all(word in said for word in words), said
    assert not (tmp_path / "run").exists()


def test_without_network_and_cache_there_is_one_sentence(tmp_path):
    """The hub is a port where nobody listens; its library tries for 20 s and more."""
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hub")}
    command = [BIN / "distgan", "train", f"--run.dir={tmp_path / 'run'}", "--data.source=cifar10"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 2
    assert result.stderr.startswith("distgan: error: uoft-cs/cifar10 is not in the cache")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_file_system_without_locks_is_named(tmp_path, capfd, monkeypatch):
    def no_locks(*args):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    said = complaint(capfd, "train", *TINY, f"--run.dir={tmp_path / 'run'}")
    assert "without file locks" in said


def test_a_run_belongs_to_its_recipe_and_to_one_writer(tmp_path, capfd):
    run = tmp_path / "run"
    argv = [*TINY, f"--run.dir={run}", "--train.steps=4"]
    assert launch(argv) == [0]
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    capfd.readouterr()
    said = complaint(capfd, "train", *argv, "--optim.lr=1e-3", "--model.width=5", "--checkpoint.every=7")
    for words in (
        "optim.lr: 0.0002 in the run, 0.001 now",
        "model.width: 4 in the run, 5 now",
        "run.extend",
        "run.dir",
    ):
        assert words in said
    assert "checkpoint.every" not in said
    claim = checkpoint_owner(run)
    said = complaint(capfd, "train", *argv)
    assert "being written by another run" in said
    assert f"process {os.getpid()}" in said
    claim.release()
    after = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    assert {**after, run / ".lock": b""} == {**before, run / ".lock": b""}


def checkpoint_owner(run):
    from distgan.run.folder import RunFolder

    return RunFolder(run).claim(recipe.load(run / "config.yaml"))


def test_a_damaged_checkpoint_is_moved_aside_and_the_one_before_used(tmp_path, capfd):
    run = tmp_path / "run"
    argv = [*TINY, f"--run.dir={run}", "--checkpoint.every=2"]
    assert launch([*argv, "--run.stop_at=6"]) == [0]
    newest = run / "checkpoints" / "step_00000006"
    file = newest / "generator.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    log = tmp_path / "log"
    assert launch(argv, log=log, world=2) == [0, 0]
    said = log.read_text()
    assert said.count("is damaged") == 1
    assert "generator.safetensors has" in said
    assert "step_00000006.damaged" in said
    assert "resuming at step 4 " in said
    assert newest.with_suffix(".damaged").is_dir()
    assert steps(run) == [8, 10, 11]
    assert [record["step"] for record in metrics(run)] == [3, 6, 9, 11]


def test_other_images_and_other_formats_are_not_resumed(tmp_path, capfd):
    run = tmp_path / "run"
    argv = [*TINY, f"--run.dir={run}"]
    assert launch([*argv, "--run.stop_at=4"]) == [0]
    folder = run / "checkpoints" / "step_00000004"
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))
    log = tmp_path / "log"
    assert launch(argv, log=log) == [2]
    assert "has format 99" in log.read_text()
    assert folder.exists()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert launch(argv, log=log, setups=[other_images]) == [2]
    assert "trained on other images" in log.read_text()


def test_a_diverged_run_stops_on_all_ranks_and_is_never_saved(tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    argv = [*TINY, f"--run.dir={run}", "--optim.lr=1e37", "--checkpoint.every=8"]
    assert launch(argv, world=2, log=log) == [3, 3]
    assert "has become NaN or inf" in log.read_text()
    assert "Traceback" not in log.read_text()
    assert not list((run / "checkpoints").glob("step_*"))


@pytest.mark.parametrize("name", ["model.pt", "pytorch_model.bin"])
def test_pickles_are_never_loaded(tmp_path, capfd, name):
    torch.save({"main.0.weight": torch.zeros(1)}, tmp_path / name)  # noqa: TID251
    for offered in (tmp_path, tmp_path / name):
        said = complaint(capfd, "sample", str(offered))
        assert "pickle" in said
        assert str(offered) in said


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["{run}", "--num", "0"], ["number of samples", "0"]),
        (["{run}", "--out", "grid.jpg"], ["grid.jpg", ".png"]),
        (["{run}", "--out", "/no/such/place/grid.png"], ["/no/such/place"]),
        (["/no/such/run"], ["/no/such/run", "does not exist"]),
        (["{empty}"], ["no exported generator"]),
    ],
)
def test_sample_says_what_is_wrong(tmp_path, capfd, argv, words):
    from distgan.models import ImageSpec, build_generator

    config = recipe.ModelConfig(width=2, latent_dim=4)
    spec = ImageSpec(image_size=32, channels=1)
    exported.save_generator(tmp_path / "run", build_generator(config, spec).state_dict(), config, spec, step=1)
    (tmp_path / "empty").mkdir()
    said = complaint(capfd, "sample", *(word.format(run=tmp_path / "run", empty=tmp_path / "empty") for word in argv))
    assert all(word in said for word in words), said


def test_help_is_quick_because_it_imports_no_torch():
    code = "import sys; from distgan.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0
    assert "train" in result.stdout
    assert "sample" in result.stdout


def test_a_verb_that_is_not_one(capfd):
    assert "trian" in complaint(capfd, "trian")


def test_check_prints_what_would_run_and_touches_nothing(tmp_path, capfd):
    run = tmp_path / "run"
    assert cli.main(["train", "--check", f"--run.dir={run}", "--model.width=8", "--data.image_size=64"]) == 0
    out = capfd.readouterr().out
    assert "width: 8" in out
    assert "1,797 of 64x64x1" in out
    assert "processes            1, 128 images each" in out
    assert re.search(r"memory on a GPU      [0-9.]+ MB per process, estimated .*; images 7.4 MB, if they fit", out)
    assert not run.exists()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["--model.width=1000000000"], "do not fit in this machine's memory with model.width 1000000000"),
        (["--penalty.name=r1", "--model.d_norm=none", f"--penalty.every=1{400 * '0'}"], "above 1,000,000"),
        (
            ["--augment.policy=ada", "--augment.probability=0", "--ramp.images=100", "--ramp.probability=0"],
            "nothing would be augmented",
        ),
        (["--data.window=255"], "data.window is 255, but must be at least 4096"),
    ],
)
def test_values_without_sense_or_bound(tmp_path, capfd, overrides, words):
    assert words in complaint(capfd, "train", "--check", f"--run.dir={tmp_path / 'run'}", *overrides)


def test_the_program_itself_says_it_and_exits_with_2(tmp_path):
    """As a user starts it, once: the console script, and under the launcher."""
    argv = ["--run.dir", str(tmp_path / "run"), "--train.batch_size=7"]
    alone = subprocess.run([BIN / "distgan", "train", *argv, "--optim.lr=0"], capture_output=True, text=True)
    assert (alone.returncode, alone.stderr) == (2, "distgan: error: optim.lr is 0.0, but must be above 0.\n")
    command = [BIN / "accelerate", "launch", "--config_file", "launch/cpu2.yaml", "-m", "distgan.train", *argv]
    launched = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert launched.returncode != 0
    assert launched.stderr.count("distgan: error: train.batch_size is 7, which 2 processes cannot share equally") == 1
    assert "exitcode  : 2" in launched.stderr  # the launcher adds its own report
    assert not (tmp_path / "run").exists()

"""A training that diverges or collapses is noticed, on all ranks alike, and acted on; a healthy one is left alone."""

import functools
import json
import math
import shutil
import subprocess

import pytest
import torch
from support.commands import BIN, wandb_history, wandb_records
from support.programs import launch, nan_at, only_one_learns
from support.runs import REPOSITORY, TINY, metrics, steps, tensors
from torch import nn

from distgan import models
from distgan.recipe import GuardConfig, ModelConfig
from distgan.run.guard import Guard
from distgan.run.watch import Watch, Watched

HEALTHY = {"loss/discriminator": 0.7, "score/real": 0.8, "score/fake_before": 0.2, "guard/spread": 0.9}
SATURATED = HEALTHY | {"loss/discriminator": 0.001, "score/real": 0.999, "score/fake_before": 0.001}
BACK = [*TINY, "--guard.on_trouble=rollback", "--checkpoint.every=4", "--train.steps=14"]

# Healthy from step 120 on; a fault begins at step 240.
WATCHED = [
    *("--guard.after=2400", "--guard.patience=3", "--optim.lr=3e-3"),
    *("--track.log_every=20", "--checkpoint.every=40", "--track.sample_every=40"),
]
D_TOO_STRONG = functools.partial(only_one_learns, "discriminator", after=240)
G_ALONE = functools.partial(only_one_learns, "generator", after=240)


def judged(guard, *numbers, every=10, start=0):
    """What the guard says at each of some log points."""
    return [
        guard.judge(start + every * (i + 1), one, images_seen=10_000, not_finite=None) for i, one in enumerate(numbers)
    ]


def test_a_sign_is_a_trouble_once_it_stays_and_is_told_once():
    guard = Guard(GuardConfig(after=0, patience=3))
    found = judged(guard, HEALTHY, SATURATED, SATURATED, HEALTHY, *[SATURATED] * 5)
    assert [len(troubles) for troubles in found] == [0, 0, 0, 0, 0, 0, 1, 0, 0]
    ((trouble,),) = [troubles for troubles in found if troubles]
    assert "discriminator tells all fakes" in trouble.what
    assert trouble.since == 40  # the last log point without it
    assert trouble.winners == ("discriminator",)
    assert guard.starts == {0, 40, 90}  # what was saved up to there must stay


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        (HEALTHY | {"guard/spread": 0.1}, "0.10 times as far apart"),
        (HEALTHY | {"guard/memory": 0.7}, "0.70 of the way"),
        (HEALTHY | {"eval/spread": 0.2}, "features of samples"),
        (HEALTHY | {"eval/drawn": 6.0, "eval/classes": 10.0}, "draws 6 of 10 classes"),
        (HEALTHY | {"eval/behind_best": 2.5}, "2.5 times as bad"),
    ],
)
def test_each_sign_is_seen_in_its_numbers(numbers, words):
    guard = Guard(GuardConfig(after=0, patience=2))
    first, second = judged(guard, numbers, numbers)
    assert first == []
    assert words in second[0].what
    patient = Guard(GuardConfig(patience=2))
    assert judged(patient, numbers, numbers) == [[], []]  # an untrained generator is always collapsed


def test_scores_that_are_no_probabilities_tell_neither_saturation_nor_who_wins():
    guard = Guard(GuardConfig(after=0, patience=2), probability=False)
    critic = SATURATED | {"loss/discriminator": -40.0, "score/real": 50.0, "guard/spread": 0.1}  # WGAN's, who does well
    _, (trouble,) = judged(guard, critic, critic)
    assert "collapses" in trouble.what
    assert trouble.winners == ("generator", "discriminator")


def test_numbers_that_are_not_finite_are_a_trouble_at_once():
    for numbers, bad in ((HEALTHY | {"loss/generator": math.nan}, None), (HEALTHY, "a weight")):
        guard = Guard(GuardConfig())
        judged(guard, HEALTHY)
        (trouble,) = guard.judge(20, numbers, images_seen=1, not_finite=bad)
        assert trouble.not_finite
        assert trouble.what == f"{bad or 'loss/generator'} has become NaN or inf"
        assert trouble.since == 20  # no checkpoint has such a weight


def test_what_was_told_is_told_again_if_something_else_is_to_be_done_about_it():
    warned = Guard(GuardConfig(after=0, patience=2))
    judged(warned, SATURATED, SATURATED)
    for on_trouble, told in (("warn", 0), ("rollback", 1)):
        resumed = Guard(GuardConfig(after=0, patience=2, on_trouble=on_trouble))
        resumed.load_state(json.loads(json.dumps(warned.state())))
        assert [len(troubles) for troubles in judged(resumed, SATURATED, start=20)] == [told]


def test_a_guard_that_is_taken_up_again_judges_as_if_it_had_never_stopped():
    whole, first, second = (Guard(GuardConfig(after=0, patience=4)) for _ in range(3))
    numbers = [HEALTHY, SATURATED, SATURATED, SATURATED, SATURATED]
    expected = judged(whole, *numbers)
    found = judged(first, *numbers[:3])
    second.load_state(json.loads(json.dumps(first.state())))
    assert found + judged(second, *numbers[3:], start=30) == expected
    assert expected[-1]


class _Unlabelled(nn.Module):
    """A discriminator out of layers that know no labels."""

    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def forward(self, x, y=None):
        return self.layers(x)


def test_what_is_watched_has_a_closed_form():
    """A generator of known spread, and a discriminator that is a mean of pixels."""
    generator, _ = models.build(ModelConfig(width=2, latent_dim=4), models.ImageSpec(image_size=32, channels=1), seed=0)
    discriminator = nn.Sequential(nn.Flatten(), nn.Linear(1024, 1))
    discriminator[1].weight.data.fill_(100 / 1024)
    discriminator[1].bias.data.zero_()
    rng = torch.Generator().manual_seed(0)
    real, unseen = (torch.randint(low, 256, (512, 1, 32, 32), dtype=torch.uint8, generator=rng) for low in (128, 64))
    found = Watch(generator, _Unlabelled(discriminator), real=Watched(real), unseen=Watched(unseen), seed=0).look()
    samples = generator.images(0, seed=0).double()
    pixels = real.double() / 127.5 - 1
    apart = [torch.pdist(images.flatten(1)).square().mean().sqrt() for images in (samples, pixels)]
    assert found["guard/spread"] == pytest.approx(float(apart[0] / apart[1]), rel=1e-6)
    train, other, fake = (100 * float(images.mean()) for images in (pixels, unseen.double() / 127.5 - 1, samples))
    assert found["guard/memory"] == pytest.approx((train - other) / (train - fake), rel=1e-5)
    assert 0 < found["guard/memory"] < 1


def test_labelled_images_are_watched_with_their_labels():
    """A discriminator whose logit is the label's number times 10, plus the mean of pixels."""
    shape = models.ImageSpec(image_size=32, channels=1, class_counts=(5, 3, 1))
    generator, _ = models.build(ModelConfig(width=2, latent_dim=4, conditional=True), shape, seed=0)

    class ByLabel(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, x, y):
            return 10.0 * y + x.flatten(1).mean(1)

    rng = torch.Generator().manual_seed(0)
    real, unseen = (torch.randint(0, 256, (150, 1, 32, 32), dtype=torch.uint8, generator=rng) for _ in range(2))
    y, other = torch.full((150,), 2), torch.arange(150) % 3
    y[100:] = 1
    found = Watch(generator, ByLabel(), real=Watched(real, y), unseen=Watched(unseen, other), seed=3).look()
    samples, labels = generator.images(0, seed=3), generator.labels(0, seed=3)
    fake = 10 * labels.double().mean() + samples.double().mean()
    train, unlike = (10 * t.double().mean() + (x.double() / 127.5 - 1).mean() for x, t in ((real, y), (unseen, other)))
    assert found["guard/memory"] == pytest.approx(float((train - unlike) / (train - fake)), rel=1e-5)


# Induced failures -----------------------------------------------------------------------------------------------------


def test_a_nan_on_one_rank_of_two_is_rolled_back_and_the_run_can_be_reproduced(tmp_path):
    run, again, log = tmp_path / "run", tmp_path / "again", tmp_path / "log"
    poison = [functools.partial(nan_at, 8, 1)]
    assert launch([*BACK, f"--run.dir={run}", "--track.to=wandb"], world=2, setups=poison, log=log) == [0, 0]
    said = log.read_text()
    assert said.count("distgan: warning: at step 8 main.0.weight in the generator has become NaN or inf") == 1
    assert "rolled back from step 8 to step 4, attempt 1" in said
    (rollback,) = map(json.loads, (run / "rollbacks.jsonl").read_text().splitlines())
    assert (rollback["attempt"], rollback["at"], rollback["back_to"]) == (1, 8, 4)
    assert rollback["lr"] == {"generator": 1e-4, "discriminator": 1e-4}
    assert [record["step"] for record in metrics(run)] == [3, 6, 9, 12, 14]
    assert [record["lr/generator"] for record in metrics(run)] == [2e-4, 1e-4, 1e-4, 1e-4, 1e-4]
    assert [json.loads(line)["step"] for line in (run / "metrics.abandoned.jsonl").read_text().splitlines()] == [6]
    recorded = sorted((run / "wandb").glob("offline-run-*"))
    assert len({folder.name.rsplit("-", 1)[1] for folder in recorded}) == 1  # one wandb run, which goes back, too
    history = [record["history"]["item"] for folder in recorded for record in wandb_history(folder)]
    recorded_steps = [(record["_step"], record["step"]) for record in history if "step" in record]  # a grid has none
    assert recorded_steps == [(3, 3), (6, 6), (10, 6), (13, 9), (16, 12), (18, 14)]  # the former never goes back
    # Stopped before the rollback, where no checkpoint would be otherwise, and after it.
    overrides = [*BACK, f"--run.dir={again}"]
    for stop in (["--run.stop_at=5"], ["--run.stop_at=10"], []):
        assert launch([*overrides, *stop], world=2, setups=poison) == [0, 0]
    assert metrics(again) == metrics(run)
    assert tensors(again, 14) == tensors(run, 14)
    # Whoever moves the checkpoints away begins anew, at the recipe's rate.
    shutil.rmtree(again / "checkpoints")
    assert launch([*overrides, "--run.stop_at=3"], world=2) == [0, 0]
    assert [record["lr/generator"] for record in metrics(again)] == [2e-4]
    assert not (again / "rollbacks.jsonl").exists()
    assert (again / "rollbacks.abandoned").exists()


def test_a_rollback_lowers_what_a_schedule_starts_from(tmp_path):
    """Also where the run is stopped after it: the decay of the steps before is not counted twice."""
    run, again = tmp_path / "run", tmp_path / "again"
    argv, poison = [*BACK, "--optim.schedule=linear", "--track.log_every=1"], [functools.partial(nan_at, 8, 0)]
    assert launch([*argv, f"--run.dir={run}"], setups=poison) == [0]
    (rollback,) = map(json.loads, (run / "rollbacks.jsonl").read_text().splitlines())
    assert (rollback["back_to"], rollback["lr"]) == (4, {"generator": 1e-4, "discriminator": 1e-4})
    rates = [(1e-4 if step >= 4 else 2e-4) * (1 - step / 14) for step in range(14)]
    assert [line["lr/generator"] for line in metrics(run)] == pytest.approx(rates)
    for stop in (["--run.stop_at=10"], []):
        assert launch([*argv, f"--run.dir={again}", *stop], setups=poison) == [0]
    assert metrics(again) == metrics(run)


def test_without_a_rollback_a_nan_ends_the_run_with_what_to_do(tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    argv = [*TINY, f"--run.dir={run}", "--checkpoint.every=4"]
    poison = [functools.partial(nan_at, 7, 1)]
    assert launch(argv, world=2, setups=poison, log=log) == [3, 3]
    assert (
        "distgan: error: at step 8 main.0.weight in the generator has become NaN or inf." in log.read_text()
    )  # before it is saved
    assert "--guard.on_trouble=rollback" in log.read_text()
    assert steps(run) == [4]
    assert launch(argv) == [0]  # and the same command goes on


def test_a_discriminator_too_strong_is_rolled_back_and_what_was_saved_is_kept(tmp_path):
    """Its later checkpoints are put aside, its rate is lowered, and the run ends well."""
    run, log = tmp_path / "run", tmp_path / "log"
    argv = [*TINY, *WATCHED, f"--run.dir={run}", "--guard.on_trouble=rollback", "--train.steps=500"]
    assert launch(argv, setups=[D_TOO_STRONG], log=log) == [0]
    (rollback,) = map(json.loads, (run / "rollbacks.jsonl").read_text().splitlines())
    assert "discriminator tells all fakes" in rollback["trouble"]
    assert rollback["lr"] == pytest.approx({"discriminator": 3e-3 / 2, "generator": 3e-12})
    assert rollback["back_to"] >= 240
    abandoned = [folder.name for folder in (run / "checkpoints").glob("*.abandoned")]
    assert abandoned
    assert all(int(name[5:13]) > rollback["back_to"] for name in abandoned)
    lines = [json.loads(line) for line in (run / "metrics.abandoned.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == rollback["at"]
    assert [record["step"] for record in metrics(run)] == list(range(20, 501, 20))
    assert list(run.glob("samples/*.attempt0.png"))


def test_a_discriminator_too_strong_stops_the_run_on_all_ranks_and_is_told_to_wandb(tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    argv = [*TINY, *WATCHED, f"--run.dir={run}", "--guard.on_trouble=stop", "--train.steps=10000", "--track.to=wandb"]
    assert launch(argv, world=2, setups=[D_TOO_STRONG], log=log) == [6, 6]
    said = log.read_text()
    assert said.count("distgan: error: at step") == 1
    (stopped,) = steps(run)[-1:]
    assert f"at step {stopped} the discriminator tells all fakes" in said
    (recorded,) = (run / "wandb").glob("offline-run-*")
    (alert,) = [record for record in wandb_records(recorded) if record.get("type") == "alert"]
    assert "discriminator tells all fakes" in json.dumps(alert)


def test_a_generator_that_collapses_to_one_image_is_noticed(tmp_path):
    """Against a discriminator that stands still it goes to the one image that this likes best."""
    run, log = tmp_path / "run", tmp_path / "log"
    # How long it takes depends on the kind of processor: 3,000 steps on some, 4,000 on others.
    argv = [*TINY, *WATCHED, f"--run.dir={run}", "--guard.on_trouble=stop", "--train.steps=10000"]
    assert launch(argv, setups=[G_ALONE], log=log) == [6]
    assert "times as far apart as real images: the generator collapses" in log.read_text()
    assert min(record["guard/spread"] for record in metrics(run) if 120 <= record["step"] <= 240) > 0.3
    assert steps(run)[-1] > 240


def test_a_run_rolls_back_only_so_often(tmp_path):
    """And then stops, saved. Each attempt walks into the hole, since the fault is not the draws'."""
    run, log = tmp_path / "run", tmp_path / "log"
    argv = [*TINY, *WATCHED, f"--run.dir={run}", "--guard.on_trouble=rollback", "--guard.rollbacks=1"]
    argv += ["--train.steps=10000", "--checkpoint.keep_last=1"]
    assert launch(argv, setups=[functools.partial(D_TOO_STRONG, attempts=9)], log=log) == [6]
    assert log.read_text().count("rolled back from step") == 1
    assert len((run / "rollbacks.jsonl").read_text().splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["quickstart", "fashion_mnist_dcgan"])
def test_healthy_recipes_raise_no_alarm(tmp_path, recipe):
    command = [BIN / "accelerate", "launch", "--config_file", "launch/cpu2.yaml", "-m", "distgan.train"]
    command += ["--config", f"configs/{recipe}.yaml", f"--run.dir={tmp_path / 'run'}", "--guard.on_trouble=stop"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr

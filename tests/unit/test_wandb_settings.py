"""What wandb would refuse is refused before anything starts; what switches it off is obeyed."""

import functools
import os

import pytest
import wandb
from support.programs import launch
from support.runs import TINY

from distgan import doctor
from distgan.recipe import TrackConfig
from distgan.run import tracking, wandb_tracker

TINY_WITH_WANDB = [*TINY, "--track.to=wandb"]


@pytest.fixture(autouse=True)
def _no_wandb_variables(monkeypatch):
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", "/dev/null")


@pytest.mark.parametrize("project", [*(f"a{character}b" for character in "/\\#?%:"), "x" * 129])
def test_a_project_that_wandb_refuses_is_refused(project):
    with pytest.raises(wandb.errors.UsageError):
        wandb.Settings(project=project)
    with pytest.raises(ValueError, match=r"track\.project is .*: wandb takes names of up to 128 characters without"):
        TrackConfig(project=project)
    TrackConfig(project=project, to="none")


@pytest.mark.parametrize("project", ["", "  "])
def test_an_empty_project_is_refused(project):
    with pytest.raises(ValueError, match="empty"):
        TrackConfig(project=project)


@pytest.mark.parametrize("project", ["x" * 128, "Müller's GAN, no. 2 (new)", "a.b_c-d"])
def test_what_wandb_takes_is_taken(project):
    assert wandb.Settings(project=project).project == TrackConfig(project=project).project


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("WANDB_RUN_ID", "a/b"),
        ("WANDB_RUN_ID", ""),
        ("WANDB_MODE", "of line"),
        ("WANDB_PROJECT", "a:b"),
        ("WANDB_INIT_TIMEOUT", "soon"),
        ("WANDB_BASE_URL", "nonsense"),
    ],
)
def test_a_variable_that_wandb_refuses_is_named(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=rf"^{name} is '{value}', which wandb refuses \(.*\): correct or unset it\.$"):
        tracking.check(TrackConfig())
    tracking.check(TrackConfig(to="none"))
    facts = doctor.facts_here(0)
    assert [finding.weight for finding in doctor.advise([facts]) if name in finding.text] == ["training fails"]


def test_a_key_that_wandb_refuses_is_not_shown(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", " secret ")
    with pytest.raises(ValueError, match=r"^WANDB_API_KEY is set to a value that wandb refuses") as refused:
        tracking.check(TrackConfig())
    assert "secret" not in str(refused.value)


def test_a_wandb_setting_that_is_wrong_is_refused_before_anything_starts(tmp_path):
    log = tmp_path / "log"
    argv = [*TINY_WITH_WANDB, f"--run.dir={tmp_path / 'run'}"]
    for more in (["--track.project=a/b"], ["--track.project=a/b", "--check"]):
        assert launch([*argv, *more], log=log) == [2]
    assert not (tmp_path / "run").exists()
    assert log.read_text().count("distgan: error: ") == 2
    assert log.read_text().count("\n") == 2


def set_variable(name: str, value: str) -> None:
    os.environ.pop("WANDB_MODE", None)
    os.environ[name] = value


@pytest.mark.parametrize(("name", "value"), [("WANDB_DISABLED", "true"), ("WANDB_MODE", "disabled")])
def test_wandb_switched_off_leaves_nothing_of_it(tmp_path, name, value):
    run, log = tmp_path / "run", tmp_path / "log"
    off = functools.partial(set_variable, name, value)
    assert launch([*TINY_WITH_WANDB, f"--run.dir={run}"], setups=[off], log=log) == [0]
    assert not (run / "wandb").exists()
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 4
    assert "wandb: switched off by WANDB_DISABLED or WANDB_MODE" in log.read_text()


@pytest.mark.parametrize(
    ("variables", "mode"),
    [
        ({"WANDB_DISABLED": "1", "WANDB_MODE": "online"}, "disabled"),
        ({"WANDB_DISABLED": "False", "WANDB_MODE": "online"}, "online"),
        ({"WANDB_DISABLED": ""}, "offline"),
        ({"WANDB_MODE": "dryrun"}, "offline"),
        ({"WANDB_MODE": "run"}, "online"),
    ],
)
def test_older_ways_to_say_it_count(monkeypatch, variables, mode):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert wandb_tracker.wandb_mode() == mode
    tracking.check(TrackConfig())

"""Where wandb records, and what a meter has summed."""

from urllib.parse import urlparse

import pytest
import torch
import wandb
import yaml

from distgan import recipe
from distgan.parallel.ranks import Ranks
from distgan.recipe import TrackConfig
from distgan.run import wandb_tracker
from distgan.run.meter import Meter


@pytest.mark.parametrize(
    ("logged_in_at", "base_url", "expected"),
    [
        (None, None, "offline"),
        (urlparse(wandb.Settings().base_url).hostname, None, "online"),
        ("api.wandb.ai", None, "online"),
        ("api.wandb.ai", "https://wandb.example.org", "offline"),
        ("wandb.example.org", "https://wandb.example.org", "online"),
    ],
)
def test_wandb_records_online_exactly_where_there_is_a_key(tmp_path, monkeypatch, logged_in_at, base_url, expected):
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "netrc").write_text(f"machine {logged_in_at} login user password {'0' * 40}\n" if logged_in_at else "")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    if base_url:
        monkeypatch.setenv("WANDB_BASE_URL", base_url)
    assert wandb_tracker.wandb_mode() == expected


class OnCpu(Ranks):
    """One rank that has not joined."""

    device = torch.device("cpu")


def test_what_a_checkpoint_keeps_of_a_meter_is_of_its_step_however_late_it_is_written():
    """It is written in the background, while the next steps are already counted."""
    meter = Meter(("loss",), OnCpu(timeout=60))
    meter.add({"loss": torch.tensor(3.0)})
    state = meter.state()
    meter.add({"loss": torch.tensor(5.0)})
    assert state == {"sums": [[3.0]], "counts": [1.0]}


@pytest.mark.parametrize(
    ("written", "trackers"),
    [
        ("wandb", ["wandb"]),
        ("none", []),
        ("[wandb, tensorboard]", ["wandb", "tensorboard"]),
        ("wandb,tensorboard", ["wandb", "tensorboard"]),
    ],
)
def test_one_tracker_or_several_are_the_same_setting_however_written(tmp_path, written, trackers):
    (tmp_path / "recipe.yaml").write_text(f"run: {{dir: x}}\ntrack: {{to: {yaml.safe_load(written)!r}}}\n")
    for argv in (["--config", str(tmp_path / "recipe.yaml")], ["--run.dir=x", f"--track.to={written}"]):
        config = recipe.parse(argv)[0]
        assert config.track.trackers == trackers
        (tmp_path / "saved.yaml").write_text(recipe.dump(config))
        assert recipe.load(tmp_path / "saved.yaml") == config
        assert yaml.safe_load(recipe.dump(config))["track"]["to"] == ",".join(trackers or ["none"])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"to": "wandbb"},
            r'^track\.to has "wandbb", but must be none or some of wandb, tensorboard, trackio, mlflow\.$',
        ),
        ({"to": ["none", "wandb"]}, r'^track\.to has "none", but must be none or some of '),
        ({"to": []}, r'^track\.to has "", but must be none or some of '),
        ({"to": "wandb,wandb"}, r"^track\.to is wandb,wandb, which has a name twice: give each once\.$"),
        ({"artifacts": "model"}, r'^track\.artifacts has "model", but must be some of generator, checkpoint\.$'),
        (
            {"to": "tensorboard", "artifacts": "generator"},
            r"^track\.artifacts is generator, but track\.to is tensorboard",
        ),
        ({"tags": ["x" * 65]}, r'^track\.tags has "x+", but a tag must have 1 to 64 characters\.$'),
    ],
)
def test_what_no_tracker_would_take_is_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        TrackConfig(**settings)

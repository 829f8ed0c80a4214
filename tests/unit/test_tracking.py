"""Where wandb records, and what a meter has summed."""

from urllib.parse import urlparse

import pytest
import torch
import wandb

from distgan.parallel.ranks import Ranks
from distgan.run import tracking
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
    assert tracking.wandb_mode() == expected


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

"""configs/sweep.yaml, run by wandb's real agent as far as it goes without a server: one run of the sweep."""

import json
import os
import subprocess
import sys
from pathlib import Path

import yaml
from support.runs import REPOSITORY, steps

from distgan import recipe

# What the agent does with a run that the server hands it.
AGENT = """
import sys, yaml
from wandb.wandb_agent import Agent
agent = Agent(api=None, queue=None)
agent._sweep_command = yaml.safe_load(open("configs/sweep.yaml"))["command"]
values = {"optim.lr": 2e-4, "run.seed": 2, "train.steps": 5, "model.width": 4}
args = {name: {"value": value} for name, value in values.items()}
agent._command_run({"run_id": "run7", "program": None, "args": args})
sys.exit(agent._run_processes["run7"].wait())
"""


def test_a_run_of_the_sweep_has_its_values_on_all_ranks_and_its_name(tmp_path):
    for name in ("configs", "launch"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    environment = inherited | {"PATH": path, "WANDB_SWEEP_ID": "sweep3", "WANDB_MODE": "offline"}
    agent = [sys.executable, "-c", AGENT]
    done = subprocess.run(agent, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "on 2 x cpu" in done.stdout  # ranks that differ in a value would have been refused
    run = tmp_path / "runs" / "sweep-sweep3" / "run7"
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert (saved["optim"]["lr"], saved["run"]["seed"]) == (2e-4, 2)
    assert steps(run) == [5]
    assert json.loads((run / "checkpoints" / "step_00000005" / "state.json").read_text())["wandb_id"] == "run7"
    assert [folder.name[-4:] for folder in (run / "wandb").glob("offline-run-*")] == ["run7"]


def test_every_parameter_of_the_sweep_is_a_key_of_the_recipe():
    sweep = yaml.safe_load((REPOSITORY / "configs" / "sweep.yaml").read_text())
    first = [f"--{name}={parameter['values'][0]}" for name, parameter in sweep["parameters"].items()]
    recipe.parse(["--run.dir=x", *first])

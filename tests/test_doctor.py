"""What the doctor sees and advises; under srun, in test_slurm.py."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY

from distgan import doctor, meeting

BIN = Path(sys.executable).parent


def run(*command: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command, cwd=REPOSITORY, env=os.environ | environment, capture_output=True, text=True, timeout=90
    )


def test_two_launched_processes_are_seen_and_their_sum_is_tried(tmp_path):
    file = tmp_path / "found.json"
    launcher = [str(BIN / "accelerate"), "launch", "--config_file", "launch/cpu2.yaml"]
    done = run(*launcher, "-m", "distgan.doctor", "--json", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(file.read_text())
    assert [(rank["rank"], rank["host"], rank["device"]) for rank in found["ranks"]] == [
        (0, socket.gethostname(), "cpu"),
        (1, socket.gethostname(), "cpu"),
    ]
    assert found["ranks"][0]["versions"]["torch"] == torch.__version__.split("+")[0]
    assert found["ranks"][0]["wandb"] == "offline"  # as WANDB_MODE says
    assert found["all_reduce"]["right"]
    assert found["all_reduce"]["seconds"] > 0
    assert done.stdout.count("distgan doctor: ") == 1
    assert "right on all ranks" in done.stdout


def test_alone_it_ends_well_and_a_launcher_that_cannot_do_gets_its_sentence():
    alone = run(str(BIN / "distgan"), "doctor")
    assert alone.returncode == 0
    assert "what to change" in alone.stdout
    broken = run(str(BIN / "distgan"), "doctor", ACCELERATE_USE_FSDP="true")
    assert broken.returncode == 2
    assert "1. training fails, here: the launcher asks for FSDP, but distgan trains with DDP" in broken.stdout
    assert "distgan: error: training would fail here: the launcher asks for FSDP" in broken.stderr


@pytest.fixture(scope="module")
def facts() -> dict:
    return doctor.facts_here(0, device="cpu") | {"nvidia_devices": 0, "gpus": 0, "cpus": 64}


def advice(*everyone: dict) -> list[tuple[str, str, list[int]]]:
    return [(finding.weight, finding.text.split(":")[0], finding.ranks) for finding in doctor.advise(list(everyone))]


def test_healthy_ranks_get_notes_alone(facts):
    assert {weight for weight, *_ in advice(facts, facts | {"rank": 1})} <= {"note"}


def test_a_rank_that_differs_is_named_and_what_fails_comes_first(facts):
    other = facts | {
        "rank": 1,
        "threads": facts["threads"] + 1,
        "versions": facts["versions"] | {"torch": "1.0"},
        "cache_writable": False,
    }
    torch_version = facts["versions"]["torch"]
    assert advice(facts, other)[:3] == [
        ("fails", f"the data cache {facts['cache']} cannot be written", [1]),
        ("fails", f"torch is 1.0, but {torch_version} on rank 0", [1]),
        ("slow", f"it uses {facts['threads'] + 1} CPU threads, rank 0 {facts['threads']}", [1]),
    ]


def test_gpus_that_are_not_used_are_named(facts):
    gpu = facts | {"device": "NVIDIA H100", "gpus": 4, "nvidia_devices": 4, "local_ranks": 1, "precisions": ["bf16"]}
    assert ("slow", "1 of 4 GPUs are used", [0]) in advice(gpu)
    assert ("slow", "there are 4 GPUs, but the launcher asks for the CPU", [0]) in advice(gpu | {"device": "cpu"})
    driverless = facts | {"nvidia_devices": 2, "gpus": 0}
    assert advice(driverless)[0][1].startswith("there are 2 GPUs, but this torch cannot use them")


@pytest.mark.parametrize(
    ("nodes", "per_node", "node", "head", "local"),
    [
        ("gpu[03-05,9]", "2(x3),1", "2", "gpu03", "2"),
        ("gpu[03-05,9]", "2(x3),1", "3", "gpu03", "1"),
        ("a-1,b-[2-3]", "4(x3)", "0", "a-1", "4"),
        ("n[1-2]-ib", "1(x2)", "1", "n1-ib", "1"),
    ],
)
def test_sruns_own_variables_are_read(monkeypatch, nodes, per_node, node, head, local):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # put back afterwards
        monkeypatch.delenv(name)
    tasks = {"SLURM_STEP_NUM_TASKS": "7", "SLURM_STEP_TASKS_PER_NODE": per_node, "SLURM_STEP_NODELIST": nodes}
    ids = {"SLURM_PROCID": "5", "SLURM_LOCALID": "0", "SLURM_NODEID": node, "SLURM_JOB_ID": "1", "SLURM_STEP_ID": "2"}
    for name, value in (tasks | ids).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [])
    meeting.adopt_srun()
    assert {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "LOCAL_WORLD_SIZE")} == {
        "RANK": "5",
        "WORLD_SIZE": "7",
        "MASTER_ADDR": head,
        "LOCAL_WORLD_SIZE": local,
    }

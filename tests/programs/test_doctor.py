"""What the doctor sees and advises; under srun, in test_slurm.py."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.runs import REPOSITORY

from distgan import data, doctor, recipe
from distgan.parallel import launch

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
    assert found["ranks"][0]["versions"]["torch"] == torch.__version__
    assert found["all_reduce"]["right"]
    assert found["all_reduce"]["seconds"] > 0
    assert done.stdout.count("distgan doctor: ") == 1
    assert "all-reduce  14.0 MB in" in done.stdout


def test_alone_it_ends_well_and_a_launcher_that_cannot_do_gets_its_sentence(tmp_path):
    alone = run(str(BIN / "distgan"), "doctor")
    assert alone.returncode == 0, alone.stderr
    assert "backend     none, with one process" in alone.stdout
    broken = run(str(BIN / "distgan"), "doctor", "--json", "/nowhere/x", ACCELERATE_USE_FSDP="true")
    assert broken.returncode == 2
    assert "1. training fails, here: the launcher asks for FSDP, but distgan trains with DDP" in broken.stdout
    assert "distgan: error: --json is /nowhere/x, which cannot be written" in broken.stderr


def test_prepared_data_sets_are_counted_and_a_folder_that_cannot_be_written_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    data.load(recipe.DataConfig(), batch_size=1)
    assert (doctor.facts_here(0)["data_sets"], doctor.facts_here(0)["cache_fault"]) == (1, None)
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/1")
    facts = doctor.facts_here(0)
    assert "No such file" in facts["cache_fault"]
    assert doctor.advise([facts])[0].text.startswith("the data cache /proc/1/distgan cannot be written (No such file")


def facts(**others: object) -> dict:
    """A healthy rank, on a CPU."""
    return {
        "rank": 0, "host": "a", "node": "0", "started_by": "hand", "versions": {"torch": "2.14"}, "others": {},
        "refused": None, "device": "cpu", "backend": "gloo", "precisions": ["fp32"],
        "speed_of_bf16": 1.0, "gpus": 0, "nvidia_devices": 0,
        "hidden": None, "asked_for_cpu": False, "local_ranks": 1, "interface": None, "nccl_interface": None,
        "infiniband": [], "locked_memory": -1, "shared_memory_free": 1 << 30, "cpus": [0, 1, 2, 3], "threads": 2,
        "wandb": "online", "wandb_refused": None, "wandb_asked": None, "cache": "/cache",
        "cache_fault": None, "cache_free": 1 << 40,
        "data_sets": 1, "folder": "/home", "folder_fault": None, "folder_free": 1 << 40,
    } | others  # fmt: skip


def advice(*everyone: dict) -> list[tuple[str, str, list[int]]]:
    return [(finding.weight, finding.text.split(":")[0], finding.ranks) for finding in doctor.advise(list(everyone))]


NO_GPU = ("note", "no GPU here", [0, 1])
GPU = {"device": "H100", "backend": "nccl", "gpus": 4, "nvidia_devices": 4, "precisions": ["fp32", "bf16", "fp16"]}


def test_healthy_ranks_need_no_change():
    assert advice(facts(), facts(rank=1)) == [NO_GPU]
    bound = [facts(rank=rank, cpus=[2 * rank, 2 * rank + 1]) for rank in range(2)]  # each to CPUs of its own
    assert advice(*bound) == [NO_GPU]


def test_a_rank_that_differs_is_named_and_what_fails_comes_first():
    other = facts(rank=1, threads=3, versions={"torch": "1.0"}, cache_fault="Read-only file system")
    assert advice(facts(), other) == [
        ("training fails", "the data cache /cache cannot be written (Read-only file system)", [1]),
        ("training fails", "torch is 1.0, but 2.14 on rank 0", [1]),
        ("warning", "it uses 3 CPU threads, rank 0 2", [1]),
        ("warning", "2 processes use 5 threads on 4 CPUs", [0, 1]),
        NO_GPU,
    ]
    assert ("training fails", "it would train on H100, rank 0 on cpu", [1]) in advice(facts(), facts(rank=1, **GPU))
    refused = facts(rank=1, refused="8 processes were started on a machine with 4 GPUs.")
    assert advice(facts(), refused)[0] == ("training fails", "8 processes were started on a machine with 4 GPUs.", [1])


def test_gpus_that_are_not_used_are_named():
    assert ("warning", "1 of 4 GPUs are used", [0]) in advice(facts(**GPU))
    assert ("note", "this GPU can do bf16", [0]) in advice(facts(**GPU))
    assert ("note", "bf16 is 1.6 times as fast as fp32 on this CPU", [0]) in advice(facts(speed_of_bf16=1.6))
    assert ("note", "fp32 is 16.0 times as fast as bf16 on this CPU", [0]) in advice(facts(speed_of_bf16=1 / 16))
    asked = facts(gpus=4, nvidia_devices=4, asked_for_cpu=True)
    assert advice(asked) == [("warning", "there are 4 GPUs, but the launcher asks for the CPU", [0])]
    assert advice(facts(nvidia_devices=2, hidden="-1,-1")) == [
        ("note", 'there are GPUs, but they are hidden by CUDA_VISIBLE_DEVICES="-1,-1".', [0])
    ]


def test_gpus_that_torch_cannot_use_are_not_silently_left(monkeypatch):
    """Else a broken driver would train a week on the CPU."""
    for name in ("ACCELERATE_USE_CPU", "CUDA_VISIBLE_DEVICES", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(launch, "nvidia_devices", lambda: 8)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match=r"has 8 GPUs, which torch .* cannot use: update the driver"):
        launch.check_gpus()
    for name, value in {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "-1", "SLURM_JOB_ID": "1"}.items():
        with monkeypatch.context() as wanted:
            wanted.setenv(name, value)
            launch.check_gpus()


@pytest.mark.parametrize(
    ("nodes", "per_node", "node", "head", "local"),
    [
        ("gpu[03-05,9]", "2(x3),1", "2", "gpu03", "2"),
        ("gpu[03-05,9]", "2(x3),1", "3", "gpu03", "1"),
        ("a-1,b-[2-3]", "4(x3)", "0", "a-1", "4"),
        ("n[1-2]-ib", "1(x2)", "1", "n1-ib", "1"),
        ("r[1-2]n[3-4],x", "1(x5)", "1", "r1n3", "1"),
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
    launch.adopt_srun()
    assert {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "LOCAL_WORLD_SIZE")} == {
        "RANK": "5",
        "WORLD_SIZE": "7",
        "MASTER_ADDR": head,
        "LOCAL_WORLD_SIZE": local,
    }

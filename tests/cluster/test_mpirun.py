"""Ranks that mpirun starts itself."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
from support.programs import launch
from support.runs import REPOSITORY, TINY, metrics, steps, tensors, wait_for

from distgan.parallel import launch as launcher

MPIRUN = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-x", "OMP_NUM_THREADS=1", "-np", "2"]

needs_mpirun = pytest.mark.skipif(shutil.which("mpirun") is None, reason="needs an mpirun")


def start(*words: str, mpirun: list[str] = MPIRUN) -> subprocess.Popen:
    """Runs `python -m distgan.WORDS` on two ranks."""
    argv = [*mpirun, sys.executable, "-m", *words]
    where = {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | where)


@needs_mpirun
def test_ranks_of_mpirun_train_as_any_others_and_a_signal_to_it_saves(tmp_path):
    run, whole = tmp_path / "run", tmp_path / "whole"
    process = start("distgan.train", *TINY, f"--run.dir={run}", "--train.steps=100000", "--checkpoint.every=50000")
    wait_for(lambda: (run / "metrics.jsonl").exists() and metrics(run))
    process.send_signal(signal.SIGUSR1)  # SIGTERM it follows by SIGKILL after a second
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0, said
    (saved,) = steps(run)
    assert json.loads((run / "preempted").read_text()) == {"step": saved}
    assert "on 2 x cpu, 6 images each" in said
    assert "step 3/100000  loss D " in said  # lines, not a bar
    until = [f"--run.stop_at={saved}", "--train.steps=100000", "--checkpoint.every=50000"]
    assert launch([*TINY, f"--run.dir={whole}", *until], world=2) == [0, 0]
    assert tensors(run, saved) == tensors(whole, saved)
    assert metrics(run) == metrics(whole)


@needs_mpirun
def test_the_doctor_finds_them_each_in_a_shell_of_its_own(tmp_path):
    report = tmp_path / "report.json"
    process = start("distgan.doctor", "--json", str(report), mpirun=[*MPIRUN, "sh", "-c", '"$0" "$@"; exit $?'])
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert "started by  mpirun" in said
    assert "all-reduce  14.0 MB" in said
    found = json.loads(report.read_text())
    assert [(facts["rank"], facts["local_ranks"], facts["node"]) for facts in found["ranks"]] == [
        (0, 2, "0"),
        (1, 2, "0"),
    ]


OPEN_MPI = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE")
HYDRA = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
CRAY = ("PMI_RANK", "PMI_SIZE", "PMI_LOCAL_RANK", "PMI_LOCAL_SIZE")
MVAPICH = ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE")
ALL = [OPEN_MPI, HYDRA, CRAY, MVAPICH]
OURS = (
    "TORCHELASTIC_RUN_ID",
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "GROUP_RANK",
)


@pytest.fixture
def environment(monkeypatch):
    """Sets variables, in a process that no launcher has started; all is undone."""
    for name in (
        *OURS,
        *(name for one in ALL for name in one),
        *(name for name in os.environ if name.startswith("SLURM")),
    ):
        monkeypatch.setenv(name, "")  # so that what the code sets is undone, too
        monkeypatch.delenv(name)
    return lambda **variables: [monkeypatch.setenv(name, value) for name, value in variables.items()]


@pytest.mark.parametrize("names", ALL)
def test_each_mpirun_has_its_own_names_for_the_same(environment, names):
    environment(**dict(zip(names, ("5", "8", "1", "4"), strict=True)), MASTER_ADDR="first", MASTER_PORT="29500")
    assert launcher.launched_ranks() == (5, 8)
    assert {name: os.environ.get(name) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")} == {
        "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "first"
    }  # fmt: skip
    assert launcher.started_by() == "mpirun"
    assert launcher.under_mpirun()


@pytest.mark.parametrize("names", ALL)
def test_on_several_machines_they_must_be_told_where_to_meet(environment, names):
    environment(**dict(zip(names, ("5", "8", "1", "4"), strict=True)))
    with pytest.raises(
        ValueError, match=r"started 8 processes on several machines.*-x MASTER_ADDR=HOST -x MASTER_PORT=29500"
    ):
        launcher.launched_ranks()
    assert "WORLD_SIZE" not in os.environ  # the next run of this process is not refused for it


@pytest.mark.parametrize("names", ALL)
def test_an_mpirun_that_does_not_say_who_shares_a_machine_is_refused(environment, names):
    environment(**{names[0]: "0", names[1]: "2"})
    with pytest.raises(
        ValueError, match=rf"mpirun started 2 processes \({names[1]}\), but does not say which of them share a machine"
    ):
        launcher.launched_ranks()
    assert "WORLD_SIZE" not in os.environ


@pytest.mark.parametrize("names", ALL)
def test_ranks_of_mpirun_that_are_told_they_are_alone_are_refused(environment, names):
    environment(**dict(zip(names, ("1", "2", "1", "2"), strict=True)), WORLD_SIZE="1")
    with pytest.raises(ValueError, match="WORLD_SIZE is 1, but mpirun started 2 processes: unset WORLD_SIZE"):
        launcher.launched_ranks()
    environment(TORCHELASTIC_RUN_ID="none", RANK="0")  # a launcher in each: its word counts
    assert launcher.launched_ranks() == (0, 1)


@pytest.mark.parametrize("value", ["", "x"])
def test_what_is_no_number_is_nobodys(environment, value):
    environment(PMI_RANK=value, PMI_SIZE=value)
    assert launcher.launched_ranks() == (0, 1)


def test_one_process_of_mpirun_is_one_process(environment):
    environment(**dict(zip(OPEN_MPI, ("0", "1", "0", "1"), strict=True)))
    assert launcher.launched_ranks() == (0, 1)
    assert launcher.under_mpirun()  # whose terminal is only its way to a log


def test_within_a_job_of_slurm_it_is_mpirun_that_counts(environment):
    """It starts its daemons with srun, whose variables its ranks inherit."""
    environment(**dict(zip(OPEN_MPI, ("1", "2", "1", "2"), strict=True)), SLURM_STEP_NUM_TASKS="3", SLURM_PROCID="0")
    assert launcher.launched_ranks() == (1, 2)

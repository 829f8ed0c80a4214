"""The shipped scripts on a real Slurm of two nodes: what befalls a job there changes no bit of its run."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from support import runs
from support.commands import wandb_records
from support.programs import launch
from support.runs import QUICK, REPOSITORY, TINY, metrics, steps, tensors

from distgan.storage import bundle

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(
        not all(
            shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") for name in ("slurmctld", "slurmd", "munged")
        ),
        reason="needs Slurm: apt-get install slurmctld slurmd slurm-client munge",
    ),
]
ENDLESS = [*TINY, "--train.steps=1000000", "--checkpoint.every=20", "--checkpoint.keep_last=1000"]


class Cluster:
    def __init__(self, folder: Path) -> None:
        outside = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        self.environment = outside | {
            "DISTGAN_SLURM": str(folder),
            "DISTGAN_SLURM_PORT": str(20000 + os.getpid() % 10000),
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }

    def run(self, *command: str) -> str:
        done = self.try_to(*command)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip()

    def try_to(self, *command: str) -> subprocess.CompletedProcess:
        # To files: the daemons that the cluster's script leaves behind would keep pipes open.
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            done = subprocess.run(
                command, env=self.environment, cwd=REPOSITORY, stdout=out, stderr=err, text=True, timeout=180
            )
            out.seek(0), err.seek(0)
            done.stdout, done.stderr = out.read(), err.read()
        return done

    def submit(self, script: str, *words: str, log: Path, options: tuple[str, ...] = ()) -> str:
        """The job's number."""
        return self.run("sbatch", "--parsable", f"--output={log}", *options, f"slurm/{script}.sbatch", *words)

    def is_there(self, job: str) -> bool:
        """Whether a job is queued or runs."""
        return job in self.run("squeue", "--noheader", "--format=%F").split()

    def wait_for_end(self, job: str, log: Path) -> str:
        wait_for(lambda: not self.is_there(job), log)
        return log.read_text()


def wait_for(condition: Callable[[], object], log: Path) -> None:
    patience = {"seconds": 300, "every": 0.2}
    runs.wait_for(condition, said=lambda: log.read_text() if log.exists() else "no log", **patience)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    made = Cluster(Path(f"/tmp/distgan-slurm-test-{os.getpid()}"))  # short, for its socket's sake
    try:
        made.run("slurm/local_cluster", "up")
        yield made
    finally:
        made.run("slurm/local_cluster", "down")


class Job:
    """An endless run on two nodes, which ends once its recipe is given an end."""

    stopped: Future

    def __init__(self, cluster: Cluster, folder: Path, *words: str, options: tuple[str, ...] = ()) -> None:
        self.cluster, self.run, self.log, self.recipe = cluster, folder / "run", folder / "log", folder / "recipe.yaml"
        self.recipe.write_text(yaml.safe_dump({"run": {"dir": str(self.run)}}))
        options = ("--nodes=2", *options)
        self.number = cluster.submit("train", str(self.recipe), *ENDLESS, *words, log=self.log, options=options)

    def wait_for_step(self, step: int) -> None:
        wait_for(lambda: self.run.exists() and any(found >= step for found in steps(self.run)), self.log)

    def end_soon_after_it_is_stopped(self) -> None:
        """In the seconds before Slurm starts it again."""
        wait_for((self.run / "preempted").exists, self.log)
        self.end = json.loads((self.run / "preempted").read_text())["step"] + 20
        self.recipe.write_text(yaml.safe_dump({"run": {"dir": str(self.run), "stop_at": self.end}}))

    def equals_an_undisturbed_one(self, folder: Path) -> bool:
        assert launch([*ENDLESS, f"--run.dir={folder}", f"--run.stop_at={self.end}"], world=2) == [0, 0]
        assert metrics(self.run) == metrics(folder)
        return tensors(self.run, self.end) == tensors(folder, self.end)


@pytest.fixture(scope="module")
def limited(cluster, tmp_path_factory) -> Iterator[Job]:
    """A job whose limit is two minutes: submitted first, looked at last."""
    folder = tmp_path_factory.mktemp("limited")
    job = Job(cluster, folder, "--track.to=wandb", options=("--time=2", "--signal=USR2@10"))
    with ThreadPoolExecutor() as waiting:
        job.stopped = waiting.submit(job.end_soon_after_it_is_stopped)
        yield job


@pytest.fixture(scope="module")
def array(cluster, limited, tmp_path_factory) -> tuple[str, Path]:
    """An array of two seeds, a node each."""
    folder = tmp_path_factory.mktemp("array")
    words = ["configs/quickstart.yaml", *TINY, f"--run.dir={folder / 'run'}", "--track.to=wandb"]
    return cluster.submit("array", *words, log=folder / "%a", options=("--array=0-1",)), folder


def test_a_wrong_recipe_fails_at_once_with_the_sentence_in_the_log(cluster, limited, array, tmp_path):
    log = tmp_path / "log"
    job = cluster.submit("train", "configs/quickstart.yaml", "--train.stepz=3", log=log, options=("--nodes=2",))
    assert cluster.wait_for_end(job, log) == (
        'distgan: error: unknown key "train.stepz": did you mean "train.steps"?\n'
    )
    assert "JobState=FAILED" in cluster.run("scontrol", "show", "job", job)


def test_an_array_of_two_seeds_makes_two_runs_of_one_group(cluster, array):
    job, folder = array
    for seed in ("0", "1"):
        assert "done: step 11 of 11" in cluster.wait_for_end(job, folder / seed)
    runs = [folder / f"run-seed{seed}" for seed in (0, 1)]
    assert [yaml.safe_load((run / "config.yaml").read_text())["run"]["seed"] for run in runs] == [0, 1]
    assert metrics(runs[0]) != metrics(runs[1])
    for seed, run in enumerate(runs):
        (recorded,) = (run / "wandb").glob("offline-run-*")
        described = next(record["run"] for record in wandb_records(recorded) if record["type"] == "run")
        assert (described["run_group"], described["tags"]) == ("run", [f"seed-{seed}", f"slurm-{job}"])


def test_two_nodes_train_to_the_end(cluster, tmp_path):
    log, run, whole = tmp_path / "log", tmp_path / "run", tmp_path / "whole"
    options = ("--nodes=2", "--ntasks=2")
    job = cluster.submit("train", "configs/quickstart.yaml", *TINY, f"--run.dir={run}", log=log, options=options)
    said = cluster.wait_for_end(job, log)
    assert said.count("starting at step 0 on 2 x cpu, 6 images each") == 1, said
    assert "JobState=COMPLETED" in cluster.run("scontrol", "show", "job", job)
    assert launch(["--config=configs/quickstart.yaml", *TINY, f"--run.dir={whole}"], world=2) == [0, 0]
    assert tensors(run, 11) == tensors(whole, 11)


def test_a_job_that_is_requeued_resumes_and_changes_no_bit(cluster, tmp_path):
    job = Job(cluster, tmp_path)
    job.wait_for_step(40)
    cluster.run("scontrol", "requeue", job.number)
    job.end_soon_after_it_is_stopped()
    said = cluster.wait_for_end(job.number, job.log)
    assert "stop signal: saving step" in said
    assert said.count("resuming at step") == 1, said
    assert job.equals_an_undisturbed_one(tmp_path / "whole")


def test_scancel_leaves_a_good_checkpoint_and_no_process(cluster, tmp_path):
    job = Job(cluster, tmp_path)
    job.wait_for_step(40)
    cluster.run("scancel", job.number)
    cluster.wait_for_end(job.number, job.log)
    wait_for(lambda: not processes_of(job.run), job.log)
    newest = job.run / "checkpoints" / f"step_{steps(job.run)[-1]:08d}"
    assert bundle.is_whole(newest)
    assert json.loads((job.run / "preempted").read_text())["step"] == steps(job.run)[-1]  # saved when it was told
    assert "JobState=CANCELLED" in cluster.run("scontrol", "show", "job", job.number)


def test_srun_alone_starts_ranks_too(cluster, tmp_path):
    """Without a launcher on each node: three tasks on two nodes."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    cluster.run(
        "srun", "--nodes=2", "--ntasks=3", "env", "OMP_NUM_THREADS=1", "distgan", "train", *TINY, f"--run.dir={run}"
    )
    assert launch([*TINY, f"--run.dir={whole}"], world=3) == [0, 0, 0]
    assert tensors(run, 11) == tensors(whole, 11)


def test_an_evaluation_by_two_tasks_gives_the_numbers_of_one_process(cluster, small_run, tmp_path):
    log, one, two = tmp_path / "log", tmp_path / "one.json", tmp_path / "two.json"
    words = [str(small_run), *QUICK, "--metrics=fd_classifier,prdc"]
    job = cluster.submit("evaluate", *words, f"--json={two}", log=log, options=("--ntasks=2",))
    assert launch([*words, f"--json={one}"], verb="evaluate") == [0]
    said = cluster.wait_for_end(job, log)
    assert said.count("fd_classifier") == 1, said
    found = [json.loads(file.read_text())["metrics"] for file in (one, two)]
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_the_doctor_names_the_rank_that_would_fail(cluster, tmp_path):
    bad = 'if [ "$SLURM_PROCID" = 1 ]; then export XDG_CACHE_HOME=/proc; fi; exec distgan doctor --json "$0"'
    done = cluster.try_to("srun", "--nodes=2", "bash", "-c", bad, str(tmp_path / "found.json"))
    assert done.returncode == 2
    assert "1. training fails, rank 1: the data cache /proc/distgan cannot be written" in done.stdout
    assert done.stderr.count("distgan: error: training would fail here: ") == 1
    found = json.loads((tmp_path / "found.json").read_text())
    assert [finding["ranks"] for finding in found["findings"] if finding["weight"] == "training fails"] == [[1]]


def processes_of(run: Path) -> list[str]:
    commands = []
    for folder in Path("/proc").iterdir():
        try:
            commands.append((folder / "cmdline").read_text())
        except OSError:
            continue
    return [command for command in commands if f"--run.dir={run}" in command]


def test_a_job_that_hits_its_time_limit_goes_on_by_itself_and_changes_no_bit(cluster, limited, tmp_path):
    job = limited
    job.stopped.result()
    said = cluster.wait_for_end(job.number, job.log)
    # Once, and again where the machine is so slow that twenty steps do not fit into what is left of two minutes.
    stopped = said.count("goes back into the queue")
    assert stopped >= 1, said
    assert f"resuming at step {job.end - 20} " in said
    assert said.count("resuming at step") == stopped, said
    records = [folder.name.rsplit("-", 1)[1] for folder in (job.run / "wandb").glob("offline-run-*")]
    assert len(records) == stopped + 1
    assert len(set(records)) == 1  # one and the same wandb run
    assert job.equals_an_undisturbed_one(tmp_path / "whole")

"""Tiny recipes, and readers of a run's folder, shared by the tests of whole programs."""

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("WANDB_MODE", "offline")
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="distgan-tests-")  # the prepared images
os.environ.setdefault("HF_HUB_OFFLINE", "1")

REPOSITORY = Path(__file__).parent.parent.parent

# A run of seconds: DCGAN with batch norm and everything on that has a position in the data or a stream of its own.
TINY = [
    "--model.width=4",
    "--model.latent_dim=8",
    "--data.flip=true",
    "--train.batch_size=12",
    "--train.steps=11",
    "--ema.half_life=50",
    "--track.to=none",
    "--track.log_every=3",
    "--track.sample_every=4",
    "--checkpoint.every=6",
]


# What TINY is changed by so that every loss, penalty, constraint, network, label, augmentation and schedule comes up.
VARIANTS = {
    "lsgan-labels-diffaugment-linear": [
        *("--loss.name=least_squares", "--model.conditional=true", "--augment.policy=color,translation,cutout"),
        "--optim.schedule=linear",
    ],
    "wgan-clipped-cosine": [
        *("--loss.name=wasserstein", "--optim.clip_weights=0.03", "--optim.schedule=cosine", "--train.d_steps=2"),
    ],
    "wgan-gp-resnet": [
        *("--model.architecture=resnet", "--loss.name=wasserstein", "--penalty.name=wgan_gp", "--train.d_steps=5"),
        *("--optim.betas=[0,0.9]", "--model.width=2"),
    ],
    "sngan-labels-resnet-translation": [
        *("--model.architecture=resnet", "--model.d_norm=spectral", "--model.conditional=true", "--loss.name=hinge"),
        *("--augment.policy=translation", "--model.d_width=3", "--model.init=orthogonal", "--model.width=2"),
    ],
    "relativistic-r1-r2-spectral-dcgan-labels": [
        *("--loss.name=relativistic", "--penalty.name=r1,r2", "--model.d_norm=spectral"),
        *("--model.conditional=true", "--augment.policy=cutout"),
    ],
    "r1-lazy-unnormalised-dcgan": [
        "--penalty.name=r1",
        "--penalty.every=2",
        "--model.d_norm=none",
        "--train.d_steps=2",
    ],
    "biggan-labels-ada": [
        *("--model.architecture=biggan", "--model.width=2", "--model.conditional=true", "--loss.name=hinge"),
        *("--augment.policy=ada", "--augment.adapt_over=150", "--augment.target=0.1", "--train.d_steps=2"),
        *("--ema.start=3", "--ema.ramp=null"),
    ],
    "biggan-own-batch": [
        *("--model.architecture=biggan", "--model.width=1", "--loss.name=hinge", "--train.g_batch=own"),
    ],
    "r3gan-labels-ramps": [
        *("--model.architecture=r3gan", "--model.width=8", "--model.conditional=true", "--loss.name=relativistic"),
        *("--penalty.name=r1,r2", "--penalty.weight=1", "--train.g_batch=own", "--optim.betas=[0,0.9]"),
        *("--augment.policy=ada_r3gan", "--augment.probability=0.1", "--ema.half_life=0", "--ema.ramp=null"),
        *("--ramp.images=100", "--ramp.lr=5e-5", "--ramp.beta2=0.99", "--ramp.penalty_weight=0.1"),
        *("--ramp.half_life=40", "--ramp.probability=0.55"),
    ],
    "r3gan": ["--model.architecture=r3gan", "--model.width=8", "--train.max_batch_per_device=3"],
}

# An evaluation of seconds.
QUICK = ["--extractor=classifier", "--num=300"]


def metrics(run: Path) -> list[dict]:
    """metrics.jsonl, but for times."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        del record["throughput/images_per_s"]
    return records


def steps(run: Path) -> list[int]:
    """The steps of the run's checkpoints."""
    return sorted(int(folder.name[5:]) for folder in (run / "checkpoints").glob("step_????????"))


def tensors(run: Path, step: int) -> dict[str, str]:
    """Hashes of all tensors on disk: of the checkpoint at a step and of the exported generator; and of the samples."""
    folder = run / "checkpoints" / f"step_{step:08d}"
    files = [
        *folder.glob("*.safetensors"),
        run / "generator" / "model.safetensors",
        *run.glob("samples/step_????????.png"),
    ]
    return {str(file.relative_to(run)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def wait_for(
    condition: Callable[[], object], *, seconds: float = 60, every: float = 0.01, said: Callable[[], str] = str
) -> None:
    """Waits until something holds; where it does not in time, the failure shows what was said."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, said()
        time.sleep(every)

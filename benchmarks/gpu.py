"""Each recipe's speed and memory on this machine's GPUs, at full width: images/s, FLOP/s, scaling, and `train.compile`.

    python benchmarks/gpu.py [--out docs/gpu.md] [--seconds 12]
    python benchmarks/gpu.py --rehearse        # on a CPU, narrow: whether this program itself works

Images are scikit-learn's digits in the recipe's size, so that nothing has to be fetched. Each run is the real program,
under `accelerate launch`; its first steps are not counted. Not yet run on a GPU.
"""

import argparse
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RECIPES = [
    *("cifar10_dcgan", "cifar10_wgan_gp", "cifar10_sngan", "cifar10_sngan_cond", "cifar10_biggan", "cifar10_r3gan"),
    "cifar10_dcgan64",
]
WARM = 10  # steps that are not counted
LAUNCHED = "DISTGAN_BENCHMARK_SECONDS"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="Markdown file to write (default: only print)")
    parser.add_argument("--seconds", type=float, default=12, help="of counted steps for each run (default: 12)")
    parser.add_argument("--rehearse", action="store_true", help="two CPU processes, narrow networks, two recipes")
    options = parser.parse_args()
    import torch

    gpus = torch.cuda.device_count()
    if not gpus and not options.rehearse:
        sys.exit("no GPU here: run this on a machine with one, or add --rehearse.")
    counts = [1, 2] if options.rehearse else [n for n in (1, 2, 4, 8) if n <= gpus]
    card = torch.cuda.get_device_name(0) if gpus else "a CPU, narrow: a rehearsal, whose numbers mean nothing"
    lines = [
        "# On GPUs",
        "",
        f"Written by `benchmarks/gpu.py` on {datetime.date.today()}, on {max(gpus, 1)} x {card}, torch "
        f"{torch.__version__}. Digits in the recipes' sizes; batches are the recipes'.",
        "",
        "| Recipe | precision | compile | GPUs | images/s | of one GPU, off | TFLOP/s per GPU | memory per GPU, GB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    for recipe in RECIPES[:2] if options.rehearse else RECIPES:
        for precision in ["fp32"] if options.rehearse else ["fp32", "bf16"]:
            alone = None
            more = counts[1:] if precision == "bf16" or options.rehearse else []
            compiling = ways_to_compile(recipe, precision, rehearse=options.rehearse)
            for count, how in [(1, "off"), *((1, how) for how in compiling), *((n, "off") for n in more)]:
                found = launched(recipe, precision, count, how, options.seconds, narrow=options.rehearse)
                alone = alone or found
                flops_per_s = found["images_per_s"] * alone["flops_per_image"]
                row = (
                    f"| `{recipe}` | {precision} | {how} | {count} | {found['images_per_s']:,.0f} | "
                    f"{found['images_per_s'] / alone['images_per_s'] / count:.0%} | {flops_per_s / count / 1e12:.2f} | "
                    f"{found['memory'] / 1e9:.2f} |"
                )
                lines.append(row)
                print(row, flush=True)
    if options.out is not None:
        options.out.write_text("\n".join(lines) + "\n")


def ways_to_compile(recipe: str, precision: str, *, rehearse: bool) -> list[str]:
    """What to race on one GPU beside `off`. inductor takes minutes at the start, so two recipes have to do."""
    if rehearse:
        return ["inductor"]
    if precision == "fp32":
        return []
    return ["graph", "inductor"] if recipe in ("cifar10_dcgan", "cifar10_sngan") else ["graph"]


def launched(recipe: str, precision: str, count: int, how: str, seconds: float, *, narrow: bool) -> dict[str, Any]:
    """Trains a recipe for a while on so many GPUs, with `train.compile` as `how`; returns what rank zero measured."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "accelerate.commands.launch"]
        launch = "cpu2" if narrow else "gpu8" if count > 1 else "gpu1"
        command += ["--config_file", str(ROOT / "launch" / f"{launch}.yaml"), "--num_processes", str(count)]
        command += [__file__, "--config", str(ROOT / "configs" / f"{recipe}.yaml"), f"--train.precision={precision}"]
        command += ["--data.source=digits", "--data.channels=3", f"--run.dir={folder}/run", "--track.to=none"]
        command += ["--eval.every=null", "--train.steps=1000000", "--checkpoint.every=1000000"]
        command += ["--track.log_every=100", "--track.sample_every=1000000"]
        command += ["--model.width=8", "--train.batch_size=16"] if narrow else []
        command += [f"--train.compile={how}"]
        if recipe == "cifar10_r3gan":  # ramps that `graph` refuses, and that change no speed
            command += ["--ramp.beta2=null", "--ramp.penalty_weight=null"]
        result = subprocess.run(
            command, cwd=ROOT, env={**os.environ, LAUNCHED: str(seconds)}, capture_output=True, text=True
        )
        found = Path(folder) / "run" / "speed.json"
        if not found.exists():
            sys.exit(f"{recipe} on {count}: ended with {result.returncode}:\n{result.stdout}\n{result.stderr}")
        return json.loads(found.read_text())


def run(seconds: float) -> None:
    """One process of a training: counts the steps of so many seconds, then stops as after a signal."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import flop_registry

    from distgan import train

    class Flops(TorchDispatchMode):  # torch's own FlopCounterMode cannot be entered by torch.autograd.grad
        total = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if func.overloadpacket in flop_registry:
                self.total += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
            return out

    due, on_gpu, flops = train.after_step, torch.cuda.device_count() > 0, Flops()
    began = 0.0

    def now() -> float:
        if on_gpu:
            torch.cuda.synchronize()
        return time.monotonic()

    def after_step(run: Any, step: int) -> int:
        nonlocal began
        step = due(run, step)
        counts = run.config.train.compile == "off"  # of compiled and of captured steps torch does not see the parts
        if step == WARM - 1 and counts:
            flops.__enter__()
        elif step == WARM:
            if counts:
                flops.__exit__(None, None, None)
            began = now()
        elif run.ranks.rank == 0 and step > WARM and time.monotonic() > began + seconds and not run.done(step):
            rate = (step - WARM) / (now() - began)
            measured = {
                "images_per_s": rate * run.config.images_per_step,
                "flops_per_image": flops.total * run.ranks.world / run.config.images_per_step,
                "memory": torch.cuda.max_memory_allocated() if on_gpu else 0,
            }
            (Path(run.config.run.dir) / "speed.json").write_text(json.dumps(measured))
            os.kill(os.getpid(), signal.SIGTERM)
            began = float("inf")
        return step

    train.after_step = after_step
    train.main(sys.argv[1:])


if __name__ == "__main__":
    if LAUNCHED in os.environ:
        run(float(os.environ[LAUNCHED]))
    else:
        main()

"""The loop against the textbook's, and what each difference brings; prints Markdown for docs/performance.md.

    python benchmarks/step.py [--only dcgan32 …] [--each]     # about 3 minutes for each network, 9 with --each

Both train the same network on Fashion-MNIST at 32x32 in batches of 64 (32 for the ResNet), on all cores, by turns. The
machine must do nothing else. With `--each` the textbook's loop also runs with one difference at a time, and with all.
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from loader import unpack
from turns import Program, processor, ratio, speeds

HERE = Path(__file__).parent
NETWORKS = {"dcgan32": ("dcgan", 32, 64), "dcgan64": ("dcgan", 64, 64), "resnet32": ("resnet", 32, 32)}
DIFFERENCES = ["in-memory", "no-item", "logits", "one-backward", "frozen", "fused", "channels-last"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"), help="IDX .gz files")
    parser.add_argument("--only", nargs="*", choices=NETWORKS, default=list(NETWORKS), help="which networks")
    parser.add_argument("--each", action="store_true", help="also each difference by itself")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each program (default: 9)")
    options = parser.parse_args()
    print(f"On {processor()}:\n\n| Network | Program | images/s | times the textbook's |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        unpack(options.data, scratch)
        for name in options.only:
            programs = rivals(scratch, options.data, *NETWORKS[name], each=options.each)
            measured = speeds(programs, rounds=options.rounds)
            for program, rates in measured.items():
                median = sorted(rates)[len(rates) // 2]
                print(f"| {name} | {program} | {median:.0f} | {ratio(measured, program, 'textbook'):.2f} |", flush=True)


def rivals(scratch: Path, data: Path, architecture: str, width: int, batch: int, *, each: bool) -> dict[str, Program]:
    """The textbook's loop, with differences if wished, and ours, by name."""
    plain = [sys.executable, str(HERE / "textbook.py"), f"--data={scratch}", f"--architecture={architecture}"]
    plain += [f"--width={width}", f"--batch={batch}"]
    conditions = {"textbook": []}
    if each:
        conditions |= {f"textbook, {one}": [f"--{one}"] for one in DIFFERENCES}
        conditions["textbook, all of these"] = [f"--{one}" for one in DIFFERENCES]
    conditions["textbook, bf16"] = ["--bf16"]
    programs = {name: Program([*plain, *switches], {}, batch) for name, switches in conditions.items()}
    ours = [sys.executable, str(HERE / "trained.py"), "--data.source=fashion_mnist", f"--data.path={data}"]
    ours += [f"--data.cache={scratch / 'cache'}", "--data.flip=true", f"--model.architecture={architecture}"]
    ours += [
        f"--model.width={width}",
        f"--model.d_width={width}",
        f"--train.batch_size={batch}",
        "--train.steps=1000000",
    ]
    ours += ["--model.d_norm=spectral"] if architecture == "resnet" else []
    ours += ["--optim.lr=2e-4", "--optim.betas=[0.5,0.999]", "--track.to=none", "--model.latent_dim=100"]
    for name, switches in {
        "fp32": [],
        "bf16": ["--train.precision=bf16"],
        "fp32, compiled": ["--train.compile=inductor"],
    }.items():
        run = scratch / f"{architecture}{width}-{name}"
        programs[f"distgan, {name}"] = Program([*ours, *switches, f"--run.dir={run}"], {}, batch)
    return programs


if __name__ == "__main__":
    main()

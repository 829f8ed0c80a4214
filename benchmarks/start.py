"""From the command to the first step, against a bare program; prints Markdown for docs/performance.md.

    python benchmarks/start.py        # about 4 minutes; the machine must do nothing else

Both start by `accelerate launch` on two processes. The bare program imports torch and accelerate, makes an
`Accelerator`, lets a layer learn once, and ends there; distgan is killed after the first step of the quickstart.
"""

import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from turns import Program, processor, until_first_tick

ROOT = Path(__file__).parent.parent
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ROOT / "launch" / "cpu2.yaml")]
BARE = """
import sys, torch
from accelerate import Accelerator
sys.path.insert(0, {folder!r})
from turns import tick
accelerator = Accelerator(cpu=True)
layer = torch.nn.Linear(1, 1)
layer, adam = accelerator.prepare(layer, torch.optim.Adam(layer.parameters()))
accelerator.backward(layer(torch.ones(1)).sum())
adam.step()
if accelerator.is_main_process:
    tick(1)
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        bare = Path(folder) / "bare.py"
        bare.write_text(BARE.format(folder=str(Path(__file__).parent)))
        ours = [str(ROOT / "benchmarks" / "trained.py"), "--config", str(ROOT / "configs" / "quickstart.yaml")]
        ours += ["--track.to=none"]
        seconds: dict[str, list[float]] = {"bare": [], "distgan": []}
        for round_ in range(8):  # the first one warms the caches
            for name, words in (("bare", [str(bare)]), ("distgan", [*ours, f"--run.dir={folder}/{round_}"])):
                taken = until_first_tick(Program([*LAUNCH, *words], {"OMP_NUM_THREADS": "1"}))
                seconds[name] += [taken] if round_ else []
    ratio = statistics.median(a / b for a, b in zip(seconds["distgan"], seconds["bare"], strict=True))
    print(f"On {processor()}:\n\n| `accelerate launch` on two processes | s to the first step | times the bare one |")
    print("|---|---|---|")
    print(f"| a bare program | {statistics.median(seconds['bare']):.1f} | 1.00 |")
    print(f"| the quickstart | {statistics.median(seconds['distgan']):.1f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()

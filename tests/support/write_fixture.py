"""Writes fixtures/format_N/, a run of two steps in today's format, and what comes of it. Run when a format begins."""

import json
import shutil
from pathlib import Path

import support.runs  # noqa: F401  its cache, not the user's
from distgan import load_generator
from distgan.storage import bundle
from support.programs import launch

if __name__ == "__main__":
    folder = Path(__file__).parent / "fixtures" / f"format_{bundle.FORMAT}"
    longer = folder.with_name("longer")
    argv = ["--model.width=2", "--model.latent_dim=4", "--train.batch_size=4", "--track.to=none", "--track.log_every=1"]
    assert launch([*argv, f"--run.dir={folder}", "--train.steps=2"]) == [0]
    assert launch([*argv, f"--run.dir={longer}", "--train.steps=3"]) == [0]
    after = json.loads((longer / "metrics.jsonl").read_text().splitlines()[2])
    recorded = {
        "mean of sample(4, seed=5)": load_generator(folder).sample(4, seed=5).float().mean().item(),
        "metrics of step 3": {name: value for name, value in after.items() if name.startswith(("loss", "score"))},
    }
    (folder / "recorded.json").write_text(json.dumps(recorded, indent=2) + "\n")
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace(str(folder), "runs/fixture"))
    (folder / ".lock").unlink()
    shutil.rmtree(longer)

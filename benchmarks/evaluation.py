"""Measuring a generator against torch-fidelity, with the same small extractor; prints Markdown for docs/performance.md.

    python benchmarks/evaluation.py        # about 4 minutes; the machine must do nothing else

Both are whole commands: they load a generator of DCGAN's width 32, draw 10,000 samples, and compare them with 10,000
images of Fashion-MNIST by the Fréchet distance, precision and recall, in the features of the recipe's classifier
(distgan also computes density and coverage). What either keeps of the real images is in its cache before the first
measured round.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

sys.path.insert(0, str(Path(__file__).parent))
from turns import processor

NUM = 10_000
ROUNDS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"), help="IDX .gz files")
    parser.add_argument("--peer", type=Path, metavar="RUN", help=argparse.SUPPRESS)  # this program, as the other one
    options = parser.parse_args()
    if options.peer:
        by_torch_fidelity(options.peer, options.data)
        return
    with tempfile.TemporaryDirectory() as folder:
        run = f"{folder}/run"
        distgan = [sys.executable, "-m", "distgan"]
        made = [*distgan, "train", f"--run.dir={run}", "--data.source=fashion_mnist", f"--data.path={options.data}"]
        made += ["--model.width=32", "--train.steps=30", "--train.batch_size=64", "--track.to=none"]
        subprocess.run(made, check=True, stdout=subprocess.DEVNULL)
        metrics = "--metrics=fd_classifier,prdc"
        rivals = {
            "torch-fidelity": [sys.executable, __file__, f"--data={options.data}", f"--peer={run}"],
            "distgan": [*distgan, "evaluate", run, "--extractor=classifier", f"--num={NUM}", metrics],
        }
        seconds: dict[str, list[float]] = {name: [] for name in rivals}
        for round_ in range(1 + ROUNDS):
            for name, command in rivals.items():
                started = time.monotonic()
                said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                if round_ == 0:
                    print(f"{name} says:\n{said}")
                else:
                    seconds[name].append(time.monotonic() - started)
    print(f"On {processor()}:\n\n| 10,000 samples by | s | times torch-fidelity's speed |\n|---|---|---|")
    for name, taken in seconds.items():
        faster = statistics.median(a / b for a, b in zip(seconds["torch-fidelity"], taken, strict=True))
        print(f"| {name} | {statistics.median(taken):.1f} | {faster:.2f} |")


class _Pixels(Dataset[Tensor]):
    def __init__(self, pixels: Tensor) -> None:
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> Tensor:
        return self.pixels[index]


def by_torch_fidelity(run: Path, data: Path) -> None:
    """Measures the run's generator by torch-fidelity, with distgan's classifier as the feature extractor."""
    import torch_fidelity
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase
    from torch_fidelity.generative_model_modulewrapper import GenerativeModelModuleWrapper

    import distgan
    from distgan import data as images
    from distgan.evaluation import weights
    from distgan.models import ImageSpec
    from distgan.recipe import DataConfig, EvalConfig

    source, small = DataConfig(source="fashion_mnist", path=str(data)), EvalConfig(extractor="classifier")
    prepared, spec = images.load(source), ImageSpec(image_size=32, channels=1)
    classifier = weights.build(small, weights.find(small, source, spec, own=None), spec)
    generator = distgan.load_generator(run)

    class Small(FeatureExtractorBase):
        def __init__(self, name: str, features_list: list[str], **_: object) -> None:
            super().__init__(name, features_list)
            self.network = classifier

        @staticmethod
        def get_provided_features_list() -> tuple[str]:
            return ("128",)

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return "128"

        @staticmethod
        def can_be_compiled() -> bool:
            return False

        def forward(self, pictures: Tensor) -> tuple[Tensor]:
            return (self.network(pictures)[0],)

    class Pictures(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return generator(z).mul(127.5).add(127.5).clamp(0, 255).to(torch.uint8)

    torch_fidelity.register_feature_extractor("small", Small)
    found = torch_fidelity.calculate_metrics(
        input1=GenerativeModelModuleWrapper(Pictures(), generator.latent_dim, "normal", 0),
        input1_model_num_samples=NUM,
        input2=Subset(_Pixels(prepared.pixels), range(NUM)),
        input2_cache_name="real",
        feature_extractor="small",
        fid=True,
        prc=True,
        cuda=False,
        batch_size=64,
        cache_root=str(run / "cache"),
        verbose=False,
    )
    print(found)


if __name__ == "__main__":
    main()

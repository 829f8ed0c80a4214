"""The settings of a run, one frozen dataclass per group. The docstring under each field is its `--help`.

A group checks its own values; rules.py refuses combinations of groups. A resumed run may change only settings that are
marked `BESIDE`, so a new setting is guarded until somebody marks it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from distgan import paths
from distgan.errors import UserError
from distgan.recipe import rules


def _at_least(key: str, value: int, minimum: int) -> None:
    if value < minimum:
        raise UserError(f"{key} is {value}, but must be at least {minimum}.")


def _at_most(key: str, value: int, maximum: int) -> None:
    if value > maximum:
        raise UserError(f"{key} is above {maximum:,}: choose less.")


def _positive(key: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise UserError(f"{key} is {value}, but must be above 0.")


def _non_negative(key: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise UserError(f"{key} is {value}, but must be at least 0.")


def _named(names: Sequence[str] | None) -> list[str]:
    """Returns the names in a list or in a text with commas; an empty list for None."""
    if names is None:
        return []
    return [name.strip() for name in (names.split(",") if isinstance(names, str) else names)]


def _as_text(config: Any, name: str) -> None:
    """Stores a list of names as one text with commas, so that both ways to write it are the same setting."""
    if getattr(config, name) is not None:
        object.__setattr__(config, name, ",".join(_named(getattr(config, name))) or None)


def _each_once(key: str, names: list[str]) -> None:
    if len(set(names)) < len(names):
        raise UserError(f"{key} is {','.join(names)}, which has a name twice: give each once.")


WITH_PROBABILITY = ("ada", "ada_r3gan")
"""The augmentations whose transforms are applied with a probability."""

_PATH = {"path": True}  # marks a setting in which `~` and `$NAME` are replaced
_SMALLEST, _LARGEST = 32, 256  # pixels of the longer side
BESIDE = {"beside": True}
"""Marks a setting, or a whole group, that does not change the mathematics: a resumed run may change it."""


def _expand_paths(group: str, config: Any) -> None:
    for one in dataclasses.fields(config):
        text = getattr(config, one.name)
        if one.metadata.get("path") and text is not None:
            object.__setattr__(config, one.name, paths.expanded(f"{group}.{one.name}", text))


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The run: its folder, its seed, and how far this invocation goes."""

    dir: str = field(metadata=_PATH | BESIDE)
    """Folder of the run. The same command with the same folder resumes it."""
    seed: int = 0
    """Decides every random draw of the training: starting weights, order of images, flips, latents, augmentation."""
    extend: int = field(default=0, metadata=BESIDE)
    """Train this many generator updates beyond `train.steps`: more steps of the same run. Refused with a linear or
    cosine `optim.schedule`, whose learning rate is 0 from `train.steps` on."""
    stop_at: int | None = field(default=None, metadata=BESIDE)
    """Save and end this invocation at this step; the same command without it goes on to the end."""
    timeout: float = field(default=600.0, metadata=BESIDE)
    """If a process dies or hangs, the job ends within this many seconds and names it. One step must take less than half
    of this. Work that a process does alone, such as preparing data, may take longer."""

    def __post_init__(self) -> None:
        _expand_paths("run", self)
        _positive("run.timeout", self.timeout)
        _at_least("run.seed", self.seed, 0)
        _at_least("run.extend", self.extend, 0)
        if self.stop_at is not None:
            _at_least("run.stop_at", self.stop_at, 1)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The training images."""

    source: Literal["digits", "cifar10", "fashion_mnist", "hub", "folder"] = "digits"
    """`digits`: the 1,797 handwritten digits that come with scikit-learn. `cifar10`, `fashion_mnist`: from the Hugging
    Face hub. `hub`: any image data set on it. `folder`: a folder or zip archive of pictures, whose sub-folders are
    classes."""
    id: str | None = None
    """Name of the data set on the hub, for `hub`: owner/name."""
    path: str | None = field(default=None, metadata=_PATH | BESIDE)
    """A local copy to read instead of the hub: a folder of the data set's parquet files. For cifar10 also the binary
    version of the original (cifar-10-batches-bin, or its .tar.gz); for fashion_mnist also IDX files. For `folder`: the
    folder or zip archive of pictures."""
    config: str | None = None
    """Which configuration of a data set to read, if there are several: the configuration's name on the hub, or its
    folder in a local copy."""
    split: str = "train"
    """Which split of a data set to train on. For `folder`: which sub-folder, if those at the top are named train, val,
    test or the like."""
    image_column: str | None = None
    """Column of the pictures in a data set. If unset, the first column that holds pictures."""
    label_column: str | None = None
    """Column of the class labels in a data set: named classes, whole numbers (-1 for none) or strings. If unset, the
    first column of named classes; in parquet files that the `datasets` library did not write, the column called label,
    labels or class."""
    image_size: int | tuple[int, int] = 32
    """Pixels of a side, for squares; for other rectangles height and width, as in [64,128]. Sides are multiples of 4 up
    to 256, and the longer one is at least 32. Pictures of another size are brought to this one as `fit` says."""
    fit: Literal["crop", "pad", "stretch"] = "crop"
    """How a picture of another shape is made to fit. `crop`: its largest centred part of the wanted shape is resized.
    `pad`: the whole picture is resized and centred, with black borders (with 4 channels, transparent ones). `stretch`:
    height and width are resized separately."""
    channels: Literal[1, 3, 4] | None = None
    """1 for grey, 3 for colour (RGB), 4 for colour with transparency (RGBA). With 1 or 3, transparent areas become
    white; with 4, pictures without transparency are opaque. If unset: 1 for `digits` and `fashion_mnist`, 3 for the
    others."""
    skip_bad: bool = False
    """Leave out pictures that cannot be decoded, and say how many. By default one such picture stops the command."""
    cache: str | None = field(default=None, metadata=_PATH | BESIDE)
    """Folder for the prepared images. If unset, `$XDG_CACHE_HOME/distgan`, or `~/.cache/distgan`."""
    flip: bool = False
    """Mirror each image left to right with probability 1/2."""
    placement: Literal["auto", "device", "host", "disk"] = field(default="auto", metadata=BESIDE)
    """Where the images are kept: in the device's memory, in the host's, on `disk`, from which threads read them ahead,
    or (auto) on the device if they fit there, otherwise in the host's memory. The batches are the same in each case."""
    window: int | None = None
    """For a slow disk: blocks of 256 neighbouring images are shuffled, and then the images within every so many of that
    order, which are read ahead together. If unset, each epoch is a permutation of all images. If images are sorted by
    class, choose it much larger than 256 times the number of classes."""

    def __post_init__(self) -> None:
        _expand_paths("data", self)
        self._check_size()
        # A setting that the source does not use is refused, not ignored; sources.py checks `path` itself.
        settings = {key: getattr(self, key) for key in ("id", "config", "image_column", "label_column")}
        settings["split"] = self.split if self.split != "train" else None
        takes = {"digits": (), "folder": ("split",), "hub": settings.keys()}.get(self.source, settings.keys() - {"id"})
        for key, value in settings.items():
            if value is not None and key not in takes:
                unset = "train" if key == "split" else "null"
                raise UserError(
                    f"data.{key} is {value}, which data.source {self.source} does not use: leave it out; if the recipe "
                    f"sets it, add --data.{key}={unset}."
                )

        if self.window is not None:
            _at_least("data.window", self.window, 4096)

    def _check_size(self) -> None:
        """Refuses sizes that no network has. Stores height and width as a tuple, or as one number if they are equal."""
        if not isinstance(self.image_size, int):
            object.__setattr__(self, "image_size", tuple(self.image_size))
        size = self.size
        if len(size) != 2 or max(size) < _SMALLEST or any(side % 4 or not 4 <= side <= _LARGEST for side in size):
            given = self.image_size if isinstance(self.image_size, int) else list(self.image_size)
            raise UserError(
                f"data.image_size is {given}, but must be one side of a square or [height,width], in multiples of 4 up "
                f"to {_LARGEST}, the longer one at least {_SMALLEST}: give for instance 32, 48 or [64,128]."
            )
        if size[0] == size[1]:
            object.__setattr__(self, "image_size", size[0])

    @property
    def size(self) -> tuple[int, int]:
        """Returns height and width in pixels."""
        if isinstance(self.image_size, int):
            return self.image_size, self.image_size
        return self.image_size


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The two networks."""

    architecture: str = "dcgan"
    """Name of a pair of networks in `distgan.models.ARCHITECTURES`: dcgan, resnet, biggan, r3gan."""
    width: int = 64
    """Channels of the layer next to the image. They double whenever the resolution halves (resnet: to at most 16 times
    this). Exception: at 32x32, all layers of resnet have this number. So resnet needs a larger width at 32x32 than at
    larger sizes, for instance 256 instead of 64. biggan: the unit of its published layouts; at 32x32 all layers have 4
    times this in the generator and twice this in the discriminator. r3gan: channels at up to 32x32, a multiple of 8;
    they halve whenever the resolution doubles beyond that."""
    latent_dim: int = 100
    """Length of the latent vector z, drawn from N(0, 1)."""
    d_width: int | None = None
    """Width of the discriminator. If unset, `width`."""
    d_norm: Literal["batch", "spectral", "none"] | None = None
    """Normalisation of the discriminator: batch norm; spectral norm of every weight, with one power iteration per
    update; or none. If unset: batch norm for dcgan, none for resnet and r3gan, spectral norm for biggan, whose
    generator always has it, too. With spectral norm, resnet sums its last features over the image, as SNGAN does;
    otherwise it takes their mean, as WGAN-GP does."""
    conditional: bool = False
    """Give the class labels to both networks: class-conditional batch norm in the generator (r3gan: a learnt vector
    beside the latent), projection in the discriminator. With few images per class this may reduce variety."""
    init: Literal["paper", "orthogonal"] = "paper"
    """Starting weights: as in the architecture's paper, or orthogonal matrices, which r3gan refuses."""
    sync_batchnorm: bool = True
    """Take batch norm's statistics over the images of all processes. If false, each process normalises by its own
    share; results then depend on the number of processes, and rank zero's running statistics are saved and exported."""

    def __post_init__(self) -> None:
        _at_least("model.width", self.width, 1)
        if self.d_width is not None:
            _at_least("model.d_width", self.d_width, 1)
        _at_least("model.latent_dim", self.latent_dim, 1)


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The adversarial loss."""

    name: str = "non_saturating"
    """Name of a loss in `distgan.objective.losses.LOSSES`: non_saturating, least_squares, wasserstein, hinge,
    relativistic."""


@dataclass(frozen=True, kw_only=True)
class PenaltyConfig:
    """A penalty on the gradient of the discriminator with respect to images, added to its loss."""

    name: list[str] | str | None = None
    """Names in `distgan.objective.penalties.PENALTIES`: wgan_gp, r1, r2. Several as a list, such as [r1,r2], or with
    commas between them. Default: none."""
    weight: float | None = None
    """Weight of each penalty. For wgan_gp it is lambda. For r1 and r2 it is gamma: the squared gradient norm is
    multiplied by half of it. If unset, 10."""
    every: int = 1
    """Compute the penalty only at every n-th update of the discriminator, with n times the weight. Refused above 1 with
    the relativistic loss."""

    def __post_init__(self) -> None:
        _as_text(self, "name")
        if self.weight is not None:
            _positive("penalty.weight", self.weight)
        _at_least("penalty.every", self.every, 1)
        _at_most("penalty.every", self.every, 1_000_000)
        for key, default in {"weight": None, "every": 1}.items():
            if self.name is None and getattr(self, key) != default:
                unset = "null" if default is None else default
                raise UserError(
                    f"penalty.{key} is {getattr(self, key)}, but no penalty is named: set penalty.name, or "
                    f"penalty.{key} to {unset}."
                )
        _each_once("penalty.name", self.names)

    @property
    def names(self) -> list[str]:
        """Lists the names in the order given."""
        return _named(self.name)


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Differentiable augmentation of all images that the discriminator sees: DiffAugment (Zhao et al. 2020) or ADA
    (Karras et al. 2020)."""

    policy: list[str] | str | None = None
    """Names in `distgan.objective.augment.AUGMENTATIONS`, in the order in which they are applied: color, translation,
    cutout. Several as a list, such as [color,cutout], or with commas between them. Or one of the pipelines of ADA, in
    which each transform is applied to an image with a probability: ada, with geometry and colour; ada_r3gan, with
    colour half as often, and cutout. Default: none."""
    probability: float | None = None
    """Probability of each transform of ada. If unset, it is adapted: it starts at 0 and rises or falls with how often
    the discriminator is right about real images, between 0 and 0.8."""
    target: float = 0.6
    """The mean sign of the logits of real images that an adapted probability aims at."""
    adapt_over: int = 500_000
    """How many real images it takes an adapted probability to rise from 0 to 1."""

    def __post_init__(self) -> None:
        _as_text(self, "policy")
        _each_once("augment.policy", self.names)
        _at_least("augment.adapt_over", self.adapt_over, 1)
        if not -1 < self.target < 1:
            raise UserError(f"augment.target is {self.target}, but must be above -1 and below 1.")
        if self.probability is not None and not 0 <= self.probability <= 1:
            raise UserError(f"augment.probability is {self.probability}, but must be from 0 to 1.")
        if self.pipelines and len(self.names) > 1:
            raise UserError(
                f"augment.policy is {self.policy}, but {self.pipelines[0]} is a whole pipeline: name it alone."
            )
        if not self.pipelines and self.probability is not None:
            raise UserError(
                f"augment.probability is {self.probability}, but only {' and '.join(WITH_PROBABILITY)} have one, and "
                f"augment.policy is {self.policy or 'null'}: set augment.probability to null."
            )
        for key, default in {"target": 0.6, "adapt_over": 500_000}.items():
            if not self.adaptive and getattr(self, key) != default:
                raise UserError(
                    f"augment.{key} is {getattr(self, key)}, but no probability is adapted: set augment.policy to ada "
                    f"and augment.probability to null, or augment.{key} to {default}."
                )

    @property
    def pipelines(self) -> list[str]:
        """Lists those of the names that have a probability."""
        return [name for name in self.names if name in WITH_PROBABILITY]

    @property
    def adaptive(self) -> bool:
        """Tells whether the probability is adapted."""
        return self.probability is None and bool(self.pipelines)

    @property
    def names(self) -> list[str]:
        """Lists the names in the order given."""
        return _named(self.policy)


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Adam, one for each network, both with these settings."""

    lr: float = 2e-4
    """Learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """The learning rate over time: constant, or down to 0 at `train.steps`, linearly or along a cosine."""
    betas: tuple[float, float] = (0.5, 0.999)
    """Adam's decay rates of the first and second moment, such as [0.5,0.999]."""
    clip_weights: float | None = None
    """After each update of the discriminator, clip its weights to the range from minus this to plus this (WGAN)."""

    def __post_init__(self) -> None:
        _positive("optim.lr", self.lr)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"optim.betas is {list(self.betas)}, but each must be at least 0 and below 1.")
        if self.clip_weights is not None:
            _positive("optim.clip_weights", self.clip_weights)


@dataclass(frozen=True, kw_only=True)
class EmaConfig:
    """The averaged generator, an exponential moving average of the weights. It is what is sampled and exported."""

    half_life: float = 10_000
    """Half-life of old weights in the average, counted in real images that the discriminator has seen. 0 switches
    averaging off."""
    ramp: float | None = 0.05
    """At the start the half-life is this fraction of the images seen so far, until it reaches `half_life`. null: it is
    `half_life` from the start."""
    start: int = 0
    """Until this step the average is a copy of the generator."""

    def __post_init__(self) -> None:
        _non_negative("ema.half_life", self.half_life)
        if self.ramp is not None:
            _positive("ema.ramp", self.ramp)
        _at_least("ema.start", self.start, 0)


@dataclass(frozen=True, kw_only=True)
class RampConfig:
    """Settings that change at the start of a run: along half a cosine, from their value in their own group to the one
    given here, while the discriminator sees the first `images` images. Then they stay (R3GAN, Huang et al. 2024). A
    setting whose entry is unset does not change."""

    images: int | None = None
    """Length of the ramps, in real images that the discriminator has seen."""
    lr: float | None = None
    """Last value of `optim.lr`."""
    beta2: float | None = None
    """Last value of the second of `optim.betas`."""
    penalty_weight: float | None = None
    """Last value of `penalty.weight`."""
    half_life: float | None = None
    """Last value of `ema.half_life`."""
    probability: float | None = None
    """Last value of `augment.probability`."""

    def __post_init__(self) -> None:
        ends = {key: getattr(self, key) for key in ("lr", "beta2", "penalty_weight", "half_life", "probability")}
        given = {key: end for key, end in ends.items() if end is not None}
        for key, end in given.items():
            (_positive if key in ("lr", "penalty_weight") else _non_negative)(f"ramp.{key}", end)
        if self.beta2 is not None and self.beta2 >= 1:
            raise UserError(f"ramp.beta2 is {self.beta2}, but must be below 1.")
        if self.probability is not None and self.probability > 1:
            raise UserError(f"ramp.probability is {self.probability}, but must be at most 1.")
        if self.images is not None:
            _at_least("ramp.images", self.images, 1)
        if given and self.images is None:
            raise UserError(f"ramp.{next(iter(given))} is set, but ramp.images is not: say after how many images.")
        if self.images is not None and not given:
            raise UserError(
                f"ramp.images is {self.images}, but nothing is ramped: set one of ramp.{', ramp.'.join(ends)}."
            )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The adversarial loop."""

    steps: int = 10_000
    """Generator updates."""
    batch_size: int = 128
    """Images per update, over all processes together."""
    d_steps: int = 1
    """Discriminator updates per generator update, each on new images."""
    g_batch: Literal["shared", "own"] = "shared"
    """The batch of the generator's update. `shared`: the discriminator's last one, whose fakes are used again. `own`:
    the next one, with new latents and, for a paired loss, new real images, as in R3GAN's code; it costs one more
    forward pass of the generator, and the discriminator does not see its real images in that epoch."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the networks. Weights and losses stay in fp32. For mixed precision we advise bf16."""
    max_batch_per_device: int | None = field(default=None, metadata=BESIDE)
    """If a process's share of a batch is larger than this, accumulate gradients over equal parts of at most this many
    images: the same update in less memory, at the cost of one more forward pass of the generator. Only for networks
    without batch norm: of the built-in ones, r3gan."""
    init_from: str | None = field(default=None, metadata=_PATH)
    """Start a new run from the weights of another run's newest checkpoint (a run's folder, or a checkpoint's)."""
    freeze_d: int = 0
    """With `train.init_from`: do not train this many of the discriminator's blocks, counted from the image (FreezeD, Mo
    et al. 2020), so that few images do not make it forget what it knows."""
    compress: Literal["none", "bf16"] = "none"
    """`bf16`: send gradients between processes in bf16, half as many bytes, for slow networks. They and their sums are
    rounded to 8 bits, so that updates depend on the number of processes."""
    compile: Literal["auto", "off", "graph", "inductor"] = "off"
    """How steps run. `off`: as they are written, one kernel after the other. `graph`: captured as one CUDA graph and
    repeated, for small networks, whose GPU waits for the host; the same updates. Needs one process on a GPU, and has
    not run on one yet, so it is not the default. `inductor`: networks compiled by torch.compile; rounds differently.
    Needs a C++ compiler, and minutes at the start. `auto`: `graph` where it can be, otherwise `off`."""
    deterministic: bool = False
    """On CUDA, use only deterministic kernels, so that a resumed run is bit-equal to one that never stopped. Slower."""

    def __post_init__(self) -> None:
        _expand_paths("train", self)
        _at_least("train.steps", self.steps, 1)
        _at_least("train.batch_size", self.batch_size, 1)
        _at_least("train.d_steps", self.d_steps, 1)
        _at_least("train.freeze_d", self.freeze_d, 0)
        if self.freeze_d and self.init_from is None:
            raise UserError(
                f"train.freeze_d is {self.freeze_d}, but random weights would be frozen: give train.init_from, the run "
                "whose discriminator is to be kept."
            )
        if self.max_batch_per_device is not None:
            _at_least("train.max_batch_per_device", self.max_batch_per_device, 1)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save, what to keep."""

    every: int = 1000
    """Steps between checkpoints. The run also saves at its end, at `run.stop_at`, on a stop signal, and after each
    evaluation that is the best so far."""
    every_minutes: float | None = None
    """Save also when this many minutes have passed since the last checkpoint."""
    on_error: Literal["retry", "stop"] = "retry"
    """What to do when the disk is full or fails. `retry`: say so, train on and try again at the next log point. `stop`:
    end the run. What was saved before is kept. If the end of a run cannot be saved, it is an error either way."""
    keep_last: int = 3
    """How many of the newest checkpoints to keep. The best one and those that a rollback needs are kept, too."""
    keep_every: int | None = None
    """Also keep each checkpoint whose step is a multiple of this."""

    def __post_init__(self) -> None:
        _at_least("checkpoint.every", self.every, 1)
        if self.every_minutes is not None:
            _positive("checkpoint.every_minutes", self.every_minutes)
        _at_least("checkpoint.keep_last", self.keep_last, 1)
        if self.keep_every is not None:
            _at_least("checkpoint.keep_every", self.keep_every, 1)


_REFUSED_BY_WANDB = set("/\\#?%:")  # in a project's name
_TRACKERS = ("wandb", "tensorboard", "trackio", "mlflow")
_LONGEST_TAG = 64  # characters that wandb takes


@dataclass(frozen=True, kw_only=True)
class TrackConfig:
    """What is recorded on the way."""

    to: list[str] | str = "wandb"
    """`none`, or some of `wandb` (offline if there is no key), `tensorboard`, `trackio` and `mlflow`, as a list or with
    commas between them. metrics.jsonl and samples/ are always written."""
    project: str = "distgan"
    """Project of wandb and trackio, experiment of mlflow. WANDB_PROJECT is ignored, except in a sweep, whose agent sets
    it. WANDB_DISABLED=true or WANDB_MODE=disabled switch wandb off."""
    group: str | None = None
    """Name that runs are grouped by in wandb, trackio and mlflow, such as the seeds of one recipe. If unset, it is
    WANDB_RUN_GROUP, which slurm/array.sbatch sets for the seeds of a recipe."""
    tags: list[str] | str | None = None
    """Tags in wandb, trackio and mlflow, as a list or with commas between them. `seed-N` is added, and under Slurm
    `slurm-JOB` with the number of the job or of the array."""
    artifacts: list[str] | str | None = None
    """What wandb and mlflow keep a copy of when the run is complete: `generator`, `checkpoint` or both, as a list or
    with commas between them."""
    log_every: int = 100
    """Steps between lines of metrics, which are means over these steps. There is also a line at each evaluation."""
    sample_every: int = 1000
    """Steps between sample grids, which the averaged generator draws from fixed latents. With labels, a grid has one
    row for each of the first 32 classes."""
    report: bool = False
    """Write report.html into the run's folder at every log point: the page that `distgan report` makes."""
    truncation: float | None = None
    """Draw the latents of sample grids from a normal distribution that is cut off at plus and minus this (Brock et al.
    2019). Batch norm then gets standing statistics, of 1,024 more samples at each grid."""

    def __post_init__(self) -> None:
        for name in ("to", "tags", "artifacts"):
            _as_text(self, name)
        self._check_names()
        refused = sorted(_REFUSED_BY_WANDB & set(self.project))
        if "wandb" in self.trackers and (refused or not 0 < len(self.project.strip()) <= len(self.project) <= 128):
            why = f"with {' '.join(refused)} in it" if refused else "empty" if not self.project.strip() else "too long"
            raise UserError(
                f'track.project is "{self.project}", {why}: wandb takes names of up to 128 characters without any of '
                f"{' '.join(sorted(_REFUSED_BY_WANDB))}."
            )
        _at_least("track.log_every", self.log_every, 1)
        _at_least("track.sample_every", self.sample_every, 1)
        if self.truncation is not None:
            _positive("track.truncation", self.truncation)

    @property
    def trackers(self) -> list[str]:
        """Lists the trackers' names."""
        return [name for name in _named(self.to) if name != "none"]

    @property
    def labels(self) -> list[str]:
        """Lists the tags."""
        return _named(self.tags)

    @property
    def kept(self) -> list[str]:
        """Lists what trackers keep copies of."""
        return _named(self.artifacts)

    def _check_names(self) -> None:
        named = {"to": _named(self.to) or [""], "artifacts": self.kept}
        for key, known in {"to": _TRACKERS, "artifacts": ("generator", "checkpoint")}.items():
            for name in named[key]:
                if name not in known and not (key == "to" and named[key] == ["none"]):
                    none = "none or " if key == "to" else ""
                    raise UserError(f'track.{key} has "{name}", but must be {none}some of {", ".join(known)}.')
            _each_once(f"track.{key}", named[key])
        if self.kept and not {"wandb", "mlflow"} & set(self.trackers):
            raise UserError(
                f"track.artifacts is {self.artifacts}, but track.to is {self.to}, and only wandb and mlflow keep "
                "files: add one of them, or leave track.artifacts out."
            )
        for tag in self.labels:
            if not 0 < len(tag) <= _LONGEST_TAG:
                raise UserError(f'track.tags has "{tag}", but a tag must have 1 to {_LONGEST_TAG} characters.')


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluations of the averaged generator during training. They change no update, unless the guard acts on them."""

    every: int | None = None
    """Steps between evaluations; there is also one at the end. The best checkpoint is kept. If unset, the run is not
    evaluated."""
    extractor: Literal["inception", "classifier"] = "inception"
    """The network whose features are compared. `inception`: the one used for published FIDs, which is downloaded.
    `classifier`: a small network that is trained on the labels of the training images; needs no download."""
    extractor_weights: str | None = field(default=None, metadata=_PATH)
    """File with the extractor's weights: safetensors, or torch-fidelity's file for Inception. If unset, they are
    downloaded or trained."""
    metrics: list[str] | str | None = None
    """Which numbers to compute, as a list or with commas between them. inception has fid,is,kid,prdc; classifier has
    fd_classifier,is_classifier,kd_classifier,prdc. The first one given decides which checkpoint is best. If unset:
    fid,prdc or fd_classifier,prdc."""
    num: int = 10_000
    """How many images to draw."""
    truncation: float | None = None
    """Draw latents from a normal distribution that is cut off at plus and minus this (Brock et al. 2019)."""
    standing: int | None = None
    """Give batch norm in the generator statistics of this many batches of 64 samples (standing statistics, Brock et al.
    2019) instead of its running ones. If unset, 16 with `eval.truncation`, otherwise none."""
    reference: str = field(default="train", metadata=_PATH)
    """Real images to compare with. `train`: those trained on. `test`: the source's test split. Or a folder or zip
    archive of pictures of the generator's size."""

    def __post_init__(self) -> None:
        _expand_paths("eval", self)
        _as_text(self, "metrics")
        if self.every is not None:
            _at_least("eval.every", self.every, 1)
        _at_least("eval.num", self.num, 1)
        if self.truncation is not None:
            _positive("eval.truncation", self.truncation)
        if self.standing is not None:
            _at_least("eval.standing", self.standing, 1)
        for name in self.measured:
            if name not in EVAL_METRICS[self.extractor]:
                known = ", ".join(EVAL_METRICS[self.extractor])
                raise UserError(
                    f'eval.metrics has "{name}", but those of the extractor {self.extractor} are {known}: choose among '
                    "these."
                )
        if self.measured[0] == "prdc" and self.every is not None:
            raise UserError(
                "eval.metrics begins with prdc, but its first metric decides which checkpoint is best, and prdc is "
                "four numbers: put another metric first."
            )

    @property
    def measured(self) -> list[str]:
        """Lists the metrics' names, or the defaults if none are given."""
        return _named(self.metrics) or [next(iter(EVAL_METRICS[self.extractor])), "prdc"]


EVAL_METRICS = {
    "inception": {"fid": "frechet", "is": "inception_score", "kid": "kernel_distance", "prdc": "prdc"},
    "classifier": {
        "fd_classifier": "frechet",
        "is_classifier": "inception_score",
        "kd_classifier": "kernel_distance",
        "prdc": "prdc",
    },
}
"""The metrics of each extractor by their names in `eval.metrics`, with the name of each formula in `FORMULAS`."""
HIGHER_IS_BETTER = ("is", "is_classifier")
"""The metrics of which a larger value is better. Of the others that may come first in `eval.metrics`, which prdc may
not, a smaller one is."""


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """What happens when training collapses or diverges. The guard judges at every log point and evaluation."""

    on_trouble: Literal["warn", "stop", "rollback"] = "warn"
    """`warn`: warn, in wandb, too. `stop`: save and end with exit code 6. `rollback`: return to the newest checkpoint
    that `checkpoint.every` made before the problem (if there is none, to the newest of any kind from before it, or else
    to the oldest) and go on with different random draws. Learning rates are halved: D's if it memorises images,
    recognises every fake or is too sure of real images, otherwise that of the network that is winning, or both. NaN or
    inf ends the run, unless this is `rollback` and it can roll back."""
    patience: int = 5
    """Act on a problem only after it was seen at this many log points in a row, or at two evaluations in a row if only
    evaluations show it. NaN and inf count at once."""
    after: int = 50_000
    """Until this many images have been seen, only NaN and inf are judged, because every generator starts out
    collapsed."""
    rollbacks: int = 3
    """How often a run may roll back before it stops."""

    def __post_init__(self) -> None:
        _at_least("guard.patience", self.patience, 1)
        _at_least("guard.after", self.after, 0)
        _at_least("guard.rollbacks", self.rollbacks, 1)


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run."""

    run: RunConfig
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    penalty: PenaltyConfig = PenaltyConfig()
    augment: AugmentConfig = AugmentConfig()
    optim: OptimConfig = OptimConfig()
    ema: EmaConfig = EmaConfig()
    ramp: RampConfig = RampConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = field(default=CheckpointConfig(), metadata=BESIDE)
    track: TrackConfig = field(default=TrackConfig(), metadata=BESIDE)
    eval: EvalConfig = field(default=EvalConfig(), metadata=BESIDE)
    guard: GuardConfig = field(default=GuardConfig(), metadata=BESIDE)

    def __post_init__(self) -> None:
        rules.check_recipe(self)

    @property
    def last_step(self) -> int:
        """Returns the step at which the run is complete."""
        return self.train.steps + self.run.extend

    @property
    def images_per_step(self) -> int:
        """Counts the real images that D sees per generator update: the unit of `images_seen` and of half-lives."""
        return self.train.batch_size * self.train.d_steps

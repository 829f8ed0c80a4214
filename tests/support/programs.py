"""What the tests' processes run: the real program, with networks, losses and faults that only tests need.

`launch` starts one process per rank, real ones over gloo, forked from a server that has imported torch once.
"""

import contextlib
import dataclasses
import itertools
import json
import multiprocessing
import os
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import sklearn.datasets  # noqa: F401  for the server: the digits' import takes as long as all of a tiny run
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from distgan import cli, data, evaluation, models, seeding, train
from distgan.models import Architecture, Generator
from distgan.models.conditional import Projection
from distgan.objective import losses, penalties
from distgan.objective.penalties import Penalty
from distgan.run import algorithm, capture, tracking
from distgan.run.housekeeping import Housekeeping
from distgan.storage import checkpoint

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["support.programs"])
# The server finds this module by PYTHONPATH alone; without it every rank would import torch anew.
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH")])
)


def launch(
    argv: Sequence[str],
    *,
    verb: str = "train",
    world: int = 1,
    setups: Sequence[Callable[[], None]] = (),
    log: Path | None = None,
    timeout: float = 120,
    meanwhile: Callable[[list[multiprocessing.process.BaseProcess]], None] = lambda ranks: None,
) -> list[int]:
    """Runs `distgan VERB ARGV` on `world` ranks and returns their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [
        processes.Process(target=_rank, args=(rank, world, port, [verb, *argv], list(setups), log), daemon=True)
        for rank in range(world)
    ]
    for rank in ranks:
        rank.start()
    meanwhile(ranks)
    deadline = time.monotonic() + timeout
    for rank in ranks:
        rank.join(max(0, deadline - time.monotonic()))
    for rank in ranks:
        if rank.is_alive():
            rank.kill()
            rank.join()
    return [rank.exitcode if rank.exitcode is not None else -1 for rank in ranks]


def _rank(
    rank: int, world: int, port: int, argv: list[str], setups: list[Callable[[], None]], log: Path | None
) -> None:
    if log is not None:
        stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(stream, 1)
        os.dup2(stream, 2)
    torch.set_num_threads(1)
    if world > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ |= {"LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ["OMP_NUM_THREADS"] = "1"
    for setup in setups:
        setup()
    sys.exit(cli.main(argv))


# Networks and objectives from outside the package ---------------------------------------------------------------------


class PlainGenerator(Generator):
    """latents -> (N, channels, 32, 32), without batch norm."""

    def __init__(self, *, channels: int, width: int, latent_dim: int, class_counts: tuple[int, ...] = ()) -> None:
        super().__init__(latent_dim=latent_dim, class_counts=class_counts)
        self.embedding = nn.Embedding(len(class_counts), latent_dim) if class_counts else None
        self.main = nn.Sequential(
            nn.Linear(latent_dim, width * 64),
            nn.Unflatten(1, (width, 8, 8)),
            nn.LeakyReLU(0.2),
            nn.ConvTranspose2d(width, width, 4, 2, 1),
            nn.LeakyReLU(0.2),
            nn.ConvTranspose2d(width, channels, 4, 2, 1),
            nn.Tanh(),
        )

    def forward(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        return self.main(z if self.embedding is None else z * self.embedding(y))


class PlainDiscriminator(nn.Module):
    """(N, channels, 32, 32) -> logits (N,), without batch norm."""

    def __init__(self, *, channels: int, width: int, classes: int = 0) -> None:
        super().__init__()
        self.projection = Projection(channels * 1024, classes=classes) if classes else None
        self.main = nn.Sequential(
            nn.Conv2d(channels, width, 4, 2, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, width, 4, 2, 1),
            nn.LeakyReLU(0.2),
            nn.Flatten(),
            nn.Linear(width * 64, 1),
        )

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        logits = self.main(x).flatten()
        return logits if self.projection is None else logits + self.projection(x.flatten(1), y)


@torch.no_grad()
def he_scaled(network: nn.Module, rng: torch.Generator) -> None:
    """Weights that keep activations at their size, so that a difference anywhere reaches the losses."""
    for layer in network.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            nn.init.kaiming_normal_(layer.weight, a=0.2, generator=rng)
            layer.bias.zero_()
        elif isinstance(layer, nn.Embedding):
            layer.weight.normal_(0, 0.1, generator=rng)


def plain_networks() -> None:
    models.ARCHITECTURES["plain"] = Architecture(
        generator=lambda model, spec: PlainGenerator(
            channels=spec.channels, width=model.width, latent_dim=model.latent_dim, class_counts=spec.class_counts
        ),
        discriminator=lambda model, spec: PlainDiscriminator(
            channels=spec.channels, width=model.width, classes=len(spec.class_counts)
        ),
        initialise=he_scaled,
    )


def float64() -> None:
    torch.set_default_dtype(torch.float64)


class Cubic:
    """A made-up loss, paired: |l(x) - l(G(z)) - 1|^3."""

    paired = True
    probability = False
    needs_lipschitz = False
    zero_decides = False

    def discriminator(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        return (real_logits - fake_logits - 1).abs().pow(3).mean()

    def generator(self, fake_logits: Tensor, real_logits: Tensor | None) -> Tensor:
        assert real_logits is not None
        return (fake_logits - real_logits - 1).abs().pow(3).mean()

    def score(self, logits: Tensor) -> Tensor:
        return logits.mean()


def cubic_loss() -> None:
    losses.LOSSES["cubic"] = Cubic


def slope_penalty() -> None:
    """A made-up penalty: the mean absolute slope, at real images and at fakes, out of the loss's own graphs."""
    absolute = lambda gradient: gradient.abs().sum((1, 2, 3))  # noqa: E731
    penalties.PENALTIES["slope"] = Penalty("real", absolute, 0.5)
    penalties.PENALTIES["slope_of_fakes"] = Penalty("fake", absolute, 0.5)


# Observers ------------------------------------------------------------------------------------------------------------


def note_tf32(path: Path) -> None:
    """Writes whether cuDNN may round to TF32 in the steps."""
    register_optimizer_step_post_hook(lambda *_: path.write_text(json.dumps(torch.backends.cudnn.allow_tf32)))


# Faults ---------------------------------------------------------------------------------------------------------------


def slow_to_prepare(rank: int, seconds: float) -> None:
    """A rank whose machine is still preparing its images for longer than torch's ranks wait for each other, unasked."""
    torch.distributed.distributed_c10d.default_pg_timeout = timedelta(seconds=seconds / 3)
    if os.environ.get("RANK") == str(rank):
        time.sleep(seconds)


def signal_while_preparing(rank: int, number: int) -> None:
    """Has one rank receive a signal before there is a process group."""
    load = data.load

    def signalled(*args: object, **options: object) -> object:
        os.kill(os.getpid(), number)
        return load(*args, **options)

    if os.environ.get("RANK") == str(rank):
        data.load = signalled


def same_images_on_all_ranks() -> None:
    data.Feed._real = _of_first_share(data.Feed._real)


def same_latents_on_all_ranks() -> None:
    latents = seeding.latents

    def of_first_share(*args: object, share: slice, **options: object) -> Tensor:
        return latents(*args, share=slice(0, share.stop - share.start), **options)

    seeding.latents = of_first_share


def _of_first_share(method: Callable) -> Callable:
    def of_first_share(feed: data.Feed, *args: object) -> object:
        (share,), shares = feed._shares, feed._shares
        feed._shares = [slice(0, share.stop - share.start)]
        try:
            return method(feed, *args)
        finally:
            feed._shares = shares

    return of_first_share


# The one seam: what happens before the first step of a start, and around what is due after each.


def at_the_beginning(action: Callable[[Housekeeping], None]) -> None:
    """Does something with the run before its state is restored."""
    begin = train.begin
    train.begin = lambda run: (action(run), begin(run))[1]


def around_each_step(around: Callable[[Housekeeping, int, Callable[[], int]], int]) -> None:
    """Replaces what is due after a step by `around(run, step, what is due)`."""
    after = train.after_step
    train.after_step = lambda run, step: around(run, step, lambda: after(run, step))


def signal_at(step: int, rank: int, number: int) -> None:
    """Has one rank receive a signal at the end of a step."""
    at_the_end_of(step, rank, lambda: os.kill(os.getpid(), number))


def at_the_end_of(step: int, rank: int, action: Callable[[], None]) -> None:
    """Has one rank do something at the end of a step, before what is due then."""

    def eventful(run: Housekeeping, at: int, due: Callable[[], int]) -> int:
        if (at, run.ranks.rank) == (step, rank):
            action()
        return due()

    around_each_step(eventful)


def slow_alone_then_slow_step(alone: float, step: float) -> None:
    """Rank zero takes its time over the samples of step 3, and every rank over the step after."""
    samples = tracking.Tracker.samples
    tracking.Tracker.samples = lambda *args, **options: (time.sleep(alone), samples(*args, **options))
    for rank in range(2):
        at_the_end_of(4, rank, lambda: time.sleep(step))


def sleep_at(step: int, rank: int) -> None:
    at_the_end_of(step, rank, lambda: time.sleep(1000))


def fail_at(step: int, rank: int) -> None:
    """The fault that a rank meets alone, as when its GPU's memory does not suffice."""

    def fail() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    at_the_end_of(step, rank, fail)


def fail_while_resuming(rank: int) -> None:
    """As where one machine cannot read the run's folder."""

    def failing(run: Housekeeping) -> None:
        if run.ranks.rank == rank:
            raise PermissionError(13, "Permission denied", "state.json")

    at_the_beginning(failing)


def full_disk_between(first: int, last: int, folder: Path) -> None:
    """Fills the disk of a folder to the last byte at the end of a step, and makes room again at the end of another."""
    filler = folder / "filler"

    def fill() -> None:
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as stream:
            while True:
                stream.write(bytes(4096))

    at_the_end_of(first, 0, fill)
    at_the_end_of(last, 0, filler.unlink)


def saving_needs_steps(count: int) -> None:
    """A disk so slow that a checkpoint is on it only when training has gone on for some steps."""
    save, so_far = checkpoint.save, []

    def counted(run: Housekeeping, step: int, due: Callable[[], int]) -> int:
        so_far.append(step)
        return due()

    def slow(root: Path, step: int, *args: object) -> Path:
        deadline = time.monotonic() + 20
        while max(so_far) < min(step + count, 11):  # of TINY's 11
            assert time.monotonic() < deadline, f"training stands still while step {step} is saved"
            time.sleep(0.001)
        return save(root, step, *args)

    checkpoint.save = slow
    around_each_step(counted)


def another_recipe(rank: int, *overrides: str) -> None:
    """A rank that was started with another command."""
    parse = train.recipe.parse
    if os.environ.get("RANK") == str(rank):
        train.recipe.parse = lambda argv: parse([*argv, *overrides])


def another_torch(rank: int) -> None:
    if os.environ.get("RANK") == str(rank):
        versions = train.launch.versions()
        train.launch.versions = lambda: {**versions, "torch": "1.0.0"}


def other_images(rank: int = 0) -> None:
    """A rank, or the only one, that finds other pictures."""
    load = data.load
    if os.environ.get("RANK", "0") == str(rank):
        data.load = lambda config, **options: dataclasses.replace(load(config, **options), fingerprint="of others")


def cpu_scaler(overflow_at: int | None = None) -> None:
    """fp16's loss scaler on the CPU, its scale growing every other step; D's gradient overflows in one step."""

    class Scaled(train.Ranks):
        def join(self, *args: object, **options: object) -> None:
            super().join(*args, **options)
            self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=4)

    def overflowing(run: Housekeeping) -> None:
        (first, *_) = run.state.discriminator.parameters()
        first.register_hook(lambda grad: grad * torch.inf if run.state.step + 1 == overflow_at else grad)

    train.Ranks = Scaled
    at_the_beginning(overflowing)


def forget_moments() -> None:
    """A checkpoint without Adam's first moments."""
    slots = checkpoint.Slots.state_dict
    checkpoint.Slots.state_dict = lambda self: {n: t for n, t in slots(self).items() if not n.endswith("exp_avg")}


def forget_the_meter() -> None:
    algorithm.Meter.load_state = lambda *args: None


def nan_at(step: int, rank: int) -> None:
    """One rank's gradient of G is not a number in one step, unless the learning rate was lowered."""

    def poisoned(run: Housekeeping) -> None:
        if run.ranks.rank == rank:
            (first, *_) = run.state.generator.parameters()
            first.register_hook(
                lambda grad: grad * torch.nan if run.state.step + 1 == step and not run.seed.attempt else grad
            )

    at_the_beginning(poisoned)


def spoilt_at(step: int) -> None:
    """The generator's weights are NaN at the end of a step, in the first attempt."""

    def spoilt(run: Housekeeping, at: int, due: Callable[[], int]) -> int:
        if at == step and not run.seed.attempt:
            next(run.state.generator.parameters()).data.fill_(torch.nan)
        return due()

    around_each_step(spoilt)


def plain_generator() -> None:
    """BigGAN without spectral norm in the generator."""
    models.ARCHITECTURES["biggan"] = dataclasses.replace(models.ARCHITECTURES["biggan"], g_spectral=False)


def unsettled_buckets() -> None:
    algorithm.settle_gradient_buckets = lambda passes: None


def unfrozen_discriminator() -> None:
    algorithm.frozen = contextlib.nullcontext


def only_one_learns(name: str, *, after: int, attempts: int = 1) -> None:
    """From a step on the other network's rate is next to nothing, in the first attempts; later ones are healthy."""

    def unequal(run: Housekeeping, at: int, due: Callable[[], int]) -> int:
        step = due()
        for network in run.rates.base:
            faulty = step >= after and run.seed.attempt < attempts and network != name
            run.rates.base[network] = run.config.optim.lr * (1e-9 if faulty else 1)
        return step

    around_each_step(unequal)


def slow_extractor(rank: int, seconds: float) -> None:
    """A rank that takes long over each batch that it looks at."""
    forward = evaluation.Classifier.forward

    def slow(self: evaluation.Classifier, images: Tensor) -> tuple[Tensor, Tensor]:
        time.sleep(seconds)
        return forward(self, images)

    if os.environ.get("RANK") == str(rank):
        evaluation.Classifier.forward = slow


def another_cache(folder: Path) -> None:
    os.environ["XDG_CACHE_HOME"] = str(folder)


def other_chunks(size: int) -> None:
    """Images go through generator and extractor in batches of another size."""
    models.layers.CHUNK = evaluation.CHUNK = size


# Counters: each wraps the loop's steps and writes what one step did to a file per rank --------------------------------

# Whatever makes the host wait for the device, at the Python level; on a CPU most of these leave no trace in ATen.
_SYNCHRONISING = {
    *("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__", "__array__", "nonzero"),
    *("__contains__", "is_nonzero", "equal", "allclose", "unique", "masked_select"),
}


class _HostSyncs(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.paused = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in _SYNCHRONISING and not self.paused:
            self.counts[func.__name__] += 1
        return func(*args, **(kwargs or {}))


class _AtenCounts(TorchDispatchMode):
    """Synchronising ATen operations; how often each kind of collective is called, and the bytes it is given; FLOPs.

    torch's own FlopCounterMode cannot be entered by torch.autograd.grad, as penalties call it.
    """

    def __init__(self, syncs: _HostSyncs) -> None:
        super().__init__()
        self.syncs = syncs
        self.wire: Counter[str] = Counter()
        self.collectives: Counter[str] = Counter()
        self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "equal", "masked_select") and not self.syncs.paused:
            self.syncs.counts[name] += 1
        if func.namespace == "c10d":
            self.collectives[name] += 1
            self.wire[name] += sum(t.nbytes for t in tree_leaves(args) if isinstance(t, Tensor))
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in flop_registry:
            self.flops += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


class _Counter:
    """Counts one step, from the end of the one before: what is due at every step included."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def begin(self, run: Housekeeping) -> None:
        networks = {"generator": run.state.generator, "discriminator": run.state.discriminator}
        self._networks = networks
        self._counts: dict = {"forwards": Counter(), "gradients": {name: Counter() for name in networks}}
        self._syncs = _HostSyncs()
        # Adam on the CPU reads its own step counts; it is not ours.
        register_optimizer_step_pre_hook(lambda *_: setattr(self._syncs, "paused", True))
        register_optimizer_step_post_hook(lambda *_: setattr(self._syncs, "paused", False))
        for name, network in networks.items():
            network.register_forward_hook(lambda *_, name=name: self._counts["forwards"].update([name]))
            for parameter_name, parameter in network.named_parameters():
                parameter.register_post_accumulate_grad_hook(
                    lambda _, name=name, p=parameter_name: self._counts["gradients"][name].update([p])
                )

    def after(self, run: Housekeeping, step: int, due: Callable[[], int]) -> int:
        if step == 2:  # steady by now: count one whole step, from here to the next end of a step
            step = due()
            self._counts["forwards"].clear()
            for counts in self._counts["gradients"].values():
                counts.clear()
            self._modes = contextlib.ExitStack()
            self._modes.enter_context(self._syncs)
            self._aten = self._modes.enter_context(_AtenCounts(self._syncs))
        elif step == 3:
            left = [p for p in self._networks["discriminator"].parameters() if p.grad is not None]
            step = due()
            self._modes.close()
            self._counts |= {
                "flops": self._aten.flops,
                "host syncs": self._syncs.counts,
                "wire": self._aten.wire,
                "gradient bytes": sum(p.nbytes for network in self._networks.values() for p in network.parameters()),
                "collectives": self._aten.collectives,
                "discriminator gradients left": len(left),
            }
            Path(f"{self._path}.{run.ranks.rank}").write_text(json.dumps(self._counts))
        else:
            step = due()
        return step


def count_step(path: Path) -> None:
    counter = _Counter(path)
    at_the_beginning(counter.begin)
    around_each_step(counter.after)


def chatty_meter() -> None:
    algorithm.Meter = _ChattyMeter


class _ChattyMeter(algorithm.Meter):
    def add(self, scalars: dict[str, Tensor], weight: float = 1.0) -> None:
        assert all(value.item() < 1e9 for value in scalars.values())
        super().add(scalars, weight)


def count_replays(path: Path) -> None:
    """Writes how often a CUDA graph was replayed."""
    replay, count = capture.CudaGraph.replay, itertools.count(1)

    def counted(graph: capture.CudaGraph) -> None:
        replay(graph)
        path.write_text(str(next(count)))

    capture.CudaGraph.replay = counted


def forbid_cuda_synchronisation() -> None:
    def strict(run: Housekeeping, step: int, due: Callable[[], int]) -> int:
        step = due()
        torch.cuda.set_sync_debug_mode("error" if 1 < step < run.until - 1 else "default")
        return step

    around_each_step(strict)

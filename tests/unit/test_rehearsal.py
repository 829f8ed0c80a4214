"""Every recipe's step at full width, without arithmetic: nothing is left on the CPU, nothing waits, and its memory."""

import contextlib

import pytest
import torch
from support.runs import REPOSITORY
from torch.overrides import TorchFunctionMode

from distgan import recipe
from distgan.data import Images
from distgan.models import ImageSpec
from distgan.objective.losses import LOSSES
from distgan.run import rehearsal
from distgan.run.rehearsal import Rehearsal, memory

RECIPES = sorted(path.stem for path in (REPOSITORY / "configs").glob("*.yaml") if path.stem != "sweep")
META = torch.device("meta")


class LogPoint(TorchFunctionMode):
    """Counts how often the host waits, and gives it zeros instead of numbers."""

    def __init__(self):
        super().__init__()
        self.waits = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.tolist, torch.Tensor.item, torch.Tensor.__float__):
            self.waits += 1
            return torch.zeros(args[0].shape).tolist()
        return func(*args, **(kwargs or {}))


def parsed(name, *overrides):
    return recipe.parse(["--config", str(REPOSITORY / "configs" / f"{name}.yaml"), "--run.dir=run", *overrides])[0]


def materials(c, count=50_000):
    spec = ImageSpec(
        image_size=c.data.image_size, channels=3, class_counts=(count // 10,) * 10 if c.model.conditional else ()
    )
    images = Images(
        pixels=torch.zeros(1, dtype=torch.uint8).expand(count, 3, *c.data.size),
        labels=torch.zeros(count, dtype=torch.int64),
        classes=tuple("abcdefghij"),
        fingerprint="",
        skipped=0,
        plain=0,
        scale=None,
        folder=None,
    )
    return images, spec


@pytest.fixture(autouse=True)
def what_meta_lacks(monkeypatch):
    """Pinned memory, autocast and fused Adam."""
    autocast, adam = torch.autocast, torch.optim.Adam

    def on_meta(device, *args, **options):
        return contextlib.nullcontext() if device == "meta" else autocast(device, *args, **options)

    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(torch, "autocast", on_meta)
    monkeypatch.setattr(torch.optim, "Adam", lambda *args, fused, **options: adam(*args, **options))


def step_on_meta(c):
    images, spec = materials(c)
    return Rehearsal(c, spec).begin(images, device=META)


@pytest.mark.parametrize("name", RECIPES)
def test_a_step_leaves_nothing_on_the_cpu_and_waits_for_nothing_until_the_log_point(name):
    step = step_on_meta(parsed(name, "--data.placement=device"))
    for number in range(2):
        step(number)
    with LogPoint() as log_point:
        assert set(step.meter.means()) == set(step.meter._names)
        assert all(isinstance(value, float) for value in step.schedules.now.values())
    assert log_point.waits == 1
    step(2)


def test_images_in_the_hosts_memory_come_over_without_waiting():
    step_on_meta(parsed("cifar10_dcgan", "--data.placement=host"))(0)


def test_what_is_left_on_the_cpu_is_seen(monkeypatch):
    hinge, target = LOSSES["hinge"], torch.ones(1)
    monkeypatch.setattr(hinge, "generator", lambda self, fake, real: (target - fake).mean())
    with pytest.raises(RuntimeError, match="device"):
        step_on_meta(parsed("cifar10_sngan"))(0)


def test_waiting_within_a_step_is_seen(monkeypatch):
    hinge = LOSSES["hinge"]
    generator = hinge.generator
    monkeypatch.setattr(
        hinge,
        "generator",
        lambda self, fake, real: generator(self, fake, real) * (0 if fake.mean().item() > 1e9 else 1),
    )
    with pytest.raises(RuntimeError, match="item"):
        step_on_meta(parsed("cifar10_sngan"))(0)


NARROW = ["--model.width=8", "--train.batch_size=8", "--train.precision=fp32"]


@pytest.mark.parametrize("name", ["cifar10_dcgan", "cifar10_wgan_gp", "cifar10_biggan"])
def test_the_memory_of_a_step_is_what_the_same_step_takes_with_numbers(name):
    c = parsed(name, *NARROW)
    images, spec = materials(c, count=100)
    need = memory(c, images, spec, world=1)
    with rehearsal._Account() as account:
        images = rehearsal.replace(images, pixels=images.pixels.clone(), labels=images.labels.clone())
        parts = Rehearsal(c, spec)
        step = parts.begin(images, device=torch.device("cpu"))
        for _ in range(2):
            step(0)
    networks = parts.generator, parts.discriminator
    assert need.moments == 8 * sum(p.numel() for network in networks for p in network.parameters())
    assert need.gradients == 4 * max(sum(p.numel() for p in network.parameters()) for network in networks)
    assert need.images == 100 * 3 * 32 * 32
    assert need.total == pytest.approx(account.most, rel=0.01)


def test_a_larger_batch_needs_more_and_more_processes_need_less():
    c, larger = (parsed("cifar10_dcgan", *NARROW, f"--train.batch_size={batch}") for batch in (64, 128))
    images, spec = materials(c, count=1000)
    alone, shared = (memory(c, images, spec, world=world) for world in (1, 2))
    assert shared.graph == pytest.approx(alone.graph / 2, rel=0.1)
    assert memory(larger, images, spec, world=2).graph == alone.graph
    assert shared.weights == alone.weights
    assert shared.gradients == shared.moments / 2 > alone.gradients  # DDP keeps those of both networks


def test_mixed_precision_needs_less_for_activations():
    c, narrow = (parsed("cifar10_dcgan", "--train.batch_size=64", f"--train.precision={p}") for p in ("fp32", "bf16"))
    images, spec = materials(c, count=100)
    full, half = (memory(one, images, spec, world=1).graph for one in (c, narrow))
    assert 0.4 * full < half < 0.9 * full


def test_an_account_is_of_what_is_alive():
    with rehearsal._Account() as account:
        a = torch.zeros(1000)
        b = a * 2
        view = b.view(10, 100)
        del b
        assert account.most == 8000
        del view
        c = a + 1
        assert account.most == 8000
        d = c + 1
    assert account.most == 12000 and d.numel() == 1000

"""Every recipe's step at full width, without arithmetic: nothing is left on the CPU, nothing waits, and its memory."""

import contextlib
import dataclasses

import pytest
import torch
from support.runs import REPOSITORY
from support.steps import materials, networks
from torch.overrides import TorchFunctionMode

from distgan import recipe, train
from distgan.objective.losses import LOSSES
from distgan.run import rehearsal
from distgan.run.rehearsal import memory, rehearsed

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


@pytest.fixture
def on_meta(monkeypatch):
    """Replaces what there is not on meta: pinned memory, autocast and fused Adam."""
    autocast, adam = torch.autocast, torch.optim.Adam

    def none(device, *args, **options):
        return contextlib.nullcontext() if device == "meta" else autocast(device, *args, **options)

    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(torch, "autocast", none)
    monkeypatch.setattr(rehearsal, "_in_bf16", lambda forward, *inputs: forward(*inputs))
    monkeypatch.setattr(torch.optim, "Adam", lambda *args, fused, **options: adam(*args, **options))


def step_on_meta(c):
    images, spec = materials(c)
    return rehearsed(c, images, **networks(c, spec), device=META)


@pytest.mark.usefixtures("on_meta")
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


@pytest.mark.usefixtures("on_meta")
def test_images_in_the_hosts_memory_come_over_without_waiting():
    step_on_meta(parsed("cifar10_dcgan", "--data.placement=host"))(0)


def test_what_is_left_on_the_cpu_is_seen(on_meta, monkeypatch):
    hinge, target = LOSSES["hinge"], torch.ones(1)
    monkeypatch.setattr(hinge, "generator", lambda self, fake, real: (target - fake).mean())
    with pytest.raises(RuntimeError, match="device"):
        step_on_meta(parsed("cifar10_sngan"))(0)


def test_waiting_within_a_step_is_seen(on_meta, monkeypatch):
    hinge = LOSSES["hinge"]
    generator = hinge.generator
    monkeypatch.setattr(
        hinge,
        "generator",
        lambda self, fake, real: generator(self, fake, real) * (0 if fake.mean().item() > 1e9 else 1),
    )
    with pytest.raises(RuntimeError, match="item"):
        step_on_meta(parsed("cifar10_sngan"))(0)


NARROW = ["--model.width=8", "--train.batch_size=8"]


def need(c, images, spec, world=1):
    return memory(c, images, world=world, **networks(c, spec))


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("cifar10_dcgan", []),
        ("cifar10_dcgan", ["--train.precision=bf16", "--loss.name=relativistic"]),
        ("cifar10_wgan_gp", []),
        ("cifar10_biggan", ["--train.d_steps=1"]),
    ],
)
def test_the_memory_of_a_step_is_what_the_same_step_takes_with_numbers(monkeypatch, name, overrides):
    c = parsed(name, *NARROW, *overrides)
    images, spec = materials(c, count=100)
    with_numbers = dataclasses.replace(images, pixels=images.pixels.clone(), labels=images.labels.clone())
    parts = networks(c, spec)
    monkeypatch.setattr(rehearsal._OnlyRank, "place", lambda *args, **options: None)
    with rehearsal._Account() as account:
        kept = [parts["generator"], parts["discriminator"], parts["average"].generator]
        for network in kept:
            for tensor in network.state_dict().values():
                tensor.view(-1) if tensor.is_contiguous() else tensor.permute(0, 2, 3, 1)  # the account sees it so
        step = rehearsed(c, with_numbers, **parts, device=torch.device("cpu"))
        for _ in range(2):
            step(0)
    monkeypatch.undo()
    found = need(c, images, spec)
    counts = [sum(p.numel() for p in network.parameters()) for network in kept[:2]]
    assert found.moments == 8 * sum(counts)
    assert found.gradients == 4 * max(counts)
    assert found.images == 100 * 3 * 32 * 32
    taken = found.weights + found.activations + found.moments + found.gradients
    assert taken == pytest.approx(account.most, rel=0.02)


def test_activations_are_those_that_the_backward_passes_need():
    """Counted by hand, for D's update of two passes: what each layer keeps, and at the end the gradients on the way."""
    c = parsed("cifar10_dcgan", "--model.width=8", "--train.batch_size=500", "--model.d_norm=none")
    images, spec = materials(c, count=1000)
    n, maps_of_D = 500, [8 * 16 * 16, 16 * 8 * 8, 32 * 4 * 4]
    picture = 3 * 32 * 32
    maps_of_G = [2 * 32 * 4 * 4, 2 * 16 * 8 * 8, 2 * 8 * 16 * 16, picture]  # before and after batch norm; ReLU in place
    least = 4 * n * (sum(maps_of_G) + 2 * sum(maps_of_D) + picture)
    assert least < need(c, images, spec).activations < 1.6 * least


def test_a_larger_batch_needs_more_and_more_processes_need_less():
    c, larger = (parsed("cifar10_dcgan", "--model.width=8", f"--train.batch_size={batch}") for batch in (64, 128))
    images, spec = materials(c, count=1000)
    alone, shared = (need(c, images, spec, world) for world in (1, 2))
    assert shared.activations == pytest.approx(alone.activations / 2, rel=0.1)
    assert need(larger, images, spec, 2).activations == alone.activations
    assert shared.weights == alone.weights
    assert shared.gradients == shared.moments / 2 > alone.gradients  # DDP keeps those of both networks


def test_in_mixed_precision_both_halves_of_a_step_need_less():
    full, half = (parsed("cifar10_dcgan", "--train.batch_size=64", f"--train.precision={p}") for p in ("fp32", "bf16"))
    images, spec = materials(full, count=100)
    assert 0.5 * need(full, images, spec).activations < need(half, images, spec).activations
    assert need(half, images, spec).activations < 0.75 * need(full, images, spec).activations


@pytest.mark.parametrize(("placement", "kept"), [("auto", True), ("device", True), ("host", False), ("disk", False)])
def test_images_count_where_they_are_on_the_gpu(placement, kept):
    c = parsed("cifar10_dcgan", *NARROW, f"--data.placement={placement}")
    images, spec = materials(c, count=1000)
    assert need(c, images, spec).images == kept * 1000 * 3 * 32 * 32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("cifar10")])
def test_the_memory_of_a_step_agrees_with_a_gpu(tmp_path, name):
    """Within 10%, at full width, of what torch allocates there for the program itself."""
    c = parsed(name, "--data.source=digits", "--data.channels=3", "--data.placement=host")
    found = need(c, *materials(c, count=1797))
    argv = ["--config", str(REPOSITORY / "configs" / f"{name}.yaml"), "--data.source=digits", "--data.channels=3"]
    argv += ["--data.placement=host", f"--run.dir={tmp_path}", "--train.steps=5", "--optim.schedule=constant"]
    argv += ["--track.to=none", "--eval.every=null"]
    torch.cuda.reset_peak_memory_stats()
    train.train(recipe.parse(argv)[0])
    expected = found.weights + found.moments + found.gradients + found.activations
    assert torch.cuda.max_memory_allocated() == pytest.approx(expected, rel=0.1)


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

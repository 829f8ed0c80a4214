"""A minimal step, counted: host synchronisations, forwards, gradients, FLOPs, bytes on the wire."""

import functools
import json

import pytest
import torch
from support.programs import (
    chatty_meter,
    count_step,
    launch,
    plain_generator,
    plain_networks,
    unfrozen_discriminator,
)
from support.runs import TINY, VARIANTS
from torch.utils.flop_counter import FlopCounterMode

from distgan import models, recipe
from distgan.objective.ada import NUMBERS, PIPELINES
from distgan.recipe import ModelConfig
from distgan.storage import tensors

STEPS = 4
FLAGS = 12  # bytes, on a CPU group of their own, read a step later
QUIET = [*TINY, "--track.log_every=100", "--track.sample_every=100", "--checkpoint.every=100", f"--train.steps={STEPS}"]


def counted(tmp_path, *extra, world=1, d_steps=1):
    counts = tmp_path / "counts.json"  # each rank adds its number
    faults = [fault for fault in extra if callable(fault)]
    argv = [*QUIET, f"--run.dir={tmp_path / 'run'}", f"--train.d_steps={d_steps}"]
    argv += [override for override in extra if isinstance(override, str)]
    assert launch(argv, world=world, setups=[functools.partial(count_step, counts), *faults]) == [0] * world
    return [json.loads((tmp_path / f"counts.json.{rank}").read_text()) for rank in range(world)]


@pytest.mark.parametrize("d_steps", [1, 3])
def test_a_step_does_nothing_twice(tmp_path, d_steps):
    (step,) = counted(tmp_path, d_steps=d_steps)
    assert step["host syncs"] == {}
    assert step["forwards"] == {"generator": d_steps, "discriminator": 2 * d_steps + 1}
    # One gradient per parameter and update: D's from its own steps alone.
    assert set(step["gradients"]["generator"].values()) == {1}
    assert set(step["gradients"]["discriminator"].values()) == {d_steps}
    assert step["discriminator gradients left"] == 0
    G, G1, D, D1 = flops_by_hand(width=4, latent_dim=8, batch=12)
    # The design's formula, 8 D + 3 G - 2 D1 - G1, with the further D steps: each 6 D - 2 D1, and a G forward.
    assert step["flops"] == 8 * D + 3 * G - 2 * D1 - G1 + (d_steps - 1) * (6 * D - 2 * D1 + G)


def test_what_a_wasteful_step_does_would_be_seen(tmp_path):
    (step,) = counted(tmp_path, unfrozen_discriminator, chatty_meter)
    G, G1, D, D1 = flops_by_hand(width=4, latent_dim=8, batch=12)
    assert step["flops"] > 8 * D + 3 * G - 2 * D1 - G1
    assert set(step["gradients"]["discriminator"].values()) == {2}
    assert step["discriminator gradients left"] > 0
    assert step["host syncs"]["item"] == 5  # one for each of the meter's values


def test_each_gradient_crosses_the_wire_once(tmp_path):
    G, D = models.build(ModelConfig(width=4, latent_dim=8), models.ImageSpec(image_size=32, channels=1), seed=0)
    gradients = 4 * sum(p.numel() for network in (G, D) for p in network.parameters())
    (tmp_path / "plain").mkdir()
    for step in counted(tmp_path / "plain", "--model.sync_batchnorm=false", world=2):
        assert step["host syncs"] == {}
        assert step["wire"] == {"allreduce_": gradients + FLAGS}
        plain = step["collectives"]["allreduce_"]
    # Batch norm, synchronised: one gather per layer and pass through it in training, forward or backward.
    in_G, in_D, passes_G = 3, 2, 2
    for loss, passes_D in (("non_saturating", 6), ("relativistic", 7)):
        (tmp_path / loss).mkdir()
        for step in counted(tmp_path / loss, f"--loss.name={loss}", world=2):
            assert step["host syncs"] == {}
            assert step["collectives"] == {"allreduce_": plain, "_allgather_base_": in_G * passes_G + in_D * passes_D}


@pytest.mark.parametrize("world", [1, 2])
def test_accumulation_costs_one_more_forward_of_the_generator_and_nothing_on_the_wire(tmp_path, world):
    pieces = 4 // world
    G, G1, D, D1, _ = plain_flops(12 // world)
    for step in counted(tmp_path, *PLAIN, "--train.max_batch_per_device=3", plain_networks, world=world):
        assert step["host syncs"] == {}
        assert step["forwards"] == {"generator": 2 * pieces, "discriminator": 3 * pieces}
        assert step["wire"] == ({"allreduce_": step["gradient bytes"] + 12} if world > 1 else {})
        assert step["flops"] == 8 * D + 4 * G - 2 * D1 - G1


def test_compressed_gradients_are_half_as_many_bytes_and_nearly_the_same(tmp_path):
    sent, moments = {}, {}
    for kind in ("none", "bf16"):
        (tmp_path / kind).mkdir()
        overrides = ["--model.sync_batchnorm=false", f"--train.compress={kind}"]
        run = tmp_path / kind / "run"
        assert launch([*QUIET, *overrides, f"--run.dir={run}", "--run.stop_at=1"], world=2) == [0, 0]
        for step in counted(tmp_path / kind, *overrides, world=2):
            assert step["host syncs"] == {}
            sent[kind] = step["wire"]["allreduce_"] - FLAGS
        first = run / "checkpoints" / "step_00000001"
        moments[kind] = tensors.read(first / "discriminator_optimizer.safetensors")  # of the first update of all
    assert sent["bf16"] == sent["none"] / 2
    for name, exact in moments["none"].items():
        if name.endswith("exp_avg"):
            error = (moments["bf16"][name] - exact).norm()
            assert 0 < error < 2**-8 * exact.norm(), name  # bf16 has 8 bits, and rounds to the nearest


PLAIN = ["--model.architecture=plain", "--model.width=4"]


def plain_flops(batch, w=4):
    """Of one forward pass: G, its first layer, D, its first and its last."""
    G1, G2, G3 = (2 * batch * n for n in (8 * 64 * w, 16 * w * w * 64, 16 * w * 256))
    D1, D2, D3 = (2 * batch * n for n in (16 * w * 256, 16 * w * w * 64, 64 * w))
    return G1 + G2 + G3, G1, D1 + D2 + D3, D1, D3


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(
    ("overrides", "forwards", "extra"),
    [
        (["--loss.name=least_squares"], 0, lambda D, D1, Dn, G1: 0),
        (["--loss.name=hinge"], 0, lambda D, D1, Dn, G1: 0),
        (["--loss.name=relativistic"], 1, lambda D, D1, Dn, G1: D),
        (["--loss.name=wasserstein", "--optim.clip_weights=0.1"], 0, lambda D, D1, Dn, G1: 0),
        (["--loss.name=wasserstein", "--penalty.name=wgan_gp"], 1, lambda D, D1, Dn, G1: 6 * D - 3 * Dn),
        (["--penalty.name=r1"], 0, lambda D, D1, Dn, G1: 3 * D + D1 - Dn),
        (["--penalty.name=r2"], 0, lambda D, D1, Dn, G1: 3 * D + D1 - Dn),
        (["--penalty.name=r1,r2"], 0, lambda D, D1, Dn, G1: 6 * D + 2 * D1 - 2 * Dn),
        (
            ["--penalty.name=r1,r2", "--penalty.every=5"],
            0,
            lambda D, D1, Dn, G1: 0,
        ),  # not due at the step that is counted
        (["--augment.policy=color,translation,cutout"], 0, lambda D, D1, Dn, G1: 0),
        (["--model.conditional=true"], 0, lambda D, D1, Dn, G1: G1),  # the embedding's gradient flows through it
        (["--penalty.name=r1", "--train.precision=bf16"], 1, lambda D, D1, Dn, G1: 6 * D - 3 * Dn),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_losses_penalties_and_augmentation_cost_what_they_say(tmp_path, overrides, forwards, extra, world):
    G, G1, D, D1, Dn = plain_flops(12 // world)
    for step in counted(tmp_path, *PLAIN, plain_networks, *overrides, world=world):
        assert step["host syncs"] == {}
        assert step["forwards"] == {"generator": 1, "discriminator": 3 + forwards}
        assert step["wire"] == ({"allreduce_": step["gradient bytes"] + 12} if world > 1 else {})
        assert set(step["gradients"]["discriminator"].values()) == {1}
        assert step["flops"] == 8 * D + 3 * G - 2 * D1 - G1 + extra(D, D1, Dn, G1)


def test_a_batch_of_the_generators_own_costs_one_more_forward_of_the_generator(tmp_path):
    G, G1, D, D1, _ = plain_flops(12)
    (step,) = counted(tmp_path, *PLAIN, plain_networks, "--train.g_batch=own")
    assert step["host syncs"] == {}
    assert step["forwards"] == {"generator": 2, "discriminator": 3}
    assert step["flops"] == 8 * D + 4 * G - 2 * D1 - G1


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("variant", ["biggan-labels-ada", "biggan-own-batch", "r3gan-labels-ramps", "r3gan"])
def test_biggan_r3gan_ada_and_ramps_wait_for_nothing_and_send_only_gradients(tmp_path, variant, world):
    """And batch norm's statistics: one gather per layer and pass through it, forward or backward. Of two updates of D,
    the fakes of the second are kept; a batch of its own is drawn with a graph only for the generator."""
    d_steps = 2 if variant == "biggan-labels-ada" else 1
    own, pieces = "own" in variant or "ramps" in variant, {1: 4, 2: 2}[world] if variant == "r3gan" else 1
    for step in counted(tmp_path, *VARIANTS[variant], world=world, d_steps=d_steps):
        assert step["host syncs"] == {}
        assert step["discriminator gradients left"] == 0
        passes_of_G = (d_steps + own) * pieces if pieces == 1 else 2 * pieces
        paired = "ramps" in variant
        assert step["forwards"] == {"generator": passes_of_G, "discriminator": (2 * d_steps + 1 + paired) * pieces}
        assert set(step["gradients"]["generator"].values()) == {pieces}
        assert set(step["gradients"]["discriminator"].values()) == {d_steps * pieces}
        if world == 1:
            assert step["wire"] == {}
            continue
        parameters = {name: 4 * sum(counts) for name, counts in sizes_of(variant).items()}
        gradients = parameters["generator"] + d_steps * parameters["discriminator"]
        assert step["wire"]["allreduce_"] == gradients + 12
        layers = 7 if "biggan" in variant else 0
        assert step["collectives"].get("_allgather_base_", 0) == layers * (passes_of_G + 1)


def sizes_of(variant):
    """The numbers of parameters of both networks."""
    c = recipe.parse([*TINY, *VARIANTS[variant], "--run.dir=run"])[0]
    counts = (178,) * 10 if c.model.conditional else ()
    networks = models.build(c.model, models.ImageSpec(image_size=32, channels=1, class_counts=counts), seed=0)
    return {
        name: [p.numel() for p in network.parameters()]
        for name, network in zip(("generator", "discriminator"), networks, strict=True)
    }


def test_spectral_norm_of_a_generator_costs_what_it_says(tmp_path):
    """Passes with and without it differ by s = u^T W v and what its gradient needs; and there are iterations."""
    counts = []
    for name, faults in (("with", []), ("without", [plain_generator])):
        (tmp_path / name).mkdir()
        (step,) = counted(tmp_path / name, *VARIANTS["biggan-own-batch"], *faults)
        counts.append(step["flops"])
    model = recipe.parse([*TINY, *VARIANTS["biggan-own-batch"], "--run.dir=run"])[0].model
    G, _ = models.build(model, models.ImageSpec(image_size=32, channels=1), seed=0)
    shapes = [p.flatten(1).shape for name, p in G.named_parameters() if name.endswith("original")]
    whole, columns = sum(r * c for r, c in shapes), sum(c for _, c in shapes)
    # One pass without a gradient, one with, where it is v^T times what u^T W is; a power iteration of G, one of the
    # average.
    assert counts[0] - counts[1] == (2 * whole + 2 * columns) + (4 * whole + 4 * columns) + 2 * 4 * whole


def test_adas_pipeline_costs_what_one_pass_of_it_says(tmp_path):
    """Against torch's own count of a pass: real images and fakes in D's half, fakes and their gradient in G's."""
    counts = []
    for policy in ([], ["--augment.policy=ada", "--augment.probability=0.5"]):
        folder = tmp_path / str(len(policy))
        folder.mkdir()
        (step,) = counted(folder, *PLAIN, plain_networks, *policy)
        counts.append(step["flops"])
    x, u = torch.zeros(12, 1, 32, 32, requires_grad=True), torch.full((12, NUMBERS), 0.5)
    with FlopCounterMode(display=False) as forward:
        augmented = PIPELINES["ada"](x, u, torch.tensor(0.5))
    with FlopCounterMode(display=False) as backward:
        augmented.sum().backward()
    assert counts[1] - counts[0] == 3 * forward.get_total_flops() + backward.get_total_flops()


def test_a_lazy_penalty_is_due_by_the_count_of_discriminator_updates(tmp_path):
    """Updates 6, 7 and 8 of three per step: the first and the last of them are even."""
    G, G1, D, D1, Dn = plain_flops(12)
    lazy = ["--penalty.name=r1", "--penalty.every=2"]
    (step,) = counted(tmp_path, *PLAIN, plain_networks, *lazy, d_steps=3)
    assert step["flops"] == 8 * D + 3 * G - 2 * D1 - G1 + 2 * (6 * D - 2 * D1 + G) + 2 * (3 * D + D1 - Dn)


def flops_of(*calls):
    with FlopCounterMode(display=False) as counter:
        for layer, x in calls:
            layer(x)
    return counter.get_total_flops()


@pytest.mark.parametrize("architecture", ["dcgan", "resnet"])
def test_r1_costs_what_it_says_on_our_networks(tmp_path, architecture):
    """Against torch's own count of one pass."""
    overrides = [f"--model.architecture={architecture}", "--model.d_norm=none"]
    counts = []
    for name, penalty in (("without", []), ("with", ["--penalty.name=r1"])):
        (tmp_path / name).mkdir()
        (step,) = counted(tmp_path / name, *overrides, *penalty)
        counts.append(step["flops"])
    model = ModelConfig(architecture=architecture, d_norm="none", width=4, latent_dim=8)
    _, D = models.build(model, models.ImageSpec(image_size=32, channels=1), seed=0)
    x = torch.zeros(12, 1, 32, 32)
    if architecture == "dcgan":
        first, last = [(D.main[0], x)], (D.main[-1], torch.zeros(12, 16, 4, 4))
    else:
        first, last = [(D.first.conv1, x), (D.first.shortcut, x[..., ::2, ::2])], (D.last, torch.zeros(12, 4))
    of_D, D1, Dn = flops_of((D, x)), flops_of(*first), flops_of(last)
    assert counts[1] - counts[0] == 3 * of_D + D1 - Dn


def test_spectral_norm_costs_what_it_says_and_nothing_on_the_wire(tmp_path):
    G, G1, D, D1, _ = plain_flops(6)
    shapes = [(4, 16), (4, 64), (1, 256)]  # of D's weights as matrices
    whole, columns = (sum(r * c for r, c in shapes), sum(c for _, c in shapes))
    # Two passes with a gradient, one without, one power iteration; and v^T times what u^T W is, c numbers long.
    normalising = 2 * (4 * whole + 4 * columns) + (2 * whole + 2 * columns) + 4 * whole
    for step in counted(tmp_path, *PLAIN, plain_networks, "--model.d_norm=spectral", world=2):
        assert step["host syncs"] == {}
        assert step["wire"] == {"allreduce_": step["gradient bytes"] + 12}
        assert step["flops"] == 8 * D + 3 * G - 2 * D1 - G1 + normalising


def flops_by_hand(*, width, latent_dim, batch):
    """FLOPs (two per multiplication and addition) of one forward of G, its first layer, of D, its first layer."""

    def conv(inputs, outputs, pixels):  # 4x4 kernels; `pixels`: of the smaller of input and output map
        return 2 * 16 * inputs * outputs * pixels * batch

    w = width
    G = [conv(latent_dim, 4 * w, 1), conv(4 * w, 2 * w, 16), conv(2 * w, w, 64), conv(w, 1, 256)]
    D = [conv(1, w, 256), conv(w, 2 * w, 64), conv(2 * w, 4 * w, 16), conv(4 * w, 1, 1)]
    return sum(G), G[0], sum(D), D[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("variant", [[], *VARIANTS.values()], ids=["dcgan", *VARIANTS])
def test_no_synchronisation_on_cuda(tmp_path, variant):
    from support.programs import forbid_cuda_synchronisation

    assert launch([*QUIET, *variant, f"--run.dir={tmp_path}"], setups=[forbid_cuda_synchronisation]) == [0]

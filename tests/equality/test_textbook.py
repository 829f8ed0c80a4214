"""The loop against the papers', written down for one process: plain torch, one thing after the other."""

import math

import pytest
import torch
from support.programs import float64, launch
from support.runs import REPOSITORY, TINY
from torch.nn.functional import relu, softplus

from distgan import data, models, recipe, seeding
from distgan.models import spectral_norm
from distgan.objective.ada import NUMBERS, PIPELINES
from distgan.objective.augment import AUGMENTATIONS
from distgan.storage import tensors

END = 5  # of 11 steps, so that the rates are on their way down
COMMON = [
    *TINY,
    *("--model.conditional=true", "--augment.policy=color,translation,cutout", "--optim.schedule=linear"),
    *("--train.d_steps=2", f"--run.stop_at={END}"),
]


@pytest.fixture
def in_float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def textbook(c):
    """Both networks, the average's weights and both Adams after END steps of Wasserstein with clipping, or of hinge
    with R1 at every second update and spectral norm."""
    images, n, seed = data.load(c.data, batch_size=c.train.batch_size), c.train.batch_size, c.run.seed
    spec = models.ImageSpec(image_size=32, channels=1, class_counts=torch.bincount(images.labels).tolist())
    G, D = models.build(c.model, spec, seed=seed)
    average = {name: tensor.clone() for name, tensor in G.named_parameters()}
    adam_G, adam_D = (torch.optim.Adam(network.parameters(), betas=c.optim.betas) for network in (G, D))
    clip, gamma = c.optim.clip_weights, c.penalty.weight
    for step in range(END):
        for adam in (adam_G, adam_D):
            adam.param_groups[0]["lr"] = c.optim.lr * (1 - step / c.train.steps)
        for update in (2 * step, 2 * step + 1):

            def augmented(x, which, update=update):
                for name, (count, change) in AUGMENTATIONS.items():
                    stream = f"augment.{which}.{name}"
                    x = change(x, seeding.uniforms(seed, stream, update, batch=n, count=count, share=slice(n)))
                return x

            index = seeding.order(seed, update * n, n, total=len(images.pixels))
            x, y = images.pixels[index] / 127.5 - 1, images.labels[index]
            mirrored = seeding.flips(seed, update, batch=n)
            x[mirrored] = x[mirrored].flip(-1)
            z = seeding.latents(seed, "latents", update, batch=n, dim=c.model.latent_dim, share=slice(n)).double()
            fake = G(z, y)
            real_logits, fake_logits = D(augmented(x, "real"), y), D(augmented(fake.detach(), "fake"), y)
            loss = fake_logits.mean() - real_logits.mean()
            if gamma is not None:
                loss = relu(1 - real_logits).mean() + relu(1 + fake_logits).mean()
                if update % 2 == 0:
                    x.requires_grad_()
                    (slope,) = torch.autograd.grad(D(augmented(x, "real"), y).sum(), x, create_graph=True)
                    loss = loss + 2 * gamma / 2 * slope.square().sum((1, 2, 3)).mean()
            D.zero_grad()
            loss.backward()
            adam_D.step()
            if clip is not None:
                for weight in D.parameters():
                    weight.data.clamp_(-clip, clip)
            spectral_norm.iterate(D)
        G.zero_grad()
        (-D(augmented(fake, "generator"), y).mean()).backward()
        adam_G.step()
        half_life = min(c.ema.half_life, c.ema.ramp * (step + 1) * 2 * n)
        for name, weight in G.named_parameters():
            average[name].lerp_(weight.detach(), 1 - 0.5 ** (2 * n / half_life))
    return G, D, average, adam_G, adam_D


@pytest.mark.parametrize(
    "overrides",
    [
        ["--loss.name=wasserstein", "--optim.clip_weights=0.03"],
        [
            *("--loss.name=hinge", "--penalty.name=r1", "--penalty.weight=3", "--penalty.every=2"),
            *("--model.architecture=resnet", "--model.d_norm=spectral", "--model.init=orthogonal"),
        ],
    ],
    ids=["clipped", "penalised"],
)
def test_weights_and_moments_are_those_of_the_textbook(tmp_path, in_float64, overrides):
    argv = [*COMMON, *overrides, f"--run.dir={tmp_path}"]
    assert launch(argv, setups=[float64]) == [0]
    compare(tmp_path, *textbook(recipe.parse(argv)[0]))


def compare(run, G, D, average, adam_G, adam_D, end=END):
    """The run's checkpoint with what the textbook has at its end."""
    folder = run / "checkpoints" / f"step_{end:08d}"

    def saved(name):
        return tensors.read(folder / f"{name}.safetensors")

    learned = {}
    for name, network, adam in (("generator", G, adam_G), ("discriminator", D, adam_D)):
        weights, moments = saved(name), saved(f"{name}_optimizer")
        for key, parameter in network.named_parameters():
            # A bias before batch norm has no gradient but rounding, of which Adam makes steps that mean nothing.
            size = adam.state[parameter]["exp_avg_sq"].sqrt()
            learned[name, key] = (size == 0) | (size > 1e-12)
            assert (moments[f"{key}/exp_avg_sq"].sqrt()[~learned[name, key]] < 1e-11).all()
            of = learned[name, key]
            torch.testing.assert_close(weights[key][of], parameter.detach()[of], rtol=1e-9, atol=1e-9)
            for slot in ("exp_avg", "exp_avg_sq"):
                torch.testing.assert_close(moments[f"{key}/{slot}"], adam.state[parameter][slot], rtol=1e-8, atol=1e-14)
    for key, weight in average.items():
        of = learned["generator", key]
        torch.testing.assert_close(saved("average")[key][of], weight[of], rtol=1e-9, atol=1e-9)


# The recipes of BigGAN and R3GAN --------------------------------------------------------------------------------------


class Drawn:
    """The images, labels, latents and augmentation of batch `number`, of a whole batch on one process."""

    def __init__(self, c, images, number):
        n, self.c, self.number = c.train.batch_size, c, number
        index = seeding.order(c.run.seed, number * n, n, total=len(images.pixels))
        self.x, self.y = images.pixels[index] / 127.5 - 1, images.labels[index]
        mirrored = seeding.flips(c.run.seed, number, batch=n)
        self.x[mirrored] = self.x[mirrored].flip(-1)
        z = seeding.latents(c.run.seed, "latents", number, batch=n, dim=c.model.latent_dim, share=slice(n))
        self.z = z.double()

    def numbers(self, stream, count):
        n = self.c.train.batch_size
        return seeding.uniforms(self.c.run.seed, stream, self.number, batch=n, count=count, share=slice(n))

    def ada(self, x, which, name, probability):
        u = self.numbers(f"augment.{which}.{name}", NUMBERS)
        return PIPELINES[name](x, u, torch.tensor(probability, dtype=torch.float64))

    def diffaugment(self, x, which):
        for name, (count, change) in AUGMENTATIONS.items():
            x = change(x, self.numbers(f"augment.{which}.{name}", count))
        return x


def begun(c):
    images = data.load(c.data, batch_size=c.train.batch_size)
    spec = models.ImageSpec(image_size=32, channels=1, class_counts=torch.bincount(images.labels).tolist())
    G, D = models.build(c.model, spec, seed=c.run.seed)
    average = {name: tensor.clone() for name, tensor in G.named_parameters()}
    adams = [torch.optim.Adam(network.parameters(), lr=c.optim.lr, betas=c.optim.betas) for network in (G, D)]
    return images, G, D, average, *adams


def r3gan(c):
    """Trainer.py and train.py of the authors' code, as docs say of them: five ramps, two batches a step, R1 and R2 at
    every update, both pairs of labels and images by their places."""
    images, G, D, average, adam_G, adam_D = begun(c)
    n, ramp, ada = c.train.batch_size, c.ramp, c.augment.policy

    def ramped(start, end, seen):
        return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(seen / ramp.images, 1)))

    for step in range(END):
        seen = step * n
        p = ramped(c.augment.probability, ramp.probability, seen)
        gamma = ramped(c.penalty.weight, ramp.penalty_weight, seen)
        for adam in (adam_G, adam_D):
            adam.param_groups[0]["lr"] = ramped(c.optim.lr, ramp.lr, seen)
            adam.param_groups[0]["betas"] = (0.0, ramped(c.optim.betas[1], ramp.beta2, seen))
        first, second = (Drawn(c, images, 2 * step + k) for k in range(2))
        real, fake = first.x.requires_grad_(), G(first.z, first.y).detach().requires_grad_()
        on_real = D(first.ada(real, "real", ada, p), first.y)
        on_fake = D(first.ada(fake, "fake", ada, p), first.y)
        r1, r2 = (
            torch.autograd.grad(logits.sum(), x, create_graph=True)[0].square().sum((1, 2, 3))
            for logits, x in ((on_real, real), (on_fake, fake))
        )
        D.zero_grad()
        (softplus(on_fake - on_real) + gamma / 2 * (r1 + r2)).mean().backward()
        adam_D.step()
        on_real = D(second.ada(second.x, "real", ada, p), second.y)
        on_fake = D(second.ada(G(second.z, second.y), "generator", ada, p), second.y)
        G.zero_grad()
        softplus(on_real - on_fake).mean().backward()
        adam_G.step()
        beta = 0.5 ** (n / max(ramped(0, ramp.half_life, seen), 1e-8))
        for name, weight in G.named_parameters():
            average[name] = beta * average[name] + (1 - beta) * weight.detach()
    return G, D, average, adam_G, adam_D


def biggan(c):
    """StudioGAN's worker, with one power iteration of each network for each of its updates. If the recipe has it, with
    ADA's probability by the signs of the logits of real images."""
    images, G, D, average, adam_G, adam_D = begun(c)
    d_steps, n, p, signs = c.train.d_steps, c.train.batch_size, 0.0, 0

    def augmented(batch, x, which):
        if c.augment.adaptive:
            return batch.ada(x, which, c.augment.policy, p)
        return batch.diffaugment(x, which) if c.augment.policy else x

    for step in range(END):
        if step and step % 4 == 0 and c.augment.adaptive:
            change = 4 * n * d_steps / c.augment.adapt_over
            p = min(max(p + change * (1 if signs / (4 * n * d_steps) > c.augment.target else -1), 0), 0.8)
            signs = 0
        for k in range(d_steps):
            batch = Drawn(c, images, step * d_steps + k)
            fake = G(batch.z, batch.y)
            on_real = D(augmented(batch, batch.x, "real"), batch.y)
            on_fake = D(augmented(batch, fake.detach(), "fake"), batch.y)
            signs += int(on_real.sign().sum())
            D.zero_grad()
            (relu(1 - on_real).mean() + relu(1 + on_fake).mean()).backward()
            adam_D.step()
            spectral_norm.iterate(D)
        G.zero_grad()
        (-D(augmented(batch, fake, "generator"), batch.y).mean()).backward()
        adam_G.step()
        spectral_norm.iterate(G)
        beta = 0.5 ** (n * d_steps / c.ema.half_life) if step >= c.ema.start else 0
        for name, weight in G.named_parameters():
            average[name] = beta * average[name] + (1 - beta) * weight.detach()
    assert not c.augment.adaptive or 0 < p < 0.8
    return G, D, average, adam_G, adam_D


@pytest.mark.parametrize(
    ("name", "written_down", "overrides"),
    [
        (
            "cifar10_r3gan",
            r3gan,
            [
                *("--model.width=8", "--train.precision=fp32", "--penalty.weight=1", "--ramp.penalty_weight=0.1"),
                *("--ramp.images=36", "--ramp.half_life=30", "--optim.lr=1e-3"),
            ],
        ),
        ("cifar10_biggan", biggan, ["--model.width=2", "--ema.start=2", "--ema.half_life=40", "--train.d_steps=2"]),
        ("cifar10_biggan_diffaug", biggan, ["--model.width=2", "--ema.half_life=40", "--train.d_steps=2"]),
        (
            "cifar10_biggan",
            biggan,
            [
                *("--model.width=2", "--train.d_steps=2", "--augment.policy=ada", "--augment.adapt_over=400"),
                *("--augment.target=-0.9", "--optim.lr=1e-3"),
            ],
        ),
    ],
    ids=["r3gan", "biggan", "biggan-diffaugment", "biggan-ada"],
)
def test_a_recipe_is_the_algorithm_in_plain_torch(tmp_path, in_float64, name, written_down, overrides):
    argv = [f"--config={REPOSITORY}/configs/{name}.yaml", "--data.source=digits", *overrides, f"--run.dir={tmp_path}"]
    argv += ["--train.batch_size=12", "--track.to=none", f"--run.stop_at={END}"]
    assert launch(argv, setups=[float64]) == [0]
    compare(tmp_path, *written_down(recipe.parse(argv)[0]))

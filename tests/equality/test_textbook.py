"""The loop against the papers', written down for one process: plain torch, one thing after the other."""

import pytest
import torch
from support.programs import float64, launch
from support.runs import TINY
from torch.nn.functional import relu

from distgan import data, models, recipe, seeding
from distgan.models import spectral_norm
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
    G, D, average, adam_G, adam_D = textbook(recipe.parse(argv)[0])
    folder = tmp_path / "checkpoints" / f"step_{END:08d}"

    def saved(name):
        return tensors.read(folder / f"{name}.safetensors")

    for name, network, adam in (("generator", G, adam_G), ("discriminator", D, adam_D)):
        weights, moments = saved(name), saved(f"{name}_optimizer")
        for key, parameter in network.named_parameters():
            # A bias before batch norm has no gradient but rounding, of which Adam makes steps of 1e-11.
            torch.testing.assert_close(weights[key], parameter.detach(), rtol=1e-9, atol=1e-9)
            for slot in ("exp_avg", "exp_avg_sq"):
                torch.testing.assert_close(moments[f"{key}/{slot}"], adam.state[parameter][slot], rtol=1e-8, atol=1e-14)
    for key, weight in average.items():
        torch.testing.assert_close(saved("average")[key], weight, rtol=1e-9, atol=1e-9)

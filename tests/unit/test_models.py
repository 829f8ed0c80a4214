"""DCGAN is the textbook's, the residual networks have published sizes, and labels arrive."""

import dataclasses
import itertools

import pytest
import torch
from support.runs import REPOSITORY
from torch import nn

from distgan import models, recipe
from distgan.models import ImageSpec, dcgan, eval_mode, frozen
from distgan.models.conditional import ConditionalBatchNorm2d, Projection
from distgan.recipe import ModelConfig


def layers(network):
    """Name, kind, channels, kernel, stride, padding of the layers with weights, and the kinds of the rest."""
    table = []
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            shape = (layer.in_channels, layer.out_channels, layer.kernel_size[0], layer.stride[0], layer.padding[0])
            assert layer.bias is None
            kind = nn.Conv2d if isinstance(layer, nn.Conv2d) else nn.ConvTranspose2d
            table.append((name, kind.__name__, *shape))
        elif isinstance(layer, nn.BatchNorm2d):
            table.append((name, "BatchNorm2d", layer.num_features))
        elif not isinstance(layer, nn.Sequential) and name:
            table.append((name, type(layer).__name__))
    return table


def test_at_64_pixels_the_layers_are_the_textbook_ones():
    """PyTorch's DCGAN tutorial: nz 100, ngf = ndf = 64, nc 3; its last layer, a sigmoid, is in the loss here."""
    G, D = models.build(ModelConfig(), ImageSpec(image_size=64, channels=3), seed=0)
    assert layers(G) == [
        ("main.0", "ConvTranspose2d", 100, 512, 4, 1, 0),
        ("main.1", "BatchNorm2d", 512),
        ("main.2", "ReLU"),
        ("main.3", "ConvTranspose2d", 512, 256, 4, 2, 1),
        ("main.4", "BatchNorm2d", 256),
        ("main.5", "ReLU"),
        ("main.6", "ConvTranspose2d", 256, 128, 4, 2, 1),
        ("main.7", "BatchNorm2d", 128),
        ("main.8", "ReLU"),
        ("main.9", "ConvTranspose2d", 128, 64, 4, 2, 1),
        ("main.10", "BatchNorm2d", 64),
        ("main.11", "ReLU"),
        ("main.12", "ConvTranspose2d", 64, 3, 4, 2, 1),
        ("main.13", "Tanh"),
    ]
    assert layers(D) == [
        ("main.0", "Conv2d", 3, 64, 4, 2, 1),
        ("main.1", "LeakyReLU"),
        ("main.2", "Conv2d", 64, 128, 4, 2, 1),
        ("main.3", "BatchNorm2d", 128),
        ("main.4", "LeakyReLU"),
        ("main.5", "Conv2d", 128, 256, 4, 2, 1),
        ("main.6", "BatchNorm2d", 256),
        ("main.7", "LeakyReLU"),
        ("main.8", "Conv2d", 256, 512, 4, 2, 1),
        ("main.9", "BatchNorm2d", 512),
        ("main.10", "LeakyReLU"),
        ("main.11", "Conv2d", 512, 1, 4, 1, 0),
    ]
    assert all(layer.negative_slope == 0.2 for layer in D.modules() if isinstance(layer, nn.LeakyReLU))
    # The tutorial's networks have these many parameters.
    assert sum(p.numel() for p in G.parameters()) == 3_576_704
    assert sum(p.numel() for p in D.parameters()) == 2_765_568


@pytest.mark.parametrize(
    ("image_size", "channels", "width", "latent_dim"),
    [(32, 1, 4, 8), (32, 3, 5, 3), (64, 1, 3, 7), (64, 3, 4, 100), (128, 3, 2, 9), (256, 1, 2, 6)],
)
def test_every_size_maps_latents_to_images_to_logits(image_size, channels, width, latent_dim):
    model, shape = ModelConfig(width=width, latent_dim=latent_dim), ImageSpec(image_size=image_size, channels=channels)
    G, D = models.build(model, shape, seed=0)
    fake = G(torch.randn(2, latent_dim), None)
    assert fake.shape == (2, channels, image_size, image_size)
    assert fake.abs().max() <= 1
    assert D(fake, None).shape == (2,)
    narrowest = next(p.shape for p in D.parameters())
    assert narrowest == (width, channels, 4, 4)


def test_the_starting_weights_are_the_papers_and_functions_of_the_seed():
    shape = ImageSpec(image_size=64, channels=3)
    for network, again, other in zip(*(models.build(ModelConfig(), shape, seed=s) for s in (1, 1, 2)), strict=True):
        for name, tensor in network.state_dict().items():
            assert torch.equal(tensor, again.state_dict()[name])
            if name.endswith("weight"):
                assert not torch.equal(tensor, other.state_dict()[name])
        for layer in network.modules():
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
                n = layer.weight.numel()
                assert abs(layer.weight.mean()) < 5 * 0.02 / n**0.5
                assert layer.weight.std().item() == pytest.approx(0.02, rel=5 / n**0.5)
            elif isinstance(layer, nn.BatchNorm2d):
                assert layer.weight.mean().item() == pytest.approx(1, abs=5 * 0.02 / len(layer.weight) ** 0.5)
                assert layer.weight.std().item() == pytest.approx(0.02, rel=5 / len(layer.weight) ** 0.5)
                assert (layer.bias == 0).all()


def test_samples_are_functions_of_seed_and_index_alone():
    G, _ = models.build(ModelConfig(width=3, latent_dim=5), ImageSpec(image_size=32, channels=3), seed=0)
    for layer in G.modules():  # batch norm in training mode would tie the images of a batch together
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_var.fill_(1e-3)
    G(torch.randn(4, 5))
    before = {name: tensor.clone() for name, tensor in G.state_dict().items()}
    torch.random.manual_seed(0)
    many = G.sample(150, seed=4)
    assert torch.equal(G.sample(10, seed=4), many[:10])
    assert torch.equal(G.sample(65, seed=4), many[:65])
    assert not torch.equal(G.sample(10, seed=5), many[:10])
    assert len(torch.unique(many, dim=0)) == 150
    assert many.float().std() > 1
    assert G.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in G.state_dict().items())
    drawn = torch.rand(1)
    torch.random.manual_seed(0)
    assert torch.equal(torch.rand(1), drawn)  # no global random state was touched


def test_frozen_and_eval_mode_put_everything_back():
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    network[1].eval()
    network[0].bias.requires_grad_(False)
    x = torch.randn(2, 1, 5, 5, requires_grad=True)
    with frozen(network), eval_mode(network):
        assert not network.training
        network(x).sum().backward()
    assert x.grad is not None
    assert all(p.grad is None for p in network.parameters())
    assert [p.requires_grad for p in network.parameters()] == [True, False, True, True]
    assert (network.training, network[0].training, network[1].training) == (True, True, False)


# ResNets, spectral norm, labels ---------------------------------------------------------------------------------------


def parameters(*networks):
    return [sum(p.numel() for p in network.parameters()) for network in networks]


def test_parameter_counts_are_the_published_ones():
    """PyTorch-StudioGAN's logs at 947b35e, "Number of parameters", in logs/CIFAR10 and logs/TINY_IMAGENET.

    WGAN-GP-train-2020_09_16: G 4276739, SNGAN's unconditional one. SNGAN-train-2020_09_18: G 4304387 and D 1055105,
    with ten classes. TINY_IMAGENET/WGAN-GP-train-2021_01_15: G 12220675 at 64x64. WGAN-GP's critic is there with nine
    batch norms, of 3 and of 128 channels, which the paper's does not have: 1055879 - 2 * (3 + 8 * 128) = 1053825, which
    ResDiscriminator32 in wgangp.py of pytorch-gan-collections (860e90b) has, too. Nobody whom we know publishes a count
    for its generator of width 128.
    """
    sngan, sngan_cond, wgan_gp = (
        recipe.load(REPOSITORY / "configs" / f"cifar10_{name}.yaml").model
        for name in ("sngan", "sngan_cond", "wgan_gp")
    )
    colour = ImageSpec(image_size=32, channels=3)
    assert parameters(*models.build(sngan, colour, seed=0)) == [4_276_739, 1_055_105 - 1280]
    labelled = ImageSpec(image_size=32, channels=3, class_counts=(5000,) * 10)
    assert parameters(*models.build(sngan_cond, labelled, seed=0)) == [4_304_387, 1_055_105]
    large = ModelConfig(architecture="resnet", width=64, latent_dim=128)
    assert parameters(models.build_generator(large, ImageSpec(image_size=64, channels=3))) == [12_220_675]
    # By hand from the layers of mimicry's sngan_64.py and of sngan_projection's snresnet.py, whose inner widths are
    # those before: blocks that halve, with a shortcut of 1x1, but for the last one at 128.
    for size, widths in ((64, [64, 128, 256, 512, 1024]), (128, [64, 128, 256, 512, 1024, 1024])):
        expected = 9 * 3 * 64 + 64 + 9 * 64 * 64 + 64 + 3 * 64 + 64 + 1024 + 1
        for a, b in itertools.pairwise(widths):
            expected += 9 * a * a + a + 9 * a * b + b + ((a * b + b) if a != b else 0)
        _, D = models.build(large, ImageSpec(image_size=size, channels=3), seed=0)
        assert parameters(D) == [expected]
        features = []
        D.blocks[-1].register_forward_hook(lambda *seen, features=features: features.append(seen[2].shape))
        D(torch.zeros(1, 3, size, size))
        assert features == [(1, 1024, *([2, 2] if size == 64 else [4, 4]))]
    # By hand from the layers of gan_cifar_resnet.py (igul222/improved_wgan_training, without its labels).
    block = 2 * (9 * 128 * 128 + 128) + 128 * 128 + 128
    in_G = 128 * 2048 + 2048 + 3 * (block + 4 * 128) + 2 * 128 + 9 * 128 * 3 + 3
    first = 9 * 3 * 128 + 128 + 9 * 128 * 128 + 128 + 3 * 128 + 128
    in_D = first + block + 2 * 2 * (9 * 128 * 128 + 128) + 128 + 1
    assert parameters(*models.build(wgan_gp, colour, seed=0)) == [in_G, in_D] == [1_204_483, 1_053_825]
    assert in_D == 1_055_879 - 2 * (3 + 8 * 128)


LABELLED = ImageSpec(image_size=32, channels=3, class_counts=(7, 1, 2))


@pytest.mark.parametrize("d_norm", ["none", "spectral"])
@pytest.mark.parametrize(
    ("architecture", "image_size"), [("dcgan", 32), ("resnet", 32), ("resnet", 64), ("resnet", 128)]
)
def test_labels_reach_every_image_and_every_logit(architecture, image_size, d_norm):
    model = ModelConfig(architecture=architecture, width=2, latent_dim=5, d_norm=d_norm, conditional=True)
    G, D = models.build(model, ImageSpec(image_size=image_size, channels=3, class_counts=(7, 1, 2)), seed=0)
    with torch.no_grad():
        for layer in G.modules():
            if isinstance(layer, ConditionalBatchNorm2d):
                layer.scale.weight.normal_(1, 0.5)  # else classes begin alike
    z, y = torch.randn(3, 5), torch.tensor([0, 1, 2])
    with eval_mode(G), eval_mode(D), torch.no_grad():
        images = G(z, y)
        assert images.shape == (3, 3, image_size, image_size)
        assert D(images, y).shape == (3,)
        for network, x in ((G, z), (D, images)):
            changed = (network(x, y) - network(x, y.roll(1))).reshape(3, -1).abs().amax(1)
            assert (changed > 0).all()


def test_a_projection_is_the_inner_product_with_the_labels_embedding():
    """Miyato and Koyama 2018, eq. 3, on the discriminator's own features."""
    for architecture in ("dcgan", "resnet"):
        _, D = models.build(ModelConfig(architecture=architecture, width=3, conditional=True), LABELLED, seed=0)
        _, plain = models.build(
            ModelConfig(architecture=architecture, width=3), ImageSpec(image_size=32, channels=3), seed=0
        )
        plain.load_state_dict({name: t for name, t in D.state_dict().items() if "projection" not in name})
        features = []
        D.projection.register_forward_pre_hook(lambda _, inputs, seen=features: seen.append(inputs[0]))
        x, y = torch.randn(4, 3, 32, 32), torch.tensor([0, 2, 2, 1])
        logits = D(x, y)
        expected = plain(x, None) + torch.einsum("nc,nc->n", D.projection.embedding.weight[y], features[0])
        torch.testing.assert_close(logits, expected)


def test_spectral_norm_divides_by_the_largest_singular_value_as_torchs_does():
    model = ModelConfig(width=4, d_norm="spectral", conditional=True)
    _, D = models.build(model, LABELLED, seed=0)
    layers = [layer for layer in D.modules() if hasattr(layer, "parametrizations")]
    assert len(layers) == 5  # four convolutions and the projection's embedding
    for _ in range(200):
        models.constrain(D, clip=None)
    for layer in layers:
        weight = layer.parametrizations.weight.original
        assert torch.linalg.matrix_norm(layer.weight.flatten(1), ord=2).item() == pytest.approx(1, rel=1e-3)
        theirs = nn.Linear(*reversed(weight.flatten(1).shape), bias=False)
        theirs.weight.data.copy_(weight.flatten(1))
        torch.nn.utils.parametrizations.spectral_norm(theirs)
        ours = layer.parametrizations.weight[0]
        theirs.parametrizations.weight[0]._u.copy_(ours.u)
        theirs.parametrizations.weight[0]._v.copy_(ours.v)
        theirs.eval()  # no power iteration of its own
        torch.testing.assert_close(layer.weight.flatten(1), theirs.weight)
        c = torch.randn(weight.flatten(1).shape)
        gradients = (
            torch.autograd.grad((w.flatten(1) * c).sum(), p)[0].flatten(1)
            for w, p in ((layer.weight, weight), (theirs.weight, theirs.parametrizations.weight.original))
        )
        torch.testing.assert_close(*gradients)


def test_an_update_has_one_power_iteration_whatever_passes_there_were():
    _, D = models.build(ModelConfig(width=4, d_norm="spectral"), ImageSpec(image_size=32, channels=3), seed=0)
    before = {name: tensor.clone() for name, tensor in D.state_dict().items()}
    for _ in range(3):
        D(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(torch.equal(tensor, before[name]) for name, tensor in D.state_dict().items())
    with torch.no_grad():
        for parameter in D.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    models.constrain(D, clip=None)
    for layer in D.modules():
        if hasattr(layer, "parametrizations"):
            name = next(n for n, m in D.named_modules() if m is layer) + ".parametrizations.weight"
            weight = layer.parametrizations.weight.original.detach().flatten(1)
            v = torch.nn.functional.normalize(weight.t() @ before[f"{name}.0.u"], dim=0)
            u = torch.nn.functional.normalize(weight @ v, dim=0)
            torch.testing.assert_close(layer.parametrizations.weight[0].v, v)
            torch.testing.assert_close(layer.parametrizations.weight[0].u, u)


def test_clipping_bounds_every_weight():
    _, D = models.build(ModelConfig(width=4), ImageSpec(image_size=32, channels=3), seed=0)
    expected = {name: parameter.detach().clamp(-0.01, 0.01) for name, parameter in D.named_parameters()}
    models.constrain(D, clip=0.01)
    assert all(torch.equal(parameter, expected[name]) for name, parameter in D.named_parameters())
    assert max(parameter.abs().max().item() for parameter in D.parameters()) == pytest.approx(0.01)


@pytest.mark.parametrize("architecture", ["resnet", "dcgan"])
def test_orthogonal_starting_weights_are(architecture):
    model = ModelConfig(architecture=architecture, width=4, init="orthogonal", conditional=True, d_norm="spectral")
    networks, others = (models.build(model, LABELLED, seed=seed) for seed in (0, 1))
    assert not torch.equal(networks[1].projection.embedding.weight, others[1].projection.embedding.weight)
    for network in networks:
        embeddings = [part.embedding for part in network.modules() if isinstance(part, Projection)]
        for layer in network.modules():
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear) or layer in embeddings:
                weight = layer.parametrizations.weight.original if hasattr(layer, "parametrizations") else layer.weight
                matrix = weight.flatten(1)
                matrix = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.t()
                torch.testing.assert_close(matrix @ matrix.t(), torch.eye(len(matrix)), rtol=0, atol=1e-5)
            if isinstance(layer, ConditionalBatchNorm2d):
                for matrix in (layer.scale.weight - 1, layer.shift.weight):
                    torch.testing.assert_close(matrix @ matrix.t(), torch.eye(3), rtol=0, atol=1e-5)


def test_samples_of_a_labelled_generator_are_functions_of_seed_index_and_label():
    G, _ = models.build(ModelConfig(architecture="resnet", width=3, latent_dim=5, conditional=True), LABELLED, seed=0)
    with torch.no_grad():
        for layer in G.modules():
            if isinstance(layer, ConditionalBatchNorm2d):
                layer.scale.weight.normal_(1, 0.5)
    many, rows = G.sample(130, seed=4), G.sample_rows([2, 0], 5, seed=4)
    assert torch.equal(G.sample(10, seed=4), many[:10])
    assert torch.equal(rows[:5], G.sample(5, seed=4, label=2))
    assert torch.equal(rows[5:], G.sample(5, seed=4, label=0))
    drawn = torch.cat([G.labels(first, seed=4) for first in range(0, 6400, 64)])
    for i in range(20):
        assert torch.equal(many[i], G.sample(20, seed=4, label=int(drawn[i]))[i])
    assert (torch.bincount(drawn) / 6400).tolist() == pytest.approx([0.7, 0.1, 0.2], abs=0.02)  # as the data has them
    for label in (-1, 3):
        with pytest.raises(ValueError, match=f"class {label} .* has the classes 0 to 2"):
            G.sample(1, label=label)


@pytest.mark.parametrize("architecture", models.ARCHITECTURES)
def test_the_lowest_blocks_of_a_discriminator_can_be_frozen(architecture):
    """Each block of the first ones that the image passes, and no clipping changes what is frozen."""
    model = ModelConfig(architecture=architecture, width=8, latent_dim=4)
    for count in range(4):
        _, D = models.build(model, ImageSpec(image_size=32, channels=1), seed=0)
        models.freeze(D, count)
        blocks = D.blocks_from_image()
        frozen_ones = [[not p.requires_grad for layer in block for p in layer.parameters()] for block in blocks]
        assert (
            [all(one) for one in frozen_ones]
            == [any(one) for one in frozen_ones]
            == [i < count for i in range(len(blocks))]
        )
        seen = []
        for i, block in enumerate(blocks):
            block[0].register_forward_hook(lambda *_, i=i, seen=seen: seen.append(i))
        D(torch.zeros(2, 1, 32, 32))
        assert seen == sorted(seen) == list(range(len(blocks)))
        before = {name: p.detach().clone() for name, p in D.named_parameters() if not p.requires_grad}
        models.constrain(D, clip=1e-6)
        assert all(torch.equal(p, before[name]) for name, p in D.named_parameters() if name in before)
        last = [p for p in D.parameters() if p.requires_grad]
        assert last
        assert all(p.abs().max() <= 1e-6 for p in last)
    with pytest.raises(ValueError, match=rf"train\.freeze_d is 9, but the discriminator has {len(blocks)} blocks"):
        models.freeze(D, 9)


def test_networks_that_take_no_labels_are_refused_them():
    architecture = models.ARCHITECTURES["dcgan"]
    blind = dataclasses.replace(
        architecture,
        generator=lambda model, shape: architecture.generator(
            model, ImageSpec(image_size=shape.image_size, channels=shape.channels)
        ),
    )
    models.ARCHITECTURES["blind"] = blind
    try:
        with pytest.raises(ValueError, match=r"model\.conditional is true, but blind takes no labels"):
            models.build(ModelConfig(architecture="blind", width=2, conditional=True), LABELLED, seed=0)
    finally:
        del models.ARCHITECTURES["blind"]


@pytest.mark.parametrize("shape", [(4, 4), (4, 6)])
def test_dcgans_layers_of_one_pixel_are_the_convolutions(shape):
    """Outputs, gradients and second derivatives, against torch's convolutions with the same weights."""
    first, last = dcgan._FromOnePixel(5, 3, shape, bias=False), dcgan._ToOnePixel(3, 1, shape, bias=False)
    generator = torch.Generator().manual_seed(0)
    for layer, x, convolution in (
        (first, torch.randn(2, 5, 1, 1, generator=generator), torch.nn.functional.conv_transpose2d),
        (last, torch.randn(2, 3, *shape, generator=generator), torch.nn.functional.conv2d),
    ):
        layer.double()
        found = []
        for apply in (layer, lambda x, layer=layer, convolution=convolution: convolution(x, layer.weight)):
            at = x.double().requires_grad_()
            y = apply(at)
            (slope,) = torch.autograd.grad(y.sin().sum(), at, create_graph=True)
            (second,) = torch.autograd.grad(slope.square().sum(), layer.weight)
            found.append((y, slope, second))
        for ours, torchs in zip(*found, strict=True):
            torch.testing.assert_close(ours, torchs)

"""A search finds again what the generator can draw, and changes nothing but latents."""

import pytest
import torch
from support.generators import NAMES, exported

from distgan.applications.inversion import invert
from distgan.applications.masks import masks
from distgan.applications.repair import inpaint, psnr
from distgan.storage import exported as storage


def everywhere(count):
    return torch.ones(count, 32, 32, dtype=torch.bool)


@pytest.mark.parametrize("architecture", ["dcgan", "resnet"])
@pytest.mark.parametrize("names", [(), NAMES])
def test_inversion_finds_the_generators_own_samples(tmp_path, architecture, names):
    found = storage.find(str(exported(tmp_path / "g", architecture=architecture, names=names)))
    pictures = found.generator.sample(12, seed=77)
    assert float(pictures.float().std(0).mean()) > 10  # they differ
    inverted = invert(found, pictures, steps=250)
    quality = psnr(inverted.images, pictures, everywhere(12))
    assert float((quality > 30).float().mean()) >= 0.75, quality
    assert torch.equal(found.generator.decode(inverted.latents.z, inverted.latents.y), inverted.images)
    error = (inverted.images.double() - pictures.double()) / 127.5
    torch.testing.assert_close(inverted.distance.double(), error.square().mean((1, 2, 3)).sqrt(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("discriminator", [True, False])
def test_a_repair_finds_them_too_and_never_looks_at_what_is_hidden(tmp_path, discriminator):
    found = storage.find(str(exported(tmp_path / "g", discriminator=discriminator)))
    truth = found.generator.sample(24, seed=77)
    hidden = masks("center", ["x"] * 24, size=(32, 32), seed=0)
    repaired = inpaint(found, truth, hidden, steps=300)
    quality = psnr(repaired.pictures, truth, hidden)
    assert float((quality > 25).float().mean()) >= 0.75, quality
    spoiled = torch.where(hidden[:, None], 255 - truth, truth)
    again = inpaint(found, spoiled, hidden, steps=300)
    assert torch.equal(again.pictures, repaired.pictures)
    known = ~hidden[:, None].expand_as(truth)
    assert torch.equal(again.pictures[known], truth[known])


def test_only_latents_are_changed(tmp_path):
    found = storage.find(str(exported(tmp_path / "g", names=NAMES)))
    before = {name: tensor.clone() for name, tensor in found.generator.state_dict().items()}
    found.generator.requires_grad_(True)
    invert(found, found.generator.sample(3), steps=5)
    after = found.generator.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in found.generator.parameters())


def test_more_steps_and_more_restarts_come_nearer(tmp_path):
    found = storage.find(str(exported(tmp_path / "g")))
    pictures = found.generator.sample(16, seed=5)
    loose = [invert(found, pictures, steps=steps, restarts=1).distance.mean() for steps in (3, 30, 200)]
    assert loose[0] > loose[1] > loose[2]
    wider = invert(found, pictures, steps=200, restarts=6).distance.mean()
    assert wider < loose[2]


def test_a_picture_does_not_depend_on_its_company(tmp_path):
    found = storage.find(str(exported(tmp_path / "g")))
    pictures = found.generator.sample(8, seed=5)
    together = invert(found, pictures, steps=10).latents.z
    reversed_ = invert(found, pictures.flip(0), steps=10).latents.z.flip(0)
    torch.testing.assert_close(together, reversed_, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("pictures", "words"),
    [
        (torch.zeros(2, 3, 16, 16, dtype=torch.uint8), "uint8 (N, 3, 32, 32)"),
        (torch.zeros(2, 1, 32, 32, dtype=torch.uint8), "uint8 (N, 3, 32, 32)"),
        (torch.zeros(2, 3, 32, 32), "torch.float32"),
        (torch.zeros(0, 3, 32, 32, dtype=torch.uint8), "(0, 3, 32, 32)"),
    ],
)
def test_pictures_that_do_not_fit_are_refused(tmp_path, pictures, words):
    with pytest.raises(ValueError, match="the pictures are") as refused:
        invert(exported(tmp_path / "g"), pictures)
    assert words in str(refused.value)


def test_masks_that_do_not_fit_are_refused(tmp_path):
    folder, pictures = exported(tmp_path / "g"), torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    for mask, words in (
        (torch.zeros(2, 32, 32, dtype=torch.bool), "mask 0 hides nothing"),
        (torch.ones(2, 32, 32, dtype=torch.bool), "mask 0 hides everything"),
        (torch.ones(1, 32, 32, dtype=torch.bool), "must be torch.bool"),
        (torch.ones(2, 32, 32), "must be torch.bool"),
    ):
        with pytest.raises(ValueError, match=words):
            inpaint(folder, pictures, mask)

"""One door to a trained generator, and to the discriminator that judged it."""

import shutil

import torch
from safetensors.torch import load_file

from distgan.storage import exported


def test_the_discriminator_of_a_run_is_the_one_of_its_newest_checkpoint(small_run):
    found = exported.find(str(small_run))
    discriminator = found.discriminator()
    saved = load_file(small_run / "checkpoints" / "step_00000011" / "discriminator.safetensors")
    assert discriminator.state_dict().keys() == saved.keys()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in discriminator.state_dict().items())
    assert not discriminator.training
    logits = discriminator(found.generator.images(0, seed=0), None)
    assert logits.shape == (64,)


def test_a_generator_without_its_run_has_no_discriminator(small_run, tmp_path):
    shutil.copytree(small_run / "generator", tmp_path / "generator")
    assert exported.find(str(tmp_path / "generator")).discriminator() is None

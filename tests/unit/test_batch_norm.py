"""Synchronised batch norm is plain batch norm on the whole batch."""

import functools
import json
import os

import pytest
import torch
import torch.distributed as dist
from support.programs import processes
from torch import nn

from distgan import models


def whole_and_share(rank, world, dtype):
    """Plain batch norm on the whole batch, the synchronised one on a share of it; what each computed."""
    rng = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(12, 5, 4, 4, generator=rng) + 7).to(dtype)
    dy = torch.randn(12, 5, 4, 4, generator=rng).to(dtype)
    plain = nn.BatchNorm2d(5).to(dtype)
    nn.init.normal_(plain.weight, generator=rng)
    nn.init.normal_(plain.bias, generator=rng)
    network = nn.Sequential(nn.BatchNorm2d(5).to(dtype))
    network[0].load_state_dict(plain.state_dict())
    models.synchronise(network)
    share = slice(rank * 12 // world, (rank + 1) * 12 // world)

    def passes(layer, images, gradients):
        for _ in range(2):  # running statistics of more than one batch
            images = images.detach().clone().requires_grad_()
            layer.zero_grad()
            y = layer(images)
            (y * gradients).sum().backward()
        layer.eval()
        return y, images.grad, layer.weight.grad, layer.bias.grad, layer(images), *layer.buffers()

    expected, ours = passes(plain, x, dy), list(passes(network[0], x[share], dy[share]))
    for i in (2, 3):
        dist.all_reduce(ours[i])  # as DDP does
    for i in (0, 1, 4):
        expected = (*expected[:i], expected[i][share], *expected[i + 1 :])
    return [(a - b).abs().max().item() for a, b in zip(expected, ours, strict=True)]


def on_rank(rank, world, port, what, path):
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=world)
    path.with_name(f"{rank}.json").write_text(json.dumps(what(rank, world)))
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)], ids=["fp64", "fp32"])
def test_outputs_gradients_and_statistics_are_those_of_the_whole_batch(tmp_path, free_port, world, dtype, tolerance):
    what = functools.partial(whole_and_share, dtype=dtype)
    ranks = [processes.Process(target=on_rank, args=(r, world, free_port, what, tmp_path / "x")) for r in range(world)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
    for r in range(world):
        differences = json.loads((tmp_path / f"{r}.json").read_text())
        assert len(differences) == 8
        assert max(differences) < tolerance, differences


def test_a_layer_keeps_its_parameters_names_and_inference(monkeypatch):
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    weight, names = network[1].weight, list(network.state_dict())
    x = torch.randn(2, 1, 8, 8)
    expected = network.eval()(x)
    assert models.has_batch_norm(network)
    models.synchronise(network)
    assert network[1].weight is weight
    assert list(network.state_dict()) == names
    assert models.has_batch_norm(network)
    assert torch.equal(network.eval()(x), expected)  # outside any process group
    assert not models.has_batch_norm(nn.Linear(1, 1))

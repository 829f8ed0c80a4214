"""What we rely on inside Accelerate and PyTorch, so that an update that changes it is noticed here first."""

import warnings

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import nn


@pytest.fixture
def accelerator():
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    yield Accelerator(cpu=True, mixed_precision="bf16")
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def test_prepare_patches_the_network_itself_so_that_the_unwrapped_one_runs_in_mixed_precision_too(accelerator):
    """algorithm.py calls the unwrapped D in G's step."""
    network = nn.Sequential(nn.Linear(2, 2))
    inside = []
    network[0].register_forward_hook(lambda module, args, output: inside.append(output.dtype))
    accelerator.prepare(network)
    assert network(torch.ones(1, 2)).dtype == torch.float32  # converted back
    assert inside == [torch.bfloat16]


def test_accelerate_has_no_name_of_its_own_for_ddps_forward_sync_buffers():
    """When it has, parallel/ranks.py can drop broadcast_buffers and the filter of its warning."""
    assert "forward_sync_buffers" not in DistributedDataParallelKwargs.__dataclass_fields__


def test_prepare_keeps_the_optimiser_that_it_wraps(accelerator):
    """checkpoint.py reads the state of the optimiser that algorithm.py made."""
    network = nn.Linear(2, 2)
    adam = torch.optim.Adam(network.parameters(), fused=True)
    _, wrapped = accelerator.prepare(network, adam)
    assert wrapped.optimizer is adam
    accelerator.backward(network(torch.ones(1, 2)).sum())
    wrapped.step()
    assert set(adam.state) == set(network.parameters())
    assert set(adam.state[network.weight]) == {"step", "exp_avg", "exp_avg_sq"}


def test_torchs_cpu_engine_takes_32_bits_of_a_seed():
    """Why seeding.py draws from NumPy's Philox."""
    drawn = [torch.randn(4, generator=torch.Generator().manual_seed(seed)) for seed in (5, 5 + 2**32)]
    assert torch.equal(*drawn)


def test_foreach_lerp_exists_as_ema_uses_it():
    a, b = [torch.zeros(2)], [torch.ones(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch._foreach_lerp_(a, b, 0.25)
    assert torch.equal(a[0], torch.full((2,), 0.25))

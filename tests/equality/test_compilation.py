"""`train.compile=inductor`: networks that torch compiles train as they do uncompiled, up to rounding.

The tolerance: after 4 steps in fp32, what is logged differs by less than 1e-5 of itself, and weights by less than 1e-4.
Biases are left out: before batch norm they have no gradient but rounding, of which Adam makes steps that mean nothing.
"""

import functools
import json
import re

import pytest
import torch
from support.compiling import note_graphs, without_inductor
from support.programs import launch
from support.runs import TINY, VARIANTS, metrics, tensors
from support.steps import after_steps
from torch._dynamo.utils import counters

from distgan.errors import UserError
from distgan.objective import Objective
from distgan.run import compilation, rehearsal

STEPS = 4


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    monkeypatch.setattr(rehearsal._OnlyRank, "place", lambda *args, **options: None)  # weights keep their numbers
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compare(overrides):
    """Compares a run's first steps with and without compiled networks. Returns the number of graphs after each step."""
    graphs: list[int] = []
    plain = after_steps([*TINY, *overrides], "off", end=STEPS)
    assert not counters["stats"]
    each = lambda: graphs.append(counters["stats"]["unique_graphs"])  # noqa: E731
    compiled = after_steps([*TINY, *overrides], "inductor", end=STEPS, each=each)
    assert compiled.logged == pytest.approx(plain.logged, rel=1e-5)
    assert plain.tensors.keys() == compiled.tensors.keys()  # names are those of networks that are not compiled
    weights = [name for name in plain.tensors if name.endswith(("weight", "original"))]
    for name in weights:
        expected = plain.tensors[name]
        assert (compiled.tensors[name] - expected).norm() < 1e-4 * expected.norm(), name
    assert weights and not counters["graph_break"]
    return graphs


@pytest.mark.parametrize("variant", ["sngan-labels-resnet-translation", "r3gan-labels-ramps"])
def test_graphs_have_no_breaks_and_none_is_added_after_the_second_step(monkeypatch, variant):
    """Both networks whole, forward and backward, as they come to inductor, with torch's own kernels in its place."""
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager")
    graphs = compare(VARIANTS[variant])
    assert graphs[0] > 0
    assert graphs[1:] == [graphs[1]] * (STEPS - 1)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["dcgan", "dcgan-r1", *VARIANTS])
def test_inductor_rounds_differently_and_does_nothing_else(variant):
    r1 = ["--penalty.name=r1", "--model.d_norm=none"] if variant == "dcgan-r1" else []
    graphs = compare(VARIANTS.get(variant, r1))
    assert graphs[1:] == [graphs[1]] * (STEPS - 1)


def test_a_penalty_through_the_compiled_network_is_an_error(monkeypatch):
    """So that it cannot be wrong in silence, should it ever be given that network."""
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager")
    half = Objective.discriminator
    monkeypatch.setattr(Objective, "discriminator", lambda self, D, *args, plain_D: half(self, D, *args, plain_D=D))
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        after_steps([*TINY, "--penalty.name=r1", "--model.d_norm=none"], "inductor", end=1)


def test_a_compiled_run_is_resumed_bit_equal_and_samples_from_networks_that_are_not_compiled(tmp_path):
    """The real program with inductor: DCGAN with R1."""
    overrides = ["--penalty.name=r1", "--model.d_norm=none", "--train.compile=inductor"]
    whole, parts, graphs = tmp_path / "whole", tmp_path / "parts", tmp_path / "graphs"
    for run, stop in ((whole, []), (parts, ["--run.stop_at=4"]), (parts, [])):
        argv = [*TINY, *overrides, f"--run.dir={run}", *stop]
        assert launch(argv, setups=[functools.partial(note_graphs, graphs)], timeout=600) == [0]
        found = json.loads((tmp_path / "graphs.0").read_text())
        assert found["breaks"] == {}
        assert found["graphs"][0] > 0 and set(found["graphs"][1:]) == {found["graphs"][1]}  # also after samples
    assert tensors(parts, 11) == tensors(whole, 11)
    assert metrics(parts) == metrics(whole)
    plain = tmp_path / "plain"
    assert launch([*TINY, *overrides, "--train.compile=off", f"--run.dir={plain}"]) == [0]
    assert metrics(whole)[0] == pytest.approx(metrics(plain)[0], rel=1e-5)  # of the first 3 steps


def test_two_ranks_with_synchronised_batch_norm_compile_whole(tmp_path):
    found = {}
    for how in ("off", "inductor"):
        argv = [*TINY, "--train.steps=4", f"--train.compile={how}", f"--run.dir={tmp_path / how}"]
        setups = [without_inductor, functools.partial(note_graphs, tmp_path / "graphs")]
        assert launch(argv, world=2, setups=setups) == [0, 0]
        found[how] = metrics(tmp_path / how)
    for rank in range(2):
        noted = json.loads((tmp_path / f"graphs.{rank}").read_text())
        assert noted["breaks"] == {}
        assert noted["graphs"][0] > 0 and set(noted["graphs"][1:]) == {noted["graphs"][1]}
    for plain, compiled in zip(found["off"], found["inductor"], strict=True):
        assert compiled == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize(
    ("missing", "words"), [("compiler", "C++ compiler: install g++"), ("headers", "Python's headers: install them")]
)
def test_without_a_compiler_one_sentence_says_what_to_install(tmp_path, monkeypatch, missing, words):
    if missing == "compiler":
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setenv("CXX", "none")
    else:
        monkeypatch.setattr(compilation.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(UserError, match=re.escape(words)):
        compilation.check_compiler()

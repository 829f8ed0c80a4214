"""`train.compile=graph`: a step that was captured and is repeated ends with the same bits as one that is written out.

On a CPU a tape of ATen's operations takes the graph's place: whatever a graph would repeat unchanged, it repeats, too.
"""

import functools

import pytest
import torch
from support.programs import count_replays, launch, spoilt_at
from support.runs import REPOSITORY, TINY, VARIANTS, metrics, steps, tensors
from support.steps import after_steps
from support.tape import Tape, tape_for_graph

from distgan import recipe
from distgan.run import algorithm, capture, rehearsal

# Learning rates that fp32 holds exactly: on a CPU they are Python's floats, except where a step is captured.
EXACT = [*TINY, "--train.steps=16", "--optim.lr=0.00048828125", "--optim.schedule=linear"]
ALIKE = ("biggan-own-batch", "r3gan")  # to others
END = 7
WITHOUT_WHAT_IS_REFUSED = {
    "r3gan-labels-ramps": ["--ramp.lr=null", "--ramp.beta2=null", "--ramp.penalty_weight=null"],
    "r1-lazy-unnormalised-dcgan": ["--train.d_steps=4"],
}


@pytest.fixture
def in_this_process(monkeypatch):
    monkeypatch.setattr(rehearsal._OnlyRank, "place", lambda *args, **options: None)  # weights keep their numbers
    monkeypatch.setattr(capture, "RECORDER", Tape)


def differences(overrides):
    """Names what is not bit-equal after some steps."""
    written, repeated = (after_steps([*EXACT, *overrides], how, end=END) for how in ("off", "graph"))
    assert repeated.step._make_updates._recorder.replays == END - capture.WARM
    assert written.tensors.keys() == repeated.tensors.keys()
    other = [name for name, tensor in written.tensors.items() if not torch.equal(tensor, repeated.tensors[name])]
    return other + [name for name, number in written.logged.items() if number != repeated.logged[name]]


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("variant", ["dcgan", "dcgan-bf16", *(name for name in VARIANTS if name not in ALIKE)])
def test_a_step_that_is_repeated_without_its_code_is_bit_equal(variant):
    more = ["--train.precision=bf16"] if variant == "dcgan-bf16" else []
    overrides = [*VARIANTS.get(variant, more), *WITHOUT_WHAT_IS_REFUSED.get(variant, [])]
    assert differences([*overrides, "--optim.schedule=linear"]) == []


@pytest.mark.usefixtures("in_this_process")
def test_what_would_be_baked_in_is_seen(monkeypatch):
    overrides = ["--augment.policy=cutout", "--penalty.name=r1", "--model.d_norm=none"]
    adam, fill = algorithm._adam, capture.StillFeed.fill

    def with_a_number(*args, **options):
        made = adam(*args, **options)
        made.param_groups[0]["lr"] = float(made.param_groups[0]["lr"])
        return made

    def without_draws(feed, step):
        draws, feed._draws = feed._draws, [{} for _ in feed._draws]
        fill(feed, step)
        feed._draws = draws or feed._draws

    with monkeypatch.context() as patched:
        patched.setattr(algorithm, "_adam", with_a_number)
        assert "generator.main.0.weight" in differences(overrides)
    with monkeypatch.context() as patched:
        patched.setattr(capture.StillFeed, "fill", without_draws)
        assert "generator.main.0.weight" in differences(overrides)
    # Nor may a penalty's weight change as a number, which is why it is refused.
    ramp = ["--penalty.weight=1", "--ramp.penalty_weight=0.1", "--ramp.images=100"]
    assert "discriminator.main.0.weight" in differences([*overrides, *ramp])


def test_a_run_that_is_resumed_and_rolled_back_is_the_one_without_a_graph(tmp_path):
    """Adam's moments lie elsewhere after a checkpoint was loaded, so that a step must be captured anew."""
    overrides = ["--guard.on_trouble=rollback", "--checkpoint.every=4"]
    for how, stops in {"off": [[]], "graph": [["--run.stop_at=2"], []]}.items():
        run = tmp_path / how
        argv = [*EXACT, *overrides, f"--train.compile={how}", f"--run.dir={run}"]
        for stop in stops:
            assert launch([*argv, *stop], setups=[tape_for_graph, functools.partial(spoilt_at, 12)]) == [0]
        assert (run / "rollbacks.jsonl").exists()
    assert tensors(tmp_path / "graph", 16) == tensors(tmp_path / "off", 16)
    assert metrics(tmp_path / "graph") == metrics(tmp_path / "off")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("placement", ["device", "host"])
@pytest.mark.parametrize("name", sorted(path.stem for path in (REPOSITORY / "configs").glob("cifar10*.yaml")))
def test_a_recipe_is_bit_equal_with_a_graph_on_a_gpu(tmp_path, name, placement):
    c = recipe.parse([f"--config={REPOSITORY}/configs/{name}.yaml", "--run.dir=x"])[0]
    argv = [f"--config={REPOSITORY}/configs/{name}.yaml", "--data.source=digits", "--data.channels=3"]
    argv += [f"--data.placement={placement}", "--eval.every=null", "--track.to=none", "--checkpoint.every=20"]
    argv += ["--train.deterministic=true", "--track.log_every=10", "--track.sample_every=20", "--run.stop_at=20"]
    if c.ramp.images is not None:  # some of R3GAN's ramps are refused
        argv += ["--ramp.beta2=null", "--ramp.penalty_weight=null"]
    for how in ("off", "graph"):
        setups = [functools.partial(count_replays, tmp_path / "replays")]
        assert launch([*argv, f"--train.compile={how}", f"--run.dir={tmp_path / how}"], setups=setups) == [0]
    assert (tmp_path / "replays").read_text() == str(20 - capture.WARM)
    assert steps(tmp_path / "graph") == [20]
    assert tensors(tmp_path / "graph", 20) == tensors(tmp_path / "off", 20)
    assert metrics(tmp_path / "graph") == metrics(tmp_path / "off")

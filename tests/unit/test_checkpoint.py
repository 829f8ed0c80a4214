"""The disk format: whole or not there, readable for ever, never a pickle."""

import hashlib
import json
import os
import shutil
import signal
import stat
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from support.programs import launch
from support.runs import TINY, metrics, steps
from torch import nn

from distgan import load_generator
from distgan.run.state import NEW, TrainingState
from distgan.storage import bundle, checkpoint

FIXTURE = Path(__file__).parent.parent / "fixtures" / "format_1"  # by write_fixture.py when format 1 began


def pair():
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    return network, torch.optim.Adam(network.parameters(), lr=0.1, fused=True)


def step(network, adam, seed):
    network(torch.randn(8, 3, generator=torch.Generator().manual_seed(seed))).square().sum().backward()
    adam.step()
    adam.zero_grad()


def save(root, at, network, adam, **state):
    files = checkpoint.snapshot({"net": network, "net_optimizer": checkpoint.Slots(adam, network)})
    return checkpoint.save(root, at, files, state)


def load(folder, network, adam):
    return checkpoint.load(folder, {"net": network, "net_optimizer": checkpoint.Slots(adam, network)})


def test_what_is_loaded_goes_on_as_what_was_saved(tmp_path):
    network, adam = pair()
    for seed in range(3):
        step(network, adam, seed)
    folder = save(tmp_path, 3, network, adam, note="kept")
    step(network, adam, 3)
    other, other_adam = pair()
    assert load(folder, other, other_adam) == {"step": 3, "note": "kept"}
    step(other, other_adam, 3)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])


def test_an_optimiser_that_never_stepped_stays_so(tmp_path):
    network, adam = pair()
    folder = save(tmp_path, 0, network, adam)
    other, other_adam = pair()
    load(folder, other, other_adam)
    step(network, adam, 0)
    step(other, other_adam, 0)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), other.parameters(), strict=True))


@dataclass(kw_only=True)
class Grown(TrainingState):
    """What a later version saves besides."""

    tensor: nn.Module = field(default_factory=lambda: nn.Linear(1, 1), metadata=NEW)
    entry: int = 7


def test_a_state_that_has_grown_loads_checkpoints_of_before(tmp_path):
    files = ("generator", "discriminator", "average", "generator_optimizer", "discriminator_optimizer")
    entries = {"meter": 1, "scaler": None, "guard": {}, "standing": {}, "images": "a", "data": {}, "adaptation": None}

    def made(kind):
        return kind(**{name: nn.Linear(2, 2) for name in files}, **entries)

    before, grown = made(TrainingState), made(Grown)
    old = checkpoint.save(tmp_path / "old", 0, before.snapshot(), before.described())
    grown.entry, kept = 8, grown.tensor.weight.clone()
    grown.load(old)
    assert torch.equal(grown.generator.weight, before.generator.weight)
    assert grown.entry == 8 and torch.equal(grown.tensor.weight, kept)

    new = checkpoint.save(tmp_path / "new", 0, grown.snapshot(), grown.described())
    again = made(Grown)
    again.load(new)
    assert again.entry == 8 and torch.equal(again.tensor.weight, kept)
    (new / "generator.safetensors").unlink()
    with pytest.raises(ValueError, match=r"generator\.safetensors does not exist"):  # not one that may be missing
        again.load(new)


def test_a_checkpoint_is_safetensors_and_json_by_parameter_name(tmp_path):
    network, adam = pair()
    step(network, adam, 0)
    old = os.umask(0o027)
    try:
        folder = save(tmp_path, 12, network, adam)
    finally:
        os.umask(old)
    assert folder.name == "step_00000012"
    assert sorted(file.name for file in folder.iterdir()) == [
        *("manifest.json", "net.safetensors", "net_optimizer.safetensors", "state.json"),
    ]
    slots = load_file(folder / "net_optimizer.safetensors")
    assert torch.equal(slots["0.weight/exp_avg"], adam.state[network[0].weight]["exp_avg"])
    assert {name.split("/")[1] for name in slots} == {"exp_avg", "exp_avg_sq", "step"}
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["format"] == bundle.FORMAT
    for name, expected in manifest["files"].items():
        content = (folder / name).read_bytes()
        assert expected == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o640


def damage_truncate(folder):
    damage_truncate_named(folder, "net.safetensors")


def damage_truncate_named(folder, name):
    file = folder / name
    file.write_bytes(file.read_bytes()[:-4])


def damage_flip(folder):
    file = folder / "net_optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "file"),
    [
        (damage_truncate, "net.safetensors"),
        (damage_flip, "net_optimizer.safetensors"),
        (lambda folder: (folder / "state.json").unlink(), "state.json"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json"),
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json"),
    ],
    ids=["truncated", "bit", "missing", "manifest", "no manifest"],
)
def test_a_damaged_checkpoint_is_passed_over_and_only_its_owner_moves_it(tmp_path, caplog, damage, file):
    network, adam = pair()
    older, newer = save(tmp_path, 1, network, adam), save(tmp_path, 2, network, adam)
    damage(newer)
    assert checkpoint.newest(tmp_path, set_aside=False) == older
    assert newer.exists()
    assert file in caplog.text
    assert checkpoint.newest(tmp_path, set_aside=True) == older
    assert not newer.exists()
    assert (tmp_path / "step_00000002.damaged").is_dir()
    again = save(tmp_path, 2, network, adam)
    damage(again)
    assert checkpoint.newest(tmp_path, set_aside=True) == older
    assert (tmp_path / "step_00000002.damaged2").is_dir()


def test_pruning_keeps_the_newest_and_the_multiples(tmp_path):
    network, adam = pair()
    for at in range(1, 11):
        save(tmp_path, at, network, adam)
    checkpoint.prune(tmp_path, keep_last=2, keep_every=4)
    assert sorted(folder.name for folder in tmp_path.iterdir()) == [f"step_{at:08d}" for at in (4, 8, 9, 10)]


def test_what_is_not_finite_is_never_committed(tmp_path):
    network, adam = pair()
    good = save(tmp_path, 1, network, adam)
    with torch.no_grad():
        network[1].running_var[0] = float("inf")
    with pytest.raises(checkpoint.NotFiniteError, match=r"step 2.*1\.running_var"):
        save(tmp_path, 2, network, adam)
    assert list(tmp_path.iterdir()) == [good]


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    network, adam = pair()
    good = save(tmp_path, 1, network, adam)
    limits = __import__("resource")
    soft, hard = limits.getrlimit(limits.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits.setrlimit(limits.RLIMIT_FSIZE, (300, hard))  # the kernel refuses to write further, as a full disk does
    try:
        with pytest.raises(OSError, match="File too large"):
            save(tmp_path, 2, network, adam)
    finally:
        limits.setrlimit(limits.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == [good]
    assert checkpoint.newest(tmp_path, set_aside=True) == good


def test_another_network_is_refused(tmp_path):
    network, adam = pair()
    folder = save(tmp_path, 1, network, adam)
    wider = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
    with pytest.raises(ValueError, match=r"another network \(0\.weight"):
        checkpoint.load(folder, {"net": wider})


def test_format_1_loads_for_ever(tmp_path):
    run = tmp_path / "run"
    shutil.copytree(FIXTURE, run)
    generator = load_generator(run)
    recorded = json.loads((FIXTURE / "recorded.json").read_text())
    images = generator.sample(4, seed=5).float()
    assert images.mean().item() == pytest.approx(recorded["mean of sample(4, seed=5)"], abs=0.1)
    argv = [f"--config={FIXTURE / 'config.yaml'}", f"--run.dir={run}", "--run.extend=2"]
    assert launch(argv) == [0]
    assert steps(run) == [2, 4]
    resumed = metrics(run)
    assert [record["step"] for record in resumed] == [1, 2, 3, 4]
    for name, value in recorded["metrics of step 3"].items():
        assert resumed[2][name] == pytest.approx(value, rel=1e-4)


def test_every_file_of_a_run_is_safetensors_json_yaml_or_png(tmp_path):
    assert launch([*TINY, f"--run.dir={tmp_path}"]) == [0]
    files = [file for file in tmp_path.rglob("*") if file.is_file() and file.name != ".lock"]
    read = {
        ".safetensors": load_file,
        ".json": lambda file: json.loads(file.read_text()),
        ".jsonl": lambda file: [json.loads(line) for line in file.read_text().splitlines()],
        ".yaml": lambda file: yaml.safe_load(file.read_text()),
        ".png": lambda file: Image.open(file, formats=["PNG"]).load(),
    }
    assert {file.suffix for file in files} == set(read)
    for file in files:
        read[file.suffix](file)


def test_where_every_checkpoint_is_damaged_the_run_does_not_begin_anew(tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    argv = [*TINY, f"--run.dir={run}"]
    assert launch([*argv, "--run.stop_at=4"]) == [0]
    damage_truncate_named(run / "checkpoints" / "step_00000004", "generator.safetensors")
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file() and file.name != ".lock"}
    assert launch(argv, log=log, world=2) == [2, 2]
    assert "every checkpoint in" in log.read_text()
    assert {file: file.read_bytes() for file in before} == before


def test_a_file_system_that_fails_is_no_damage(tmp_path, monkeypatch):
    network, adam = pair()
    folder = save(tmp_path, 1, network, adam)

    def stale(self):
        raise OSError(116, "Stale file handle")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="Stale"):
        patch.setattr(Path, "read_bytes", stale)
        checkpoint.newest(tmp_path, set_aside=True)
    assert checkpoint.newest(tmp_path, set_aside=True) == folder


def test_any_bit_flipped_in_a_manifest_is_met_with_a_sentence(tmp_path):
    """Passed over as damaged, or refused as of another format: a flipped version cannot be told from a newer one."""
    network, adam = pair()
    older, newer = save(tmp_path, 1, network, adam), save(tmp_path, 2, network, adam)
    manifest = newer / "manifest.json"
    whole, passed_over = manifest.read_bytes(), 0
    for bit in range(0, 8 * len(whole), 3):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        manifest.write_bytes(flipped)
        try:
            found = checkpoint.newest(tmp_path, set_aside=False)
        except ValueError as error:
            assert "has format" in str(error)
        else:
            assert found in (older, newer)  # white space can flip and change nothing
            passed_over += found == older
    assert passed_over > len(whole)

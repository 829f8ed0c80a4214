"""Measuring a generator: right, the same on any number of processes, with its protocol beside every number."""

import functools
import hashlib
import json
import math
import re
import shutil
import time

import numpy as np
import pytest
import torch
import torch_fidelity
from PIL import Image
from safetensors.torch import save_file
from support.commands import complaint
from support.pictures import idx_folder
from support.programs import another_cache, launch, other_chunks, slow_extractor
from support.runs import QUICK, TINY, metrics, steps, tensors
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

import distgan
from distgan import cli, data, evaluation, models
from distgan.evaluation import Inception, classifier
from distgan.pictures import grid
from distgan.recipe import DataConfig, EvalConfig, ModelConfig
from distgan.run.best import BestSoFar
from distgan.storage import cache, exported
from distgan.storage import tensors as storage_tensors
from distgan.storage.report import Report, differences

EVALUATED = [*TINY, "--eval.every=4", "--eval.extractor=classifier", "--eval.num=300", "--guard.after=0"]


def evaluated(run, *words, tmp_path, world=1, setups=()):
    """What `distgan evaluate` writes."""
    file = tmp_path / "evaluation.json"
    argv = [str(run), *QUICK, f"--json={file}", *words]
    assert launch(argv, verb="evaluate", world=world, setups=setups) == [0] * world
    return json.loads(file.read_text())


# The numbers ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory):
    """Random ones, of a size at which images differ: as safetensors for us, as a pickle for torch-fidelity."""
    folder = tmp_path_factory.mktemp("inception")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "load", lambda *args, **options: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *args: None)
        network = FeatureExtractorInceptionV3("inception", ["64"], feature_extractor_weights_path="none")
    rng = torch.Generator().manual_seed(0)
    weights = network.state_dict()
    for name in weights:
        if name.endswith("conv.weight"):
            weights[name].normal_(0, 1.5 * (2 / weights[name][0].numel()) ** 0.5, generator=rng)
    save_file(weights, folder / "inception.safetensors")
    torch.save(weights, folder / "inception.pth")  # noqa: TID251
    return folder


def test_fid_kid_and_inception_score_are_torch_fidelitys_own(inception_weights, tmp_path, monkeypatch):
    """The same images as files, the same weights; the features of 64 channels, which 256 images tell of regularly."""
    num = 256
    layers = functools.partial(Inception, layers=("64", "64"))
    layers.dim = 64
    monkeypatch.setattr(evaluation, "Inception", layers)
    monkeypatch.setattr(evaluation.weights, "Inception", layers)
    monkeypatch.setattr(Inception, "dim", 64)
    monkeypatch.setattr(Inception, "classes", 64)
    model, shape = ModelConfig(width=4, latent_dim=8), models.ImageSpec(image_size=32, channels=1)
    random, _ = models.build(model, shape, seed=0)
    drawn = {name: 8 * tensor for name, tensor in random.state_dict().items()}  # so that images differ
    exported.save_generator(tmp_path / "generator", drawn, model, shape, step=1)
    generator = distgan.load_generator(tmp_path / "generator")
    fake = torch.cat([generator.draw(first, seed=0, stream="evaluation") for first in range(0, num, 64)])
    for kind, pictures in {"real": data.load(DataConfig()).pixels[:num], "fake": fake}.items():
        (tmp_path / kind).mkdir()
        for i, picture in enumerate(pictures):
            Image.fromarray(picture[0].numpy()).save(tmp_path / kind / f"{i:04d}.png")
    weights = inception_weights / "inception.safetensors"
    argv = [str(tmp_path / "generator"), "--extractor=inception", f"--extractor-weights={weights}"]
    argv += [f"--num={num}", f"--reference={tmp_path / 'real'}", f"--json={tmp_path / 'ours.json'}"]
    assert cli.main(["evaluate", *argv, "--metrics=fid,is,kid"]) == 0
    ours = json.loads((tmp_path / "ours.json").read_text())
    assert ours["protocol"]["extractor_weights"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    theirs = torch_fidelity.calculate_metrics(
        input1=str(tmp_path / "fake"),
        input2=str(tmp_path / "real"),
        feature_extractor_weights_path=str(inception_weights / "inception.pth"),
        **{"cuda": False, "fid": True, "isc": True, "kid": True, "cache": False, "verbose": False},
        **{"feature_layer_fid": "64", "feature_layer_isc": "64", "feature_layer_kid": "64"},
        **{"kid_subsets": 1, "kid_subset_size": num, "isc_splits": 10, "samples_shuffle": False},
    )
    pairs = {
        "fid": "frechet_inception_distance",
        "is": "inception_score_mean",
        "is_std": "inception_score_std",
        "kid": "kernel_inception_distance_mean",
    }
    for name, their_name in pairs.items():
        assert ours["metrics"][name] == pytest.approx(theirs[their_name], rel=1e-3), name
    # The score itself is near 1 with random weights: its logarithm says as much as it can.
    logs = [math.log(score) for score in (ours["metrics"]["is"], theirs["inception_score_mean"])]
    assert logs[0] == pytest.approx(logs[1], rel=1e-3)
    assert logs[0] > 5e-3
    assert ours["metrics"]["fid"] > 0.01


def test_inception_gives_its_2048_features_and_logits_in_one_pass(inception_weights):
    """Grey images are three equal channels."""
    weights, _ = storage_tensors.read_weights(inception_weights / "inception.safetensors")
    features, logits = Inception(weights)(data.load(DataConfig()).pixels[:2])
    assert features.shape == (2, 2048)
    assert logits.shape == (2, 1008)
    reference = FeatureExtractorInceptionV3(
        "inception",
        ["2048", "logits_unbiased"],
        feature_extractor_weights_path=str(inception_weights / "inception.pth"),
    )
    expected = reference(data.load(DataConfig()).pixels[:2].repeat(1, 3, 1, 1))
    assert torch.equal(features, expected[0])
    assert torch.equal(logits, expected[1])


def test_any_number_of_processes_and_any_batch_size_give_the_same_numbers(small_run, tmp_path):
    """Each with a cache of its own, so that the real images, too, are looked at by all of them."""
    protocol = evaluated(small_run, tmp_path=tmp_path)["protocol"]
    (trained,) = (data.store.cache_folder(DataConfig()) / "extractors").glob("*/extractor.safetensors")
    found = []
    for i, (world, chunk) in enumerate([(1, 64), (2, 64), (3, 64), (1, 50)]):
        setups = [functools.partial(another_cache, tmp_path / str(i)), functools.partial(other_chunks, chunk)]
        words = [f"--extractor-weights={trained}"]
        found.append(evaluated(small_run, *words, tmp_path=tmp_path, world=world, setups=setups))
    for other in found:
        assert other["protocol"] == protocol
        assert other["metrics"] == pytest.approx(found[0]["metrics"], rel=1e-6)
    assert found[0]["metrics"].keys() == {
        *("fd_classifier", "is_classifier", "is_classifier_std", "kd_classifier"),
        *("precision", "recall", "density", "coverage", "spread", "classes", "drawn"),
    }
    assert found[0]["metrics"]["drawn"] < 5  # it has hardly begun to learn
    assert evaluated(small_run, "--seed=1", tmp_path=tmp_path)["metrics"] != found[0]["metrics"]


def test_truncation_and_standing_statistics_are_part_of_the_protocol_and_change_the_numbers(small_run, tmp_path):
    plain = evaluated(small_run, tmp_path=tmp_path)
    cut = [evaluated(small_run, "--truncation=0.5", tmp_path=tmp_path, world=n) for n in (1, 2)]
    stood = evaluated(small_run, "--standing=3", tmp_path=tmp_path)
    assert cut[0]["protocol"] == {**plain["protocol"], "truncation": 0.5, "standing": "16 batches of 64 samples"}
    assert stood["protocol"] == {**plain["protocol"], "standing": "3 batches of 64 samples"}
    assert cut[1]["metrics"] == pytest.approx(cut[0]["metrics"], rel=1e-6)
    distances = [one["metrics"]["fd_classifier"] for one in (plain, cut[0], stood)]
    assert len(set(distances)) == 3
    reports = {name: Report.from_json(one) for name, one in {"plain": plain, "cut": cut[0]}.items()}
    assert [line.split()[0] for line in differences(reports)] == ["truncation", "standing"]
    generator = distgan.load_generator(small_run).truncated(0.5)
    out = tmp_path / "cut.npz"
    assert cli.main(["sample", str(small_run), "--truncation=0.5", "--num=9", f"--out={out}"]) == 0
    expected = generator.sample(9).permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy()
    assert np.array_equal(np.load(out)["arr_0"], expected)
    for words in (["evaluate", "--truncation=-1"], ["evaluate", "--standing=-1"], ["sample", "--truncation=0"]):
        assert cli.main([words[0], str(small_run), *words[1:]]) == 2


def test_a_recipes_truncation_holds_for_its_evaluations_and_grids_and_can_be_switched_off(tmp_path):
    run = tmp_path / "run"
    settings = ["--eval.truncation=0.4", "--eval.standing=2", "--track.truncation=0.4", "--train.steps=4"]
    assert launch([*EVALUATED, f"--run.dir={run}", *settings]) == [0]
    report = json.loads((run / "generator" / "evaluation.json").read_text())
    assert report["protocol"]["truncation"] == 0.4
    assert report["protocol"]["standing"] == "2 batches of 64 samples"
    again = evaluated(run, "--metrics=fd_classifier,prdc", tmp_path=tmp_path)
    assert again["protocol"] == report["protocol"]
    assert again["metrics"] == pytest.approx(report["metrics"], rel=1e-6)
    off = evaluated(run, "--truncation=0", "--standing=0", tmp_path=tmp_path)
    assert not {"truncation", "standing"} & off["protocol"].keys()
    with Image.open(run / "samples" / "step_00000004.png") as drawn:
        expected = grid(distgan.load_generator(run).truncated(0.4).sample(64, seed=0), columns=8)
        assert drawn.tobytes() == expected.tobytes()


def test_a_rank_that_is_slower_than_the_others_is_waited_for(small_run, trained, tmp_path):
    """In all it takes longer than a rank that hangs is given, but it gets on."""
    run, *_ = trained
    argv = [*EVALUATED, f"--run.dir={tmp_path / 'run'}", f"--eval.extractor_weights={run / 'extractor.safetensors'}"]
    argv += ["--run.timeout=6", "--train.steps=4"]
    setups = [functools.partial(another_cache, tmp_path), functools.partial(slow_extractor, 1, 0.6)]
    started = time.monotonic()
    assert launch(argv, world=2, setups=setups) == [0, 0]
    assert time.monotonic() - started > 8  # long enough to be taken for one that hangs


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """A copy of the cache, to be damaged: other tests' runs are compared to the last digit by what they have read."""
    shutil.copytree(data.store.cache_folder(DataConfig()), tmp_path / "cache" / "distgan")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_what_real_images_look_like_is_computed_once(small_run, own_cache, monkeypatch, capfd):
    seen = []
    forward = evaluation.Classifier.forward
    monkeypatch.setattr(evaluation.Classifier, "forward", lambda self, x: (seen.append(len(x)), forward(self, x))[1])
    argv = ["evaluate", str(small_run), *QUICK, "--num=200"]
    assert cli.main(argv) == 0
    seen.clear()
    assert cli.main(argv) == 0
    assert sum(seen) == 200
    for file in (data.store.cache_folder(DataConfig()) / "references").glob("*/moments.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])  # a damaged one is made anew
    assert cli.main(argv) == 0
    assert sum(seen) == 200 + 200 + 1797
    outputs = capfd.readouterr().out.split(f"{small_run}, step 11\n")[1:]
    assert outputs[0] == outputs[1] == outputs[2]


def test_numbers_are_those_of_the_entry_that_the_cache_keeps(small_run, own_cache, tmp_path, monkeypatch):
    """Another process, of another number of ranks, was quicker, and added in another order."""
    put = cache.put

    def second(folder, files, state):
        if "moments" in files:
            outer = files["moments"]["outer"]
            put(folder, {**files, "moments": {**files["moments"], "outer": outer * (1 + 1e-9)}}, state)
        put(folder, files, state)

    monkeypatch.setattr(evaluation.cache, "put", second)
    shutil.rmtree(data.store.cache_folder(DataConfig()) / "references", ignore_errors=True)
    words = [str(small_run), *QUICK, f"--json={tmp_path / 'numbers.json'}"]
    numbers = [(cli.main(["evaluate", *words]), json.loads((tmp_path / "numbers.json").read_text())) for _ in range(2)]
    assert numbers[0] == numbers[1]


def test_the_classifier_is_the_same_wherever_it_is_trained_and_knows_what_it_never_saw(monkeypatch):
    images = data.load(DataConfig())
    monkeypatch.setattr(classifier, "_STEPS", 60)
    monkeypatch.setattr(classifier, "_EPOCHS", 0)
    threads = torch.get_num_threads()
    hashes, accuracies = set(), set()
    for count in (1, 2):
        torch.set_num_threads(count)
        torch.rand(count)  # the global random state is none of its business
        network, accuracy = classifier.train(images.pixels, images.labels, classes=10)
        assert torch.get_num_threads() == count
        hashes.add(hashlib.sha256(b"".join(t.numpy().tobytes() for t in network.state_dict().values())).hexdigest())
        accuracies.add(accuracy)
    torch.set_num_threads(threads)
    assert len(hashes) == len(accuracies) == 1
    assert accuracies.pop() > 0.5


def test_a_floor_is_what_the_other_split_scores(tmp_path):
    """Of two halves of the same digits it is near zero; and a generator of noise is far above it."""
    digits = data.load(DataConfig())
    pixels, labels = digits.pixels[:, 0].numpy(), digits.labels.tolist()
    for name, half in (("train", slice(0, None, 2)), ("t10k", slice(1, None, 2))):
        idx_folder(tmp_path / "idx", np.ascontiguousarray(pixels[half]), labels[half], name)
    run = tmp_path / "run"
    overrides = ["--data.source=fashion_mnist", f"--data.path={tmp_path / 'idx'}", "--train.steps=1"]
    assert launch([*TINY, f"--run.dir={run}", *overrides]) == [0]
    found = {}
    for reference in ("train", "test"):
        found[reference] = evaluated(run, f"--reference={reference}", tmp_path=tmp_path)
        report = found[reference]
        assert report["protocol"]["reference"] == f"split {reference} of fashion_mnist"
        assert report["floor"]["fd_classifier"] < 0.05 * report["metrics"]["fd_classifier"]
        assert report["floor"]["precision"] > 0.8
        assert report["floor"]["drawn"] == 10
    assert len(list((data.store.cache_folder(DataConfig()) / "floors").glob("*/state.json"))) >= 2
    assert evaluated(run, "--reference=test", tmp_path=tmp_path)["floor"] == found["test"]["floor"]
    assert found["train"]["floor"]["fd_classifier"] == pytest.approx(found["test"]["floor"]["fd_classifier"], rel=1e-6)


# In training ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two ranks, each with batch norm statistics of its own, that evaluates itself; and what it said."""
    folder = tmp_path_factory.mktemp("trained")
    run, log = folder / "run", folder / "log"
    argv = [*EVALUATED, f"--run.dir={run}", "--model.sync_batchnorm=false", "--checkpoint.keep_last=1"]
    assert launch(argv, world=2, log=log) == [0, 0]
    return run, log, argv


def test_training_logs_what_evaluate_gives_for_its_generators(trained, tmp_path):
    run, log, _ = trained
    lines = {line["step"]: line for line in metrics(run) if "eval/protocol" in line}
    assert list(lines) == [4, 8, 11]
    report = evaluated(run, "--metrics=fd_classifier,prdc", tmp_path=tmp_path)
    logged = {name.removeprefix("eval/"): value for name, value in lines[11].items() if name.startswith("eval/")}
    assert logged["protocol"] == report["protocol"]
    assert {name: logged[name] for name in report["metrics"]} == pytest.approx(report["metrics"], rel=1e-6)
    assert json.loads((run / "generator" / "evaluation.json").read_text())["metrics"] == pytest.approx(
        report["metrics"], rel=1e-6
    )
    raw = evaluated(run, "--metrics=fd_classifier,prdc", "--weights=raw", tmp_path=tmp_path)
    assert raw["metrics"] != report["metrics"]
    assert raw["protocol"]["weights"] == "raw"

    best = min(lines, key=lambda step: lines[step]["eval/fd_classifier"])
    assert set(steps(run)) == {best, 6, 11}  # the best, the newest, and what a rollback would go back to
    kept = distgan.load_generator(run / "generator-best")
    average = storage_tensors.read(run / "checkpoints" / f"step_{best:08d}" / "average.safetensors")
    assert all(torch.equal(tensor, average[name]) for name, tensor in kept.state_dict().items())
    assert json.loads((run / "generator-best" / "evaluation.json").read_text())["step"] == best
    behind = lines[11]["eval/fd_classifier"] / lines[best]["eval/fd_classifier"]
    assert lines[11]["eval/behind_best"] == pytest.approx(behind)
    said = re.search(r"best +fd_classifier ([\d.]+) at step (\d+)(.*)", log.read_text())
    assert (float(said[1]), int(said[2])) == (pytest.approx(lines[best]["eval/fd_classifier"], rel=1e-4), best)
    assert "the last evaluation" in said[3] if best == 11 else f"{behind:.2f} times as bad" in said[3]


def test_evaluating_changes_no_update(trained, tmp_path):
    run, _, argv = trained
    without = [word for word in argv if not word.startswith("--eval")]
    assert launch([*without, f"--run.dir={tmp_path / 'run'}"], world=2) == [0, 0]
    assert tensors(tmp_path / "run", 11) == tensors(run, 11)


def test_a_best_generator_that_a_kill_kept_from_being_written_is_written_when_the_run_goes_on(trained, tmp_path):
    run, _, argv = trained
    killed = tmp_path / "run"
    shutil.copytree(run, killed)
    shutil.rmtree(killed / "generator-best")
    assert launch([*argv, f"--run.dir={killed}", "--run.extend=1"], world=2) == [0, 0]
    best, again = ((folder / "generator-best" / "model.safetensors").read_bytes() for folder in (run, killed))
    assert best == again or json.loads((killed / "generator-best" / "config.json").read_text())["step"] == 12


def test_a_run_keeps_the_classifier_that_it_measures_itself_by(trained, tmp_path):
    """Where it is trained anew, on another machine, it may come out otherwise: nothing of it is asked again."""
    run, *_ = trained
    empty = [functools.partial(another_cache, tmp_path / "cache")]
    report = evaluated(run, "--metrics=fd_classifier,prdc", tmp_path=tmp_path, setups=empty)
    assert report["metrics"] == pytest.approx(
        json.loads((run / "generator" / "evaluation.json").read_text())["metrics"], rel=1e-6
    )
    assert not (tmp_path / "cache" / "distgan" / "extractors").exists()


def test_a_run_that_is_stopped_goes_on_with_its_best(trained, tmp_path):
    run, _, argv = trained
    resumed = tmp_path / "run"
    argv = [*argv, f"--run.dir={resumed}"]
    for stop in (["--run.stop_at=5"], ["--run.stop_at=9"], []):
        assert launch([*argv, *stop], world=2) == [0, 0]
    assert metrics(resumed) == metrics(run)
    assert tensors(resumed, 11) == tensors(run, 11)
    for name in ("generator-best", "generator"):
        for file in (run / name).iterdir():
            assert (resumed / name / file.name).read_text(errors="replace").replace(str(resumed), str(run)) == (
                file.read_text(errors="replace")
            )


def test_an_export_carries_its_numbers_and_their_protocol(trained, tmp_path, capfd):
    run, *_ = trained
    assert cli.main(["export", str(run), "--to", str(tmp_path / "export")]) == 0
    card = (tmp_path / "export" / "README.md").read_text()
    report = json.loads((run / "generator" / "evaluation.json").read_text())
    assert f"| fd_classifier | {report['metrics']['fd_classifier']:.5g} |" in card
    for name, value in report["protocol"].items():
        assert f"{name}: {value}" in card
    assert evaluated(tmp_path / "export", "--metrics=fd_classifier,prdc", tmp_path=tmp_path)["metrics"] == (
        pytest.approx(report["metrics"], rel=1e-6)
    )


# Mistakes -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Folders of pictures that do not fit 32x32 grey ones, or are few."""
    folder = tmp_path_factory.mktemp("pictures")
    for name, mode, size, count in (("small", "L", 28, 1), ("colour", "RGB", 32, 1), ("few", "L", 32, 20)):
        (folder / name).mkdir()
        for i in range(count):
            Image.new(mode, (size, size), i).save(folder / name / f"{i}.png")
    shutil.copytree(folder / "few", folder / "splits" / "test" / "a")
    for name in ("large", "cut"):
        (folder / name).mkdir()
    Image.new("1", (14_000, 14_000)).save(folder / "large" / "0.png")  # to Pillow a decompression bomb
    Image.new("L", (32, 32)).save(folder / "cut" / "0.jpg")
    content = (folder / "cut" / "0.jpg").read_bytes()
    (folder / "cut" / "0.jpg").write_bytes(content[:-2] + bytes(2))
    return folder


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--num=128"], ["number of samples is 128", "fd_classifier", "at least 129"]),
        (["--metrics=kd_classifier,prdc", "--num=5"], ["there are 5 samples", "at least 10"]),
        (["--num=0"], ["--num is 0"]),
        (["--metrics=fid"], ['"fid"', "classifier", "fd_classifier"]),
        (["--reference={pictures}/small"], ["0.png is 28x28x1", "32x32x1"]),
        (["--reference={pictures}/colour"], ["0.png is 32x32x3", "32x32x1"]),
        (["--reference={pictures}/few"], ["number of real images", "is 20", "at least 129"]),
        (["--reference=test"], ["digits", "no split for tests"]),
        (["--reference={pictures}"], ["0.png is", "32x32x1"]),
        (["--reference={pictures}/large"], ["0.png is not a readable picture: repair or remove it."]),
        (["--reference={pictures}/cut"], ["0.jpg is cut short: repair or remove it."]),
        (
            ["--reference={pictures}/splits"],
            ["error: the splits in the reference", "splits are test: give the folder of one"],
        ),
        (["--reference={tmp}"], ["the reference is", "no pictures in it"]),
        (["--reference=tset"], ["tset", "train, test or a folder"]),
        (["--extractor-weights={tmp}/none.safetensors"], ["none.safetensors", "cannot be read"]),
        (["--extractor-weights={tmp}/some-0123abcd.safetensors"], ["some-0123abcd", "do not match the hash"]),
        (["--extractor-weights={tmp}/other.safetensors"], ["belongs to another network"]),
        (["--extractor-weights={tmp}/damaged.safetensors"], ["damaged.safetensors", "damaged"]),
        (["--extractor-weights={tmp}/weights.pth"], ["weights.pth", "Pickles are never loaded"]),
        (["--extractor=inception", "--metrics=kid", "--extractor-weights={tmp}/other.safetensors"], ["InceptionV3"]),
        (["--json=/no/such/place/e.json"], ["/no/such/place"]),
    ],
    ids=lambda value: value[0].split("=")[0] if value[0].startswith("--") else None,
)
def test_evaluate_says_what_is_wrong(small_run, pictures, tmp_path, capfd, words, expected):
    for name in ("some-0123abcd", "other"):
        save_file({"main.0.weight": torch.zeros(3)}, tmp_path / f"{name}.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes(b"no tensors")
    torch.save({"main.0.weight": torch.zeros(3)}, tmp_path / "weights.pth")  # noqa: TID251
    argv = [word.format(pictures=pictures, tmp=tmp_path) for word in words]
    said = complaint(capfd, "evaluate", str(small_run), *QUICK, *argv)
    assert all(word in said for word in expected), said


def test_without_inceptions_weights_it_is_said_what_to_put_where(small_run, tmp_path, capfd, monkeypatch):
    module = torch_fidelity.feature_extractor_inceptionv3
    address = "http://127.0.0.1:9/weights-inception-2015-12-05-6726825d.pth"
    monkeypatch.setattr(module, "URL_INCEPTION_V3", address)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    file = tmp_path / "hub" / "checkpoints" / address.rsplit("/", 1)[1]
    said = complaint(capfd, "evaluate", str(small_run), "--extractor=inception", "--metrics=kid")
    assert f"download {address} and put it at {file}" in said
    said = complaint(capfd, "train", *TINY, f"--run.dir={tmp_path / 'run'}", "--eval.every=2", "--eval.metrics=kid")
    assert f"put it at {file}" in said
    assert not (tmp_path / "run").exists()
    file.write_bytes(b"something else")
    said = complaint(capfd, "evaluate", str(small_run), "--extractor=inception", "--metrics=kid")
    assert "do not match the hash in their name" in said


def test_a_generator_alone_needs_pictures_to_be_compared_with(small_run, tmp_path, capfd):
    shutil.copytree(small_run / "generator", tmp_path / "generator")
    said = complaint(capfd, "evaluate", str(tmp_path / "generator"), *QUICK)
    assert "there is no recipe beside the generator" in said


def test_a_classifier_needs_labels(tmp_path, capfd):
    (tmp_path / "pictures").mkdir()
    for i in range(12):
        Image.new("L", (32, 32), i).save(tmp_path / "pictures" / f"{i}.png")
    source = ["--data.source=folder", f"--data.path={tmp_path / 'pictures'}", "--data.channels=1"]
    argv = [*EVALUATED, f"--run.dir={tmp_path / 'run'}", *source, "--eval.metrics=kd_classifier"]
    assert "no labels to train the classifier on" in complaint(capfd, "train", *argv)


def test_classes_cannot_be_asked_of_a_generator_without_labels(small_run, tmp_path, capfd):
    said = complaint(capfd, "sample", str(small_run), "--classes=0,3", f"--out={tmp_path / 'grid.png'}")
    assert "trained without labels" in said


def test_numbers_of_other_protocols_are_not_compared_in_a_resumed_run():
    """A run whose eval.num was changed begins a new best."""

    def report(step, fid, num):
        return evaluation.Measured({"fid": fid}, {"num": num}).report("run", step, None)

    standing = BestSoFar(EvalConfig())
    standing.add(report(10, 3.0, 100))
    standing.add(report(20, 3.5, 100))
    assert standing.best_step == 10
    assert standing.behind == pytest.approx(3.5 / 3)
    again = BestSoFar(EvalConfig())
    again.load_state(json.loads(json.dumps(standing.state())))
    assert again.best_step == 10
    again.add(report(30, 4.0, 200))
    assert again.best_step == 30


def test_evaluation_draws_from_a_stream_of_its_own():
    """Not the images that `sample` shows."""
    generator, _ = models.build(ModelConfig(width=2, latent_dim=4), models.ImageSpec(image_size=32, channels=1), seed=0)
    assert not torch.equal(generator.draw(0, seed=0, stream="evaluation"), generator.draw(0, seed=0))

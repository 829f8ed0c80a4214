"""Generators side by side: the picture, the nearest training images, and numbers only where they can be compared."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.neighbors import NearestNeighbors
from support.commands import complaint
from support.programs import launch
from support.runs import TINY

from distgan import cli, compare
from distgan.storage.report import Report, differences


def test_the_nearest_images_are_those_that_scikit_learn_finds():
    rng = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (300, 3, 8, 8), dtype=torch.uint8, generator=rng)
    samples = torch.randint(0, 256, (20, 3, 8, 8), dtype=torch.uint8, generator=rng)
    samples[0], samples[1] = pixels[250], pixels[7]
    found = compare.nearest(samples, pixels)
    flat = [images.flatten(1).double().numpy() / 127.5 for images in (samples, pixels)]
    search = NearestNeighbors(n_neighbors=2).fit(flat[1])
    distance, index = search.kneighbors(flat[0])
    assert found.index.tolist() == index[:, 0].tolist()
    assert np.allclose(found.distance, distance[:, 0] / 192**0.5, rtol=1e-5, atol=1e-6)
    apart, _ = search.kneighbors(flat[1][index[:, 0]])
    assert np.allclose(found.apart, apart[:, 1] / 192**0.5, rtol=1e-5)
    assert found.ratio[:2].tolist() == [0, 0]  # copies
    assert found.ratio[2:].min() > 0.5


def test_two_runs_make_one_picture_and_other_protocols_are_said(tmp_path, small_run, capfd):
    evaluated = [*TINY, "--eval.every=11", "--eval.extractor=classifier", "--train.steps=3"]
    runs = []
    for num in (200, 300):
        runs.append(tmp_path / f"run{num}")
        assert launch([*evaluated, f"--eval.num={num}", f"--run.dir={runs[-1]}"]) == [0]
    out, file = tmp_path / "compare.png", tmp_path / "compare.json"
    assert cli.main(["compare", *map(str, [*runs, small_run]), f"--out={out}", f"--json={file}"]) == 0
    said = capfd.readouterr().out
    assert f"cannot be compared: num is 200 in {runs[0]}, 300 in {runs[1]}; prdc is k 5, 200" in said
    assert said.count("fd_classifier") == 2
    assert said.count("not evaluated") == 1
    assert said.count("nearest training image: ") == 3
    report = json.loads(file.read_text())
    assert list(report["generators"]) == [*map(str, [*runs, small_run])]
    assert report["not_comparable"][0] == f"num is 200 in {runs[0]}, 300 in {runs[1]}"
    with Image.open(out) as picture:
        assert picture.width == 3 * 572 + 12
        assert picture.height > 560
        red = np.asarray(picture.convert("RGB")).astype(int)
        assert ((red[..., 0] - red[..., 1]) > 100).any()  # what cannot be compared is written in red
    assert cli.main(["compare", str(runs[0]), str(runs[0]), f"--out={out}"]) == 0
    assert "cannot be compared" not in capfd.readouterr().out


def test_what_only_one_was_measured_by_is_no_difference():
    protocols = {"a": {"num": 5, "prdc": "k 5"}, "b": {"num": 5, "kid": "blocks"}}
    reports = {name: Report(name, 1, {}, None, protocol) for name, protocol in protocols.items()}
    assert differences(reports) == []
    other = replace(reports["b"], protocol={"num": 6, "kid": "blocks"})
    assert differences({**reports, "b": other}) == ["num is 5 in a, 6 in b"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["/no/such/run"], ["/no/such/run", "does not exist"]),
        (["{run}", "--out=picture.jpg"], ["picture.jpg", ".png"]),
        (["{run}", "--json=/no/such/place/x.json"], ["/no/such/place"]),
    ],
)
def test_compare_says_what_is_wrong(small_run, tmp_path, capfd, words, expected):
    argv = [word.format(run=small_run) for word in words]
    said = complaint(capfd, "compare", *argv, *([] if "--out" in "".join(argv) else [f"--out={tmp_path / 'c.png'}"]))
    assert all(word in said for word in expected), said

"""`distgan judge` in a real headless browser, from the first click to the votes that are added up."""

import base64
import contextlib
import io
import json
import re
import shutil
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import binomtest
from support.commands import complaint
from support.generators import NAMES, exported
from support.programs import launch
from support.runs import TINY

from distgan import cli, load_generator
from distgan.evaluation import blind, votes
from distgan.evaluation.votes import Judged, Key

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
in_a_browser = pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")


@contextlib.contextmanager
def opened(page, **how):
    """The page as a file in a browser, which must neither complain nor ask for anything else."""
    from playwright.sync_api import sync_playwright

    complaints, asked = [], []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_context(**how).new_page()
        tab.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(page.as_uri())
        yield tab
        browser.close()
    assert not complaints
    assert all(url.startswith((page.as_uri(), "data:", "blob:")) for url in asked), asked


def shown(tab):
    """The pictures that are shown, uint8 (H, W, 3) each, out of the canvases."""
    read = "canvas => [...canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data]"
    sizes = tab.evaluate("[...document.querySelectorAll('canvas')].map(canvas => [canvas.height, canvas.width, 4])")
    pixels = tab.evaluate(f"[...document.querySelectorAll('canvas')].map({read})")
    return [np.array(data, np.uint8).reshape(size)[..., :3] for data, size in zip(pixels, sizes, strict=True)]


def known(images):
    """Pictures, uint8 (N, C, H, W), by their bytes as a page shows them, with their numbers."""
    return {image.permute(1, 2, 0).expand(-1, -1, 3).numpy().tobytes(): i for i, image in enumerate(images)}


def saved(tab, folder):
    with tab.expect_download() as download:
        tab.click("#save")
    file = folder / download.value.suggested_filename
    download.value.save_as(file)
    return file


@in_a_browser
def test_one_run_is_judged_among_real_pictures_by_keys(tmp_path, small_run, capfd):
    run, page, file = tmp_path / "run", tmp_path / "judge.html", tmp_path / "result.json"
    shutil.copytree(small_run, run)
    assert cli.main(["judge", str(run), f"--out={page}", "--num=6", "--seed=3"]) == 0
    assert f"keep {tmp_path / 'judge.key.json'}" in capfd.readouterr().out
    generated = known(load_generator(run).sample(6, seed=3))  # what tells the test which is which
    seen, generated_seen, real_seen = [], 0, 0
    with opened(page, viewport={"width": 1280, "height": 800}, device_scale_factor=1.5) as tab:
        assert tab.is_hidden("#asking")
        tab.click("#begin")
        while tab.is_visible("#asking"):
            at = len(seen)
            assert tab.inner_text("#at") == f"Picture {at + 1} of 12"
            (picture,) = shown(tab)
            if at == 3:  # an answer is taken back, and the page loaded again
                tab.keyboard.press("ArrowLeft")
                tab.keyboard.press("Backspace")
                tab.reload()
                assert np.array_equal(shown(tab)[0], picture)
            if at == 5:  # as large as fits, and each pixel a square of one colour
                found = np.asarray(Image.open(io.BytesIO(tab.locator("canvas").screenshot())).convert("RGB"))
                scale = len(found) // 32
                assert scale >= 14
                squares = found[: 32 * scale, : 32 * scale].reshape(32, scale, 32, scale, 3)[:, 2:-2, :, 2:-2]
                assert np.array_equal(squares, np.broadcast_to(picture[:, None, :, None], squares.shape))
            seen.append(picture.tobytes())
            if picture.tobytes() in generated:  # the first two are taken for real
                generated_seen += 1
                tab.keyboard.press("ArrowRight" if generated_seen <= 2 else "ArrowLeft")
            else:  # the last one is taken for generated
                real_seen += 1
                tab.keyboard.press("ArrowRight" if real_seen < 6 else "ArrowLeft")
        assert (generated_seen, real_seen, len({*seen})) == (6, 6, 12)
        said = tab.inner_text("#result")
        vote = saved(tab, tmp_path)
    assert re.findall(r"(\d+)% (\d+) of (\d+), 95% interval (\d+)% to (\d+)%", said) == [
        ("33", "2", "6", "10", "70"),
        ("83", "5", "6", "44", "97"),
        ("25", "3", "12", "9", "53"),
    ]
    content = json.loads(vote.read_text())
    assert vote.name == f"votes-{content['vote']}.json"
    argv = ["judge", "--votes", str(vote), f"--key={tmp_path / 'judge.key.json'}", f"--json={file}"]
    assert cli.main(argv) == 0
    assert "taken for real 0.33 (0.10 to 0.70); of real pictures 0.83 (0.44 to 0.97)" in capfd.readouterr().out
    (result,) = json.loads(file.read_text())["judged"]
    on_the_page = {"taken_for_real": content["result"]["taken_for_real"], "hype": content["result"]["hype"]}
    for name, share in on_the_page.items():
        for end, suffix in (("share", ""), ("low", "_low"), ("high", "_high")):
            assert result["metrics"][name + suffix] == pytest.approx(share[end], abs=1e-12)
    assert result["floor"]["taken_for_real"] == pytest.approx(5 / 6)
    assert (result["generator"], result["step"]) == (str(run), 11)
    protocol = result["protocol"]
    assert (protocol["people"], protocol["seed"], protocol["reference"]) == (1, 3, "split train of digits")
    assert "HYPE" in protocol["method"]
    # It stands beside the generator's other numbers, as long as that is the generator that was judged.
    assert cli.main(argv) == 0
    assert json.loads((run / "generator" / "judged.json").read_text()) == {"judged": [result]}  # once
    compared = tmp_path / "compare.json"
    assert cli.main(["compare", str(run), f"--out={tmp_path}/c.png", f"--json={compared}"]) == 0
    assert "taken for real 0.33 (0.10 to 0.70)" in capfd.readouterr().out
    assert json.loads(compared.read_text())["generators"][str(run)]["judged"] == [result]
    assert launch([*TINY, "--run.extend=1", f"--run.dir={run}"]) == [0]
    assert not (run / "generator" / "judged.json").exists()
    assert cli.main(argv) == 0
    assert "is not there any more" in capfd.readouterr().out
    assert not (run / "generator" / "judged.json").exists()


@in_a_browser
def test_two_generators_are_judged_in_pairs_by_two_people_who_touch(tmp_path, capfd):
    page, file = tmp_path / "pairs.html", tmp_path / "result.json"
    runs = [
        str(exported(tmp_path / name, names=NAMES, channels=1, width=width)) for name, width in (("a", 8), ("b", 6))
    ]
    assert cli.main(["judge", *runs, f"--out={page}", "--num=5"]) == 0
    one, other = map(load_generator, runs)
    labels = one.labels(0, seed=0)[:5]
    first, second = known(one.sample(5)), known(other.decode(other.inputs(0, seed=0)[0][:5], labels))
    files, places = [], []
    phone = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "color_scheme": "dark"}
    with opened(page, **phone) as tab:
        for person in range(2):
            tab.tap("#begin")
            while tab.is_visible("#asking"):
                pictures = [picture.tobytes() for picture in shown(tab)]
                place = next(place for place in (0, 1) if pictures[place] in first)
                assert first[pictures[place]] == second[pictures[1 - place]]
                assert tab.inner_text("#caption") == NAMES[labels[first[pictures[place]]]]
                places.append(place)
                names = [tab.get_attribute(f"#pictures button >> nth={at}", "aria-label") for at in (0, 1)]
                assert names == [f"the {word} picture looks more real" for word in ("first", "second")]
                boxes = [tab.locator("canvas").nth(at).bounding_box() for at in (0, 1)]
                assert boxes[0]["width"] == boxes[1]["width"] >= 160
                assert boxes[0]["width"] % 32 == 0
                size = "[document.documentElement.scrollWidth, document.documentElement.scrollHeight]"
                assert tab.evaluate(size) == [390, 844]  # all of it is seen without scrolling
                # The first person likes A's pictures, and the second B's, by the buttons below.
                tab.tap(f"#pictures button >> nth={place}" if not person else f"#answers button >> nth={1 - place}")
            said = tab.inner_text("#result")
            assert f"in which {runs[0]} looked more real than {runs[1]}" in said
            assert ("100% 5 of 5" if not person else "0% 0 of 5") in said
            files.append(saved(tab, tmp_path))
            tab.tap("#again")
    assert sorted(places) in ([0] * 4 + [1] * 6, [0] * 6 + [1] * 4)
    orders = [[*json.loads(file.read_text())["answers"]] for file in files]
    assert [{"first": "second", "second": "first"}[answer] for answer in orders[0]] == orders[1]
    key = f"--key={tmp_path / 'pairs.key.json'}"
    assert cli.main(["judge", "--votes", *map(str, files), key, f"--json={file}"]) == 0
    assert f"preferred to {runs[1]}, step 1 0.50" in capfd.readouterr().out
    results = json.loads(file.read_text())["judged"]
    assert [result["generator"] for result in results] == runs
    assert [result["metrics"]["preferred"] for result in results] == [0.5, 0.5]
    assert results[0]["metrics"]["preferred_low"] < 0.1  # two people who disagree about everything tell nothing
    assert results[0]["protocol"]["classes"] == "pairs of one class, named above them"
    assert results[0]["protocol"]["people"] == 2
    assert json.loads((tmp_path / "b" / "judged.json").read_text())["judged"] == results[1:]
    assert "is the same vote as" in complaint(capfd, "judge", "--votes", *map(str, [*files, files[0]]), key)


# What the page does not tell ------------------------------------------------------------------------------------------


def embedded(html):
    return json.loads(re.search(r'<script type="application/json" id="page">(.*?)</script>', html, re.DOTALL)[1])


def test_the_source_shows_neither_the_pictures_nor_which_is_which():
    """Real pictures that compress well and generated ones that do not, or the other way round, leave no trace."""
    flat = torch.arange(40, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 16, 16).contiguous()
    noise = torch.randint(0, 256, (40, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for generated, real in ((flat, noise), (noise, flat)):
        html = blind.page(blind.among_real(generated, real), page_id="x", names=["</script><b>"])
        assert html.count("</script>") == 2
        described = embedded(html)
        hidden = base64.b64decode(described.pop("hidden"))
        assert len(hidden) == 80 * (1 + 3 * 16 * 16)
        assert len(zlib.compress(hidden, 9)) >= len(hidden)  # no part of it is more regular than another
        assert not {"truth", "generated", "real"} & {*described, *map(str, described["captions"])}
        del described["mask"], described["shape"]
        assert described == {
            "page": "x", "kind": "single", "words": ["generated", "real"], "names": ["</script><b>"], "count": 80,
            "places": 1, "captions": [],
        }  # fmt: skip
    assert len(zlib.compress(flat.numpy().tobytes(), 9)) < flat.numel() / 10  # what would be seen without the mask


def test_the_order_is_drawn_anew_and_each_place_holds_either():
    images = torch.zeros(10, 1, 1, 1, dtype=torch.uint8)
    singles = np.array([blind.among_real(images, images + 1).truth for _ in range(400)]) == "real"
    assert (singles.sum(1) == 10).all()
    assert abs(singles.mean(0) - 0.5).max() < 5 * 0.5 / 400**0.5
    assert len({row.tobytes() for row in singles}) > 390
    both = [blind.pairs(images, images + 1, [""] * 10) for _ in range(400)]
    first = np.array([one.truth for one in both]) == "first"
    assert (first.sum(1) == 5).all()
    assert abs(first.mean(0) - 0.5).max() < 5 * 0.5 / 400**0.5
    for one in both[:20]:  # the truth is that of the pictures
        assert [int(pair[0]) for pair in one.pictures.flatten(1)] == [int(truth == "second") for truth in one.truth]
    asked = blind.among_real(images, images + 1)
    assert [int(picture) for picture in asked.pictures.flatten()] == [int(truth == "real") for truth in asked.truth]


# Intervals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("yes", "of"), [(0, 50), (1, 50), (12, 50), (25, 50), (50, 50), (0, 1), (1, 1)])
def test_one_persons_interval_is_scipys(yes, of):
    found = votes.share(np.arange(of)[None] < yes)
    expected = binomtest(yes, of).proportion_ci(method="wilson")
    assert found == pytest.approx((yes / of, expected.low, expected.high), abs=1e-12)


def test_the_variance_of_several_people_is_the_sum_over_what_they_share():
    """Cameron, Gelbach and Miller (2011), eq. 2.8: products of residuals over all pairs with the same person or
    picture, without corrections for few of them; here there are many."""
    rng = np.random.default_rng(0)
    people, pictures = 60, 50
    ease = rng.normal(size=(people, 1)) + rng.normal(size=(1, pictures))
    answers = rng.random((people, pictures)) < 1 / (1 + np.exp(-ease))
    residual = (answers - answers.mean()).ravel()
    person, picture = (grid.ravel() for grid in np.indices(answers.shape))
    variance = 0.0
    for i in range(answers.size):
        variance += residual[i] * residual[(person == person[i]) | (picture == picture[i])].sum()
    variance /= answers.size**2
    p, *bounds = votes.share(answers)
    n = p * (1 - p) / variance
    for bound in bounds:  # Wilson's bounds are the shares from which p lies 1.96 of their own standard errors
        assert bound * (1 - bound) * (1.96 / (p - bound)) ** 2 == pytest.approx(n, rel=0.03)
    assert answers.size / n > 10  # as many independent answers would give a far narrower interval


@pytest.mark.parametrize(("people", "spread"), [(4, 0.0), (4, 1.0), (30, 1.0)])
def test_intervals_hold_the_true_share_as_often_as_they_say(people, spread):
    rng, held, pictures = np.random.default_rng(1), [], 50
    draws = rng.normal(size=(200_000, 2)) * spread
    truth = (1 / (1 + np.exp(1 - draws.sum(1)))).mean()
    for _ in range(600):
        ease = spread * (rng.normal(size=(people, 1)) + rng.normal(size=(1, pictures)))
        _, low, high = votes.share(rng.random((people, pictures)) < 1 / (1 + np.exp(1 - ease)))
        held.append(low <= truth <= high)
    assert 0.87 < np.mean(held) < 0.99


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.fixture
def answered(tmp_path):
    """A page's key, and a vote."""
    key = Key("p1", "single", ["real", "generated"], [Judged("g", 1, str(tmp_path / "gone"))], {"method": "m"})
    key.write(tmp_path / "judge.key.json")
    (tmp_path / "vote.json").write_text(json.dumps({"page": "p1", "vote": "v1", "answers": ["real", "real"]}))
    return tmp_path


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"page": "p2"}, ["is a vote on the page p2", "that of p1"]),
        ({"answers": ["real"]}, ["2 answers, each generated or real"]),
        ({"answers": ["real", "first"]}, ["2 answers, each generated or real"]),
        ({"answers": ["real", {}]}, ["2 answers, each generated or real"]),
        ({"answers": None}, ["is no vote"]),
        ({"vote": "v1"}, ["is the same vote as"]),
        ("[1]", ["is no vote"]),
        ("{", ["is no vote"]),
        (b"\xff\xfe", ["is no vote"]),
        (None, ["cannot be read (No such file"]),
    ],
)
def test_votes_that_cannot_be_counted_are_refused(answered, capfd, content, expected):
    other = answered / "other.json"
    if isinstance(content, dict):
        vote = json.loads((answered / "vote.json").read_text()) | {"vote": "v2"}
        other.write_text(json.dumps(vote | content))
    elif content is not None:
        other.write_bytes(content.encode() if isinstance(content, str) else content)
    key = f"--key={answered / 'judge.key.json'}"
    said = complaint(capfd, "judge", "--votes", str(answered / "vote.json"), str(other), key)
    assert str(other) in said
    assert all(word in said for word in expected), said


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], ["there are 0 generators", "give RUN, or RUN_A RUN_B"]),
        (["{a}", "{a}", "{a}"], ["there are 3 generators"]),
        (["{a}", "--num=0"], ["--num is 0"]),
        (["{a}", "--out=page.htm"], ["page.htm", "must end in .html"]),
        (["{a}", "--out={page}"], ["which exists", "--overwrite"]),
        (["{a}"], ["no recipe beside the generator", "--reference a folder"]),
        (["{run}", "--num=2000"], ["--num is 2000", "1797 real pictures"]),
        (["{a}", "{grey}"], ["draws 32x32x3", "draws 32x32x1"]),
        (["{a}", "{a}", "--reference=train"], ["--reference has no meaning with two generators"]),
        (["{a}", "--json=x.json"], ["--json has no meaning without --votes"]),
        (["{a}", "--votes", "{page}"], ["--votes needs no RUN"]),
        (["--votes", "{page}"], ["--key is judge.key.json", "cannot be read"]),
        (["--votes", "{page}", "--key={page}"], ["is no key of a page"]),
    ],
)
def test_judge_says_what_is_wrong(tmp_path, small_run, capfd, monkeypatch, argv, expected):
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "there.html"
    page.write_text("a page")
    there = {"page": page, "run": small_run}
    for name, channels in (("a", 3), ("grey", 1)):
        if any(f"{{{name}}}" in word for word in argv):
            there[name] = exported(tmp_path / name, channels=channels)
    said = complaint(capfd, "judge", *[word.format(**there) for word in argv])
    assert all(word in said for word in expected), said
    assert page.read_text() == "a page"
    assert not [*tmp_path.glob("*.key.json")]

"""The page about runs: what it says, that it holds everything itself, and how it works in a real headless browser."""

import itertools
import json
import os
import re
import shutil
import signal
from functools import partial

import numpy as np
import pytest
from PIL import Image
from support.commands import complaint
from support.programs import at_the_end_of, full_disk_between, launch, nan_at, processes, signal_at
from support.runs import TINY, tensors, wait_for

from distgan import cli
from distgan.run_page import Page
from distgan.run_page.records import Curve, RunRecord
from distgan.storage.report import Report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
EVIL = ['"><script>alert(1)', "<img src=x onerror=alert(2)>"]


def text(page: Page) -> str:
    return b"".join(page.render()).decode()


def killed_once_there_is(checkpoint) -> None:
    wait_for(checkpoint.exists)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def restarted(tmp_path_factory):
    """A run with classes of odd names: stopped by a signal on another rank, killed, and done."""
    folder = tmp_path_factory.mktemp("report") / "a <b>run"
    pictures, rng = folder.with_name("pictures"), np.random.default_rng(0)
    for name in EVIL:
        (pictures / name).mkdir(parents=True)
        for i in range(12):
            Image.fromarray(rng.integers(0, 256, (32, 32), dtype=np.uint8)).save(pictures / name / f"{i}.png")
    argv = [*TINY, f"--run.dir={folder}", "--data.source=folder", f"--data.path={pictures}", "--track.sample_every=2"]
    argv += ["--model.conditional=true", "--track.report=true"]
    assert launch(argv, world=2, setups=[partial(signal_at, 2, 1, signal.SIGUSR2)]) == [0, 0]
    after_the_signal = (folder / "report.html").read_text()
    kill = partial(killed_once_there_is, folder / "checkpoints" / "step_00000006")
    assert launch(argv, setups=[partial(at_the_end_of, 8, 0, kill)]) == [-signal.SIGKILL]
    before_the_kill = (folder / "report.html").read_text()
    after_the_kill = text(Page([folder], folder / "out.html"))
    assert launch(argv) == [0]
    return folder, after_the_signal, before_the_kill, after_the_kill


@pytest.fixture
def made(tmp_path):
    """Makes a run's folder that has nothing but these lines of metrics, and a recipe."""

    def make(lines, *, name="made", recipe="train: {steps: 100}\n"):
        run = tmp_path / name
        run.mkdir()
        (run / "config.yaml").write_text(recipe)
        (run / "metrics.jsonl").write_text(
            "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
        )
        return run

    return make


# What a run's folder tells --------------------------------------------------------------------------------------------


def test_starts_are_recorded_with_who_stopped_the_run(restarted):
    folder, after_the_signal, before_the_kill, after_the_kill = restarted
    history = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert [line["event"] for line in history] == ["start", "end", "start", "start", "end"]
    saved = history[1]["step"]
    assert saved in (2, 3)
    assert [line["step"] for line in history] == [0, saved, saved, 6, 11]
    assert [line["processes"] for line in history if line["event"] == "start"] == [2, 1, 1]
    assert {"how": "signal", "why": "SIGUSR2"}.items() <= history[1].items()
    assert history[-1]["how"] == "done"
    assert "stopped by the signal SIGUSR2 (a cluster ahead of a limit, or a user), and saved" in after_the_signal
    lost = "<td>no end is recorded: killed, or lost with its machine or another process</td>"
    done = (folder / "report.html").read_text()
    # In the overview and in the table of starts; of a run that is done, only there.
    assert [page.count("<td>running</td>") for page in (before_the_kill, after_the_kill, done)] == [2, 0, 0]
    assert [page.count(lost) for page in (before_the_kill, after_the_kill, done)] == [0, 2, 1]
    assert [page.count("<td>done</td>") for page in (before_the_kill, after_the_kill, done)] == [0, 0, 2]


def test_what_the_guard_found_is_recorded_and_what_a_rollback_took_back(tmp_path):
    run = tmp_path / "run"
    argv = [*TINY, f"--run.dir={run}", "--guard.on_trouble=rollback", "--checkpoint.every=4"]
    assert launch(argv, setups=[partial(nan_at, 6, 0)]) == [0]
    assert "guard/trouble" not in (run / "metrics.jsonl").read_text()
    (abandoned,) = map(json.loads, (run / "metrics.abandoned.jsonl").read_text().splitlines())
    assert (abandoned["step"], "has become NaN or inf" in abandoned["guard/trouble"]) == (6, True)
    page = text(Page([run], tmp_path / "out.html"))
    assert "taken back by a rollback" in page
    assert "<caption>Rollbacks</caption>" in page
    failed = tmp_path / "failed"
    assert launch([*TINY, f"--run.dir={failed}"], setups=[partial(nan_at, 8, 0)]) == [3]
    assert "failed: NotFiniteError: at step 9 " in text(Page([failed], tmp_path / "out.html"))


def test_a_full_disk_ends_no_run_because_of_its_page(tmp_path, small_run, small_disk):
    run, log = small_disk / "run", tmp_path / "log"
    argv = [*TINY, f"--run.dir={run}", "--track.report=true", "--checkpoint.keep_last=1"]
    assert launch(argv, setups=[partial(full_disk_between, 4, 10, small_disk)], log=log) == [0], log.read_text()
    assert "distgan: warning: the report of step 6 could not be written" in log.read_text()
    assert tensors(run, 11).items() <= tensors(small_run, 11).items()  # samples that were missed are not drawn later
    assert "<td>done</td>" in (run / "report.html").read_text()
    assert not list(run.glob("*.tmp"))


def test_metrics_are_read_on_from_where_they_ended_and_anew_when_cut_back(made):
    run = made([{"step": step, "a": float(step)} for step in (1, 2, 3)])
    record = RunRecord(run)
    record.read()
    file = run / "metrics.jsonl"
    with file.open("a") as stream:
        stream.write('{"step": 4, "a": 4.0}\n{"step": 5, "a"')  # the end of a line that is still being written
    record.read()
    assert (record.metrics.step, record.metrics.curves["a"].values.tolist()) == (4, [1, 2, 3, 4])
    with file.open("a") as stream:
        stream.write(": 5.0}\n")
    record.read()
    assert (record.metrics.step, record.metrics.damaged) == (5, 0)
    for values in ([7.0], [8.0] * 50):  # cut back; and cut back and written on before it is read again
        new = file.with_name("new")
        new.write_text("".join(json.dumps({"step": step, "a": a}) + "\n" for step, a in enumerate(values, 1)))
        new.replace(file)
        record.read()
        assert (record.metrics.step, record.metrics.curves["a"].values.tolist()) == (len(values), values)


def test_a_thinned_curve_is_the_means_of_longer_intervals():
    curve = Curve()
    for step in range(1, 8):
        curve.steps.append(10 * step)
        curve.values.append(float("nan") if step == 4 else step)
    steps, values = curve.thinned(3)
    assert steps == [30, 60, 70]
    assert np.array_equal(values, [2, float("nan"), 7], equal_nan=True)
    assert curve.thinned(7)[0] == [10, 20, 30, 40, 50, 60, 70]


def test_damaged_and_missing_files_are_left_out(made, tmp_path):
    run = made(
        ["no JSON\n", "[1]\n", '{"step": "x"}\n', "\xff\n", {"step": 3, "loss/generator": 1.0}], recipe="{: no YAML"
    )
    for name in ("generator", "generator-best", "samples"):
        (run / name).mkdir()
        (run / name / "evaluation.json").write_text('{"metrics": []}')
    (run / "generator" / "config.json").write_text("[]")
    (run / "history.jsonl").write_text('no JSON\n{"event": "start"}\n3\n')
    (run / "rollbacks.jsonl").write_text("{}\n")
    (run / "samples" / "step_00000003.png").write_bytes(b"\x89PNG\r\n\x1a\n cut off")
    page = text(Page([run], tmp_path / "out.html"))
    for said in ("4 damaged lines", "There are no samples yet", "No run was evaluated", "No config.yaml can be read"):
        assert said in page
    empty = made([], name="empty")
    (empty / "metrics.jsonl").unlink()
    assert "There is no line of metrics yet" in text(Page([empty], tmp_path / "out.html"))


def test_numbers_stand_beside_their_protocol_and_floor_and_are_not_compared_across_protocols(made, tmp_path):
    runs = []
    for name, num in (("a", 100), ("b", 200)):
        protocol = {"num": num}
        run = made([{"step": s, "eval/fid": 9.0 - s, "eval/protocol": protocol} for s in (1, 2)], name=name)
        best = Report(str(run), 1, {"fid": 8.0}, {"fid": 0.5}, protocol, best_by="fid")
        (run / "generator-best").mkdir()
        (run / "generator-best" / "evaluation.json").write_text(json.dumps(best.to_json()))
        runs.append(run)
    page = text(Page(runs, tmp_path / "out.html"))
    assert "Cannot be compared: num is 100 in a, 200 in b." in page
    rows = re.findall(r'<th scope="row">fid</th>(.*)</tr>', page)
    assert [re.findall(r">([\d.]+)<", row) for row in rows] == [["8", "7", "0.5"]] * 2


def test_differences_between_recipes_say_what_changes_the_training(made, tmp_path):
    recipe = (
        "run: {{dir: x}}\noptim: {{lr: {lr}, schedule: constant}}\ntrain: {{steps: 5}}\ntrack: {{log_every: {log}}}\n"
    )
    runs = [made([], name=name, recipe=recipe.format(lr=lr, log=log)) for name, lr, log in (("a", 1, 5), ("b", 2, 6))]
    page = text(Page(runs, tmp_path / "out.html"))
    rows = re.findall(r'<th scope="row">(optim.lr|track.log_every)</th><td>(.)</td><td>(.)</td><td>(\w+)</td>', page)
    assert rows == [("optim.lr", "1", "2", "yes"), ("track.log_every", "5", "6", "no")]


def test_no_text_of_a_run_becomes_markup(made, tmp_path):
    end = "</script><script>alert(1)</script><!--<script>"
    run = made([{"step": 1, "guard/trouble": end, end: 1.0, "eval/protocol": {end: end}}], recipe=f"a: {{b: '{end}'}}")
    (run / "history.jsonl").write_text(json.dumps({"event": "start", "host": end, "step": 1}) + "\n")
    (run / "rollbacks.jsonl").write_text(json.dumps({"trouble": end, "lr": end}) + "\n")
    page = text(Page([run], tmp_path / "out.html"))
    assert page.count("<script") == page.count("</script") == 2  # the data and the script
    assert "<!--" not in page


def test_the_page_stays_below_a_megabyte_without_its_pictures(made, tmp_path):
    rng = np.random.default_rng(0)
    names = [f"loss/{i}" for i in range(15)]
    lines = [{"step": i, **dict(zip(names, rng.normal(size=15), strict=True))} for i in range(1, 2001)]
    lines[::2] = [{**line, "guard/trouble": "<" * 1000} for line in lines[::2]]
    recipe = "".join(f"g{i}: {{{', '.join(f'k{j}: 1' for j in range(9))}}}\n" for i in range(14))
    runs = [made(lines, name="0", recipe=recipe)]
    for i in range(1, 16):
        runs.append(shutil.copytree(runs[0], runs[0].with_name(str(i))))
    (runs[0] / "samples").mkdir()
    for step in range(50):
        picture = rng.integers(0, 256, (64, 64), dtype=np.uint8)
        Image.fromarray(picture).save(runs[0] / "samples" / f"step_{step:08d}.png")
    for some in (runs[:1], runs):
        page = text(Page(some, tmp_path / "out.html"))
        pictures = re.findall(r'data:image/png;base64,[^"]+', page)
        assert len(pictures) == 24
        assert "24 of 50 grids are here" in page
        assert 200_000 < len(page) - sum(map(len, pictures)) < 1_000_000


# The command ----------------------------------------------------------------------------------------------------------


def test_it_writes_into_the_run_or_where_it_is_told(small_run, tmp_path, capfd, monkeypatch):
    run = shutil.copytree(small_run, tmp_path / "run")
    assert cli.main(["report", str(run)]) == 0
    assert capfd.readouterr().out == f"{run / 'report.html'}\n"
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report", str(run), str(small_run)]) == 0
    page = (tmp_path / "report.html").read_text()
    assert f"distgan train --config {run}/config.yaml --run.dir={run} --run.extend=11" in page  # it was moved
    assert f"distgan train --config {small_run}/config.yaml --run.extend=11" in page
    assert f"distgan compare {run} {small_run}" in page


def test_watch_rewrites_the_page_until_the_run_is_done(small_run, tmp_path):
    run = shutil.copytree(small_run, tmp_path / "run")
    history, metrics, page = run / "history.jsonl", run / "metrics.jsonl", run / "report.html"
    start, end = history.read_text().splitlines(keepends=True)
    *before, last = metrics.read_text().splitlines(keepends=True)
    history.write_text(start)
    metrics.write_text("".join(before))

    def go_on(_: list[processes.Process]) -> None:
        wait_for(page.exists)
        assert "9 of 11" in page.read_text()
        with metrics.open("a") as stream:
            stream.write(last)
        wait_for(lambda: "11 of 11" in page.read_text())
        assert "<td>done</td>" not in page.read_text()
        history.write_text(start + end)

    assert launch([str(run), "--watch=0.05"], verb="report", meanwhile=go_on) == [0]
    assert "<td>done</td>" in page.read_text()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["/no/such/run"], ["/no/such/run is not a folder"]),
        (["{run}/samples"], ["is not a run, because it has no config.yaml"]),
        (["{run}", "--out=/no/such/place/x.html"], ["--out is /no/such/place/x.html"]),
        (["{run}", "--watch=0"], ["--watch is 0"]),
    ],
)
def test_report_says_what_is_wrong(small_run, capfd, words, expected):
    said = complaint(capfd, "report", *(word.format(run=small_run) for word in words))
    assert all(word in said for word in expected), said


# In a browser ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM:
        pytest.skip("needs Chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, tmp_path):
    """Opens the page about some runs; at the end nothing may have been complained of, and nothing asked for."""
    complaints, asked = [], []

    def show(*runs, **options):
        out = tmp_path / "page.html"
        Page(runs, out).write()
        tab = browser.new_page(**options)
        tab.on("console", lambda message: complaints.append(message.text))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.on("dialog", lambda dialog: complaints.append(dialog.message) or dialog.dismiss())
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(out.as_uri())
        return tab

    yield show
    assert complaints == []
    assert {url.split(":")[0] for url in asked} <= {"file", "data"}
    assert len([url for url in asked if url.startswith("file:")]) == 1


def curve(tab, chart, run):
    """The points of a run's curve."""
    path = tab.locator(f'figure[data-name="{chart}"] path.{run}:not(.raw):not(.mark)').get_attribute("d")
    return [tuple(map(float, point.split())) for point in re.split("[ML]", path)[1:]]


@pytest.mark.parametrize("width", [390, 1440])
def test_the_slider_moves_the_pictures_with_their_classes_in_rows(opened, restarted, width):
    folder = restarted[0]
    tab = opened(folder, viewport={"width": width, "height": 800})
    assert tab.locator(".rows li").all_text_contents() == EVIL
    shown = tab.locator(".samples img:visible")
    grids = sorted((folder / "samples").glob("step_????????.png"))
    assert [int(grid.stem[5:]) for grid in grids] == [2, 4, 6, 8, 10, 11]
    tab.focus("#when")
    for grid in reversed(grids):
        assert f"at step {int(grid.stem[5:])}, classes in rows" in shown.get_attribute("alt")
        assert tab.locator("#when").get_attribute("aria-valuetext") == f"step {int(grid.stem[5:])}"
        with Image.open(grid) as expected:
            assert shown.evaluate("one => [one.naturalWidth, one.naturalHeight]") == list(expected.size)
        tab.keyboard.press("ArrowLeft")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert shown.evaluate("one => getComputedStyle(one).imageRendering") == "pixelated"
    picture, rows = shown.bounding_box(), tab.locator(".rows").bounding_box()
    assert rows["height"] == pytest.approx(picture["height"], abs=1)  # so that names stand beside their rows


def test_runs_are_hidden_by_the_keyboard(opened, restarted, small_run):
    tab = opened(restarted[0], small_run)
    name = 'figure[data-name="loss/generator"]'
    assert tab.locator(f"{name} path.c0").count() > 0
    assert tab.locator(".samples figure:visible").count() == 2
    tab.focus('input[data-run="0"]')
    tab.keyboard.press("Space")
    assert tab.locator(f"{name} path.c0").count() == 0
    assert tab.locator(f"{name} path.c1").count() > 0
    assert tab.locator(".samples figure:visible").count() == 1
    styles = [
        tab.locator(f"label .swatch.{look}").evaluate("one => [getComputedStyle(one).strokeDasharray, "
        "getComputedStyle(one.firstChild).stroke]")
        for look in ("c0", "c1")
    ]  # fmt: skip
    assert styles[0][0] != styles[1][0]
    assert styles[0][1] != styles[1][1]
    tab.keyboard.press("Space")
    assert tab.locator(f"{name} path.c0").count() > 0


def test_curves_on_a_logarithmic_scale_smoothed_and_across_images(opened, made):
    values = [1.0, 10.0, 100.0, float("nan"), -1.0]
    lines = [{"step": i, "images_seen": 64 * i, "loss/generator": value} for i, value in enumerate(values, 1)]
    tab = opened(made(lines), color_scheme="dark")
    slider = tab.locator('figure[data-name="loss/generator"] input')
    assert slider.get_attribute("aria-valuetext") == "step 5: -1"
    (x1, y1), (x2, y2), (x3, y3), (x5, y5) = curve(tab, "loss/generator", "c0")
    assert (x2 - x1, x5 - x3) == (pytest.approx(x3 - x2, abs=0.2), pytest.approx(2 * (x3 - x2), abs=0.2))
    assert (y2 - y3) == pytest.approx(10 * (y1 - y2), rel=0.05)
    assert (y5 - y1) == pytest.approx((y1 - y2) * 2 / 9, abs=0.2)
    tab.check("#log")
    (_, y1), (_, y2), (_, y3) = curve(tab, "loss/generator", "c0")
    assert y1 - y2 == pytest.approx(y2 - y3, abs=0.2)
    assert "points not drawn, NaN, inf or not above 0: 2" in tab.locator(".values").text_content()
    tab.fill("#smoothing", "0.5")
    slider.focus()
    tab.keyboard.press("Home")
    read = []
    for _ in range(3):
        read.append(slider.get_attribute("aria-valuetext"))
        tab.keyboard.press("ArrowRight")
    average = (0.25 * 1 + 0.5 * 10) / 0.75, (0.125 * 1 + 0.25 * 10 + 0.5 * 100) / 0.875
    assert read == ["step 1: 1", f"step 2: {average[0]:.4g}", f"step 3: {average[1]:.4g}"]
    tab.select_option("#axis", "images")
    assert slider.get_attribute("aria-valuetext").startswith("images seen 256: ")
    tab.click("figure summary")
    assert tab.locator("figure tbody th").all_text_contents() == ["64", "128", "192", "256", "320"]
    tab.emulate_media(media="print")  # on paper it is light, whatever the screen is
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    tab.emulate_media(media="screen")
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 27)"


def test_the_keyboard_reaches_everything_and_screen_readers_find_names(opened, restarted):
    tab = opened(restarted[0])
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.className") == "skip"
    tab.keyboard.press("Enter")
    assert tab.evaluate("document.activeElement.id") == "main"
    unnamed = tab.evaluate(
        "[...document.querySelectorAll('input, select')].filter(one => !one.labels.length && !one.ariaLabel).length"
    )
    assert unnamed == 0
    charts = tab.locator("figure svg[role=img]")
    assert charts.count() > 5
    assert all("Last values: " in chart.get_attribute("aria-label") for chart in charts.all())
    headings = tab.evaluate("[...document.querySelectorAll('h1, h2, h3')].map(one => +one.tagName[1])")
    assert headings[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(headings))
    tables = tab.evaluate(
        "[...document.querySelectorAll('table')].every(one => one.caption && one.querySelector('th'))"
    )
    assert tables

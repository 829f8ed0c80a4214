"""README, CONTRIBUTING and docs/: their commands run, their diffs apply, their messages exist, and the site builds."""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from support.programs import launch
from support.runs import REPOSITORY, TINY

from distgan import __version__, api, cli, recipe
from distgan.recipe.identity import as_dict, flat

DOCUMENTS = [REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md")]
DOCUMENTS += [*sorted((REPOSITORY / "docs").glob("*.md")), *(REPOSITORY / "examples").glob("*/README.md")]

# Commands that do not run here, as patterns: the test that runs them, or what they need.
ELSEWHERE = {
    r"salloc|sbatch": "tests/cluster/test_slurm.py",
    r"mpirun -np 2 ": "tests/cluster/test_mpirun.py",
    r"mpirun -np 16 ": "needs several machines",
    r"(accelerate launch .*distgan\.|distgan )evaluate ": "tests/programs/test_evaluation.py",
    r"distgan judge --votes": "tests/programs/test_judge.py",
    r"distgan synthesize .*--benefit": "tests/programs/test_synthesize.py",
    r"distgan synthesize .*--min-confidence": "tests/programs/test_synthesize.py",
    r"distgan export .*--push-to-hub": "needs a network; tests/programs/test_share.py has the calls",
    r"distgan export .*--onnx": "tests/programs/test_onnx.py",
    r"distgan import ": "tests/programs/test_onnx.py",
    r".*--config configs/RECIPE.yaml SETTINGS": "tests/unit/test_recipes.py has each recipe, and a table the settings",
    r"pip install|npm install": "needs a network; tests/programs/test_wheel.py installs distgan",
    r"cd |\. \.venv/bin/activate|python3 -m http\.server": "the shell's and Python's own",
}
NOT_SETTINGS = (
    "py",
    "png",
    "parquet",
    "sbatch",
    "begin",
    "after_step",
)  # what stands behind the dot of a file or a function
# What makes the others quick. Options of `train` stand before the command's own, which win.
OPTIONS = {
    "train": ["--check", "--data.source=digits", "--data.id=null", "--data.path=null", "--eval.every=null"],
    "interpolate": ["--overwrite", "--steps=2"],
    "invert": ["--overwrite", "--steps=2", "--restarts=1"],
    "inpaint": ["--overwrite", "--steps=2", "--restarts=1"],
    "judge": ["--overwrite", "--num=4"],
    "synthesize": ["--overwrite"],
}


def commands() -> dict[str, str]:
    """Every command of a block of shell, in one line, with the document that has it first."""
    found: dict[str, str] = {}
    for document in DOCUMENTS:
        for block in re.findall(r"```sh\n(.*?)```", document.read_text(), re.S):
            for line in block.replace("\\\n", " ").splitlines():
                if words := " ".join(re.sub(r"(^|\s)#.*", "", line).split()):
                    found.setdefault(words, document.name)
    return found


HERE = [command for command in commands() if not any(re.match(pattern, command) for pattern in ELSEWHERE)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder that has what the commands name: pictures of eight classes, and a run on them under many names."""
    folder = tmp_path_factory.mktemp("documents")
    draw = np.random.default_rng(0)
    for split, count in {"train": 9, "test": 1}.items():
        for name in ("cat", "dog", "ship", "3", "4", "5", "6", "7"):
            (folder / "PICTURES" / split / name).mkdir(parents=True)
            for i in range(count):
                picture = Image.fromarray(draw.integers(0, 256, (32, 32, 3), dtype=np.uint8))
                picture.save(folder / "PICTURES" / split / name / f"{i}.png")
    pictures = ["--data.source=folder", f"--data.path={folder / 'PICTURES'}", "--model.conditional=true"]
    assert launch([*TINY, *pictures, "--train.steps=2", f"--run.dir={folder / 'RUN'}"]) == [0]
    names = ("OTHER_RUN", "RUN_A", "RUN_B", "textbook", "runs/quickstart", "runs/mine", "runs/a", "runs/b")
    for name in (*names, "new/runs/large"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(folder / "RUN")
    for name in ("configs", "launch"):
        (folder / name).symlink_to(REPOSITORY / name)
        (folder / "new" / name).symlink_to(REPOSITORY / name)
    (folder / "new" / "PICTURES").symlink_to(folder / "PICTURES")  # in `new` a training finds no run of its name
    mask = Image.new("L", (32, 32))
    mask.paste(255, (8, 8, 16, 16))
    mask.save(folder / "scratches.png")
    found = ["invert", str(folder / "RUN"), str(folder / "PICTURES"), f"--out={folder / 'latents.safetensors'}"]
    assert cli.main([*found, *OPTIONS["invert"]]) == 0
    return folder


@pytest.mark.parametrize("command", HERE)
def test_a_command_runs(command, place, monkeypatch):
    """As it stands, but for `OPTIONS`; and what several processes are to run, on one."""
    monkeypatch.chdir(place)
    words = shlex.split(command)
    if words[0] == "make":
        subprocess.run([*words, "--dry-run"], cwd=REPOSITORY, check=True, capture_output=True, timeout=60)
        return
    if words[0] in ("tail", "ls"):
        subprocess.run(words, check=True, capture_output=True, timeout=60)
        return
    if words[:2] == ["accelerate", "launch"]:
        assert words[2] == "--config_file"
        assert Path(words[3]).is_file()
        assert words[4] == "-m"
        words[:6] = ["distgan", words[5].removeprefix("distgan.")]
    assert words[0] in ("distgan", ".venv/bin/distgan")
    verb, rest = words[1], [word.replace("1000", "4") if words[1] == "synthesize" else word for word in words[2:]]
    options = OPTIONS.get(verb, [])
    if verb == "train":
        monkeypatch.chdir("new")
    assert cli.main([verb, *options, *rest] if verb == "train" else [verb, *rest, *options]) == 0


def test_commands_that_do_not_run_here_are_known():
    """Each pattern is needed, and the test that it names is there."""
    for pattern, where in ELSEWHERE.items():
        assert any(re.match(pattern, command) for command in commands()), pattern
        for test in re.findall(r"tests/\S+\.py", where):
            assert (REPOSITORY / test).is_file()
    for command in commands():
        for file in re.findall(r"(?:configs|launch|slurm)/\w+\.\w+", command.replace("RECIPE", "quickstart")):
            assert (REPOSITORY / file).is_file(), command


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_verbs_and_settings_that_a_document_names_exist(document):
    text = re.sub(r"```.*?```", "", document.read_text(), flags=re.S)
    for span in re.findall(r"`([^`]+)`", text):
        for verb in re.findall(r"(?:^| )distgan ([a-z]+)", span) + re.findall(r"-m distgan\.([a-z]+)", span):
            assert verb in cli.VERBS or (verb, document.name) == ("count", "CONTRIBUTING.md"), span
    keys = flat(as_dict(recipe.Config(run=recipe.RunConfig(dir="runs/x"))))
    groups = {key.partition(".")[0] for key in keys}
    for group, name in re.findall(r"(?:--|`)([a-z]+)\.([a-z]\w*)(?=[`=, :])", text):
        assert group not in groups or f"{group}.{name}" in keys or name in NOT_SETTINGS, f"{group}.{name}"


def said() -> list[str]:
    """Every text in the package, with … in place of what is filled in."""
    texts = []
    for file in (REPOSITORY / "distgan").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                texts.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(re.sub(r"\{[^}]*\}", "…", node.value))
    return texts


def test_quoted_messages_exist():
    text = (REPOSITORY / "docs" / "troubleshooting.md").read_text()
    quoted = re.findall(r"^> (.+)$", text, re.M)
    quoted += [words for row in re.findall(r"the doctor: (.+?) \|", text) for words in re.findall(r'"(.+?)"', row)]
    assert len(quoted) > 25
    texts = said()
    for message in quoted:
        parts = [re.escape(part) for part in re.split(r"…", message)]
        assert any(re.search(".*".join(parts), text, re.S) for text in texts), message


def test_the_additions_of_contributing_apply_and_work(tmp_path):
    """The five diffs, together: one run that uses a network, a loss and a data set, then a metric and a verb."""
    shutil.copytree(REPOSITORY / "distgan", tmp_path / "distgan", ignore=shutil.ignore_patterns("__pycache__"))
    diffs = re.findall(r"```diff\n(.*?)```", (REPOSITORY / "CONTRIBUTING.md").read_text(), re.S)
    assert len(diffs) == 5
    (tmp_path / "all.diff").write_text("".join(diffs))
    apply = ["git", "apply", "-C1", "all.diff"]
    done = subprocess.run(apply, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    script = """
import torch
from distgan import cli, evaluation, recipe
run = ["--run.dir=run", "--data.source=photos", "--model.architecture=leaky", "--model.width=4", "--loss.name=minimax"]
tiny = ["--train.steps=2", "--train.batch_size=16", "--track.to=none", "--track.log_every=1"]
assert cli.main(["train", *run, *tiny]) == 0
assert cli.main(["count", "run"]) == 0
names = recipe.EvalConfig(extractor="classifier", metrics="md_classifier").measured
real, fake = (evaluation._Features(evaluation.Moments(2), None, None) for _ in range(2))
real.moments.add(torch.tensor([[3.0, 4.0]])), fake.moments.add(torch.zeros(1, 2))
formula = evaluation.FORMULAS[recipe.EVAL_METRICS["classifier"][names[0]]]
assert formula(names[0], real, fake, torch.device("cpu")) == {"md_classifier": 5.0}
"""
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 2/2" in done.stdout
    assert re.search(r"^\d{4,}$", done.stdout, re.M)  # what `count` prints


def test_the_site_builds_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path):
    """A broken link, anchor or docstring is a warning, and so an error."""
    build = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--quiet", "-c", "docs", "-d", tmp_path / "cache"]
    done = subprocess.run([*build, ".", tmp_path / "site"], cwd=REPOSITORY, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    for page in (tmp_path / "site").rglob("*.html"):
        loaded = re.findall(r"<(?:script|img|link|iframe)[^>]*?(?:src|href)=\"([^\"]+)\"", page.read_text())
        assert not [place for place in loaded if re.match(r"https?:|//", place)], page
    reference = (tmp_path / "site" / "docs" / "reference.html").read_text()
    for name in api.__all__:
        assert f'id="distgan.api.{name}"' in reference, f"docs/reference.rst lacks {name}"
    assert (tmp_path / "site" / "index.html").is_file()


def test_the_release_says_one_version_and_ci_runs_what_is_tested():
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert citation["version"] == __version__
    assert f"## {__version__}" in (REPOSITORY / "CHANGELOG.md").read_text()
    job = yaml.safe_load((REPOSITORY / ".github" / "workflows" / "ci.yml").read_text())["jobs"]["test"]
    assert job["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13"]
    assert ".ci/run" in [step.get("run") for step in job["steps"]]

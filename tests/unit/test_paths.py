"""Paths have `~` and `$NAME` wherever they are written, and commands that are printed work when pasted."""

import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image
from support.programs import launch
from support.runs import TINY

from distgan import cli, paths, recipe
from distgan.recipe import Config, DataConfig, RunConfig, TrainConfig
from distgan.run.folder import RunFolder

BIN = Path(sys.executable).parent
KEYS = ["run.dir", "data.path", "data.cache", "train.init_from", "eval.extractor_weights", "eval.reference"]


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder, with a variable that names another, as their ranks have them, too."""
    (tmp_path / "home").mkdir()
    (tmp_path / "cwd").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.chdir(tmp_path / "cwd")
    return tmp_path


@pytest.mark.parametrize(
    ("written", "meant"), [("~/a b", "{home}/home/a b"), ("${SCRATCH}y/$SCRATCH", "{home}/scratchy/{home}/scratch")]
)
def test_every_key_that_takes_a_path_has_it_expanded(home, written, meant):
    written_down = {}
    for key in KEYS:
        group, name = key.split(".")
        written_down.setdefault(group, {})[name] = written
    Path("recipe.yaml").write_text(yaml.safe_dump(written_down))
    (home / "home" / "other.yaml").write_text("run: {dir: r}\n")
    for argv in (["--config", "recipe.yaml"], ["--config=~/other.yaml", *(f"--{key}={written}" for key in KEYS)]):
        groups = recipe.as_dict(recipe.parse(argv)[0])
        found = {f"{group}.{name}": value for group, one in groups.items() for name, value in one.items()}
        assert {key: found[key] for key in KEYS} == dict.fromkeys(KEYS, meant.format(home=home))


def test_a_configuration_made_in_python_has_its_paths_expanded_once_and_for_all(home):
    made = Config(run=RunConfig(dir="~/r"), data=DataConfig(path="$SCRATCH"), train=TrainConfig(init_from="~/q"))
    assert (made.run.dir, made.data.path) == (f"{home}/home/r", f"{home}/scratch")
    Path("saved.yaml").write_text(recipe.dump(made))
    loaded = recipe.load(Path("saved.yaml"))
    assert loaded == made
    # A run of a version that kept the path as it was written can still be resumed.
    Path("saved.yaml").write_text(recipe.dump(made).replace(str(home / "home"), "~"))
    assert recipe.load(Path("saved.yaml")) == made
    assert RunConfig(dir=Path("~/r")) == made.run


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("a/${NO_SUCH}x", "run.dir is a/${NO_SUCH}x, but the environment variable NO_SUCH is not set: "),
        ("$EMPTY/x", "run.dir is $EMPTY/x, but the environment variable EMPTY is empty: "),
        ("", "run.dir is empty: give a path (the current folder is ./)."),
        ("~no-such-user/x", "run.dir is ~no-such-user/x, but this machine has no user no-such-user: "),
        ("$ODD/x", "run.dir is $ODD/x, which stands for /x/o $dd/x, and that has a variable again: "),
        ("$ODDER", "run.dir is $ODDER, which stands for /x/$HOME, and that has a variable again: "),
        ("a\0b", "run.dir has a null character in it"),
    ],
)
def test_what_cannot_be_expanded_is_said(home, monkeypatch, written, said):
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.setenv("ODD", "/x/o $dd")
    monkeypatch.setenv("ODDER", "/x/$HOME")
    with pytest.raises(ValueError, match=re.escape(said)):
        RunConfig(dir=written)


def test_what_is_no_variable_and_no_home_stays(home):
    for written in ("a~b/~", "./~/x", "costs $5", "a$", "owner/name", "$", "a/$(b)"):
        assert paths.expanded("key", written) == written
    (home / "cwd" / "my $HOME").mkdir()
    for here in ("./my $HOME/new", f"{home}/cwd/my $HOME/new"):
        assert paths.expanded("key", here) == here  # that folder, which is there
    assert paths.expanded("key", "my $HOME") == f"my {home}/home"
    assert paths.expanded("key", "./your $HOME") == f"./your {home}/home"


def test_a_folder_that_no_file_system_takes_is_refused(tmp_path):
    made = Config(run=RunConfig(dir=f"{tmp_path}/{'x' * 300}"))
    with pytest.raises(
        ValueError, match=r"^run\.dir is .*, which cannot be read \(File name too long\): choose another\.$"
    ):
        RunFolder(made.run.dir).check(made)


HARD = [
    "plain/a.b-c",
    "a b",
    "my \"run\" $HOME 'x'",
    "-n",
    "~",
    "$HOME",
    "ü 猫",
    "a\nb\tc\\d'e",
    "`id`;!x*?[a]{b,c}#&|<>",
]


@pytest.mark.parametrize("name", HARD)
def test_a_quoted_path_is_one_word_that_means_it(home, name):
    printed = subprocess.run(["bash", "-c", f"printf '%s\\0' {paths.quoted(name)}"], capture_output=True).stdout
    (word,) = os.fsdecode(printed).split("\0")[:-1]
    assert os.path.normpath(word) == name
    assert not word.startswith("-")
    assert "\n" not in paths.quoted(name)  # a line stays a line
    Path(name).mkdir(parents=True)
    assert Path(paths.expanded("key", word)).samefile(name)  # distgan's words are expanded once more


@pytest.mark.parametrize("name", HARD)
def test_a_command_can_be_pasted_on_a_terminal_without_its_letters(home, monkeypatch, name):
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    printed = subprocess.run(["bash", "-c", f"printf %s {paths.quoted(name)}"], capture_output=True).stdout
    assert os.path.normpath(os.fsdecode(printed)) == name
    assert paths.quoted(name).isascii()


def test_what_a_run_prints_can_be_pasted_whatever_its_folder_is_called(home):
    """Each command of the end of a run, and that of a refused recipe, run by bash in the same folder."""
    log, folder = home / "log", home / "my \"run\" $HOME 'x' `id` ü\n!"
    (folder / "-r" / "wandb" / "offline-run-1").mkdir(parents=True)  # as wandb leaves one
    assert launch([*TINY, f"--run.dir={folder}/-r"], log=log) == [0]
    told = log.read_text()
    commands = re.findall(r"(?:see it|list them|draw from it|last line|browse it|upload it): ([^;\n]+)", told)
    assert [command.split()[0] for command in commands] == ["xdg-open", "ls", "distgan", "tail", "wandb", "wandb"]
    opened = f'xdg-open() {{ [ -f "$1" ]; }}; wandb() {{ [ -d "$2" ]; }}; export PATH={shlex.quote(str(BIN))}:$PATH'
    for command in commands:
        done = subprocess.run(["bash", "-c", f"set -e; {opened}; {command}"], capture_output=True, text=True)
        assert done.returncode == 0, (command, done.stderr)
    assert Path("grid.png").exists()
    with pytest.raises(ValueError, match="is a run with another recipe") as refused:
        RunFolder(folder / "-r").check(recipe.parse([*TINY, f"--run.dir={folder}/-r", "--optim.lr=1"])[0])
    offered = re.search(r"(--train.init_from=.*)\.$", str(refused.value))[1]
    words = subprocess.run(["bash", "-c", f"printf '%s|' {offered}"], capture_output=True, text=True).stdout
    assert recipe.parse(["--run.dir=new", words.removesuffix("|")])[0].train.init_from == f"{folder}/-r"


def test_every_verb_expands_its_paths(home, small_run, capfd):
    (home / "home" / "run").symlink_to(small_run)
    (home / "scratch").mkdir()
    (home / "home" / "pictures").mkdir()
    for i in range(12):
        Image.new("L", (32, 32), i).save(home / "home" / "pictures" / f"{i}.png")
    verbs = [
        ("sample", ["~/run", "--num=4", "--out=$SCRATCH/grid.png"], "grid.png"),
        ("compare", ["~/run", "~/run/generator", "--out=$SCRATCH/c.png", "--json=${SCRATCH}/c.json"], "c.json"),
        ("export", ["~/run", "--to=$SCRATCH/exported"], "exported/model.safetensors"),
        ("data", ["~/pictures", "--cache=$SCRATCH/cache", "--out=$SCRATCH/data.png"], "data.png"),
        ("data", ["folder", "--path=~/pictures", "--cache=~/cache", "--out=$SCRATCH/data2.png"], "data2.png"),
        ("doctor", ["--json=$SCRATCH/doctor.json"], "doctor.json"),
        (
            "evaluate",
            [
                *("~/run", "--extractor=classifier", "--extractor-weights=~/weights", "--json=$SCRATCH/e.json"),
                *("--num=12", "--reference=~/pictures", "--metrics=prdc"),
            ],
            None,
        ),
    ]
    said = ""
    for verb, argv, made in verbs:
        code = cli.main([verb, *argv])
        said += capfd.readouterr().err
        if made is not None:
            assert code == 0, said
            assert (home / "scratch" / made).exists()
    assert f"{home}/home/weights" in said  # which are not there
    assert not [one for one in Path.cwd().iterdir() if one.name.startswith(("~", "$"))]
    assert cli.main(["sample", "$NO_SUCH/run"]) == 2
    assert (
        "distgan: error: RUN is $NO_SUCH/run, but the environment variable NO_SUCH is not set" in capfd.readouterr().err
    )

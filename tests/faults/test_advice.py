"""What the guard does about a trouble and advises, in each case that there is."""

import re

import pytest
from support.programs import launch
from support.runs import TINY, steps

from distgan.recipe import GuardConfig
from distgan.run.rollback import Verdict, WayBack, decide

OPEN, LATER, NOTHING, USED_UP = WayBack("older", 1), WayBack("later", 1), WayBack("none", 0), WayBack("older", 2)
TURN_ON = "--guard.on_trouble=rollback goes on from the last good checkpoint."
START_ANEW = (
    "There is no whole checkpoint from before the trouble: start a new run with a lower optim.lr, or with a smaller "
    "checkpoint.every, which saves more often."
)
ALLOW_MORE = (
    "It was rolled back 2 times, and guard.rollbacks is 2: --guard.on_trouble=rollback --guard.rollbacks=3 goes back "
    "once more, or start a new run with a lower optim.lr."
)
ENDED = (
    "This was the last step: start a new run with a lower optim.lr; --train.init_from=CHECKPOINT starts it from an "
    "earlier checkpoint."
)
GO_ON, BACK = Verdict("go on", ""), Verdict("roll back", "")

CASES = {
    # on_trouble, the way back: of NaN or inf, and of a collapse
    ("warn", OPEN): (Verdict("fail", TURN_ON), GO_ON),
    ("warn", NOTHING): (Verdict("fail", START_ANEW), GO_ON),
    ("warn", USED_UP): (Verdict("fail", ALLOW_MORE), GO_ON),
    ("stop", OPEN): (Verdict("fail", TURN_ON), Verdict("save and stop", TURN_ON)),
    ("stop", LATER): (Verdict("fail", START_ANEW), Verdict("save and stop", START_ANEW)),
    ("stop", NOTHING): (Verdict("fail", START_ANEW), Verdict("save and stop", START_ANEW)),
    ("stop", USED_UP): (Verdict("fail", ALLOW_MORE), Verdict("save and stop", ALLOW_MORE)),
    ("rollback", OPEN): (BACK, BACK),
    ("rollback", LATER): (BACK, BACK),
    ("rollback", NOTHING): (Verdict("fail", START_ANEW), Verdict("save and stop", START_ANEW)),
    ("rollback", USED_UP): (Verdict("fail", ALLOW_MORE), Verdict("save and stop", ALLOW_MORE)),
}


@pytest.mark.parametrize(("on_trouble", "way"), CASES)
def test_each_case_has_its_verdict(on_trouble, way):
    guard = GuardConfig(on_trouble=on_trouble, rollbacks=2)
    not_finite, collapse = CASES[on_trouble, way]
    assert decide(guard, way, not_finite=True, ended=False) == not_finite
    assert decide(guard, way, not_finite=False, ended=False) == collapse
    assert decide(guard, way, not_finite=True, ended=True) == not_finite  # it is not saved, so the run is not complete
    saved = collapse.action == "save and stop"
    assert decide(guard, way, not_finite=False, ended=True) == (Verdict("save and stop", ENDED) if saved else collapse)


def test_once_is_said_as_once():
    guard = GuardConfig(on_trouble="rollback", rollbacks=1)
    assert "rolled back 1 time, and" in decide(guard, WayBack("older", 1), not_finite=True, ended=False).advice


def test_a_checkpoint_from_within_the_trouble_is_not_called_a_good_one(tmp_path):
    """Stopped at a step that is collapsed already, then resumed: what was saved then is no way back."""
    run = tmp_path / "run"
    argv = [*COLLAPSED, f"--run.dir={run}", "--checkpoint.every=1000", "--guard.patience=3"]
    assert launch([*argv, "--run.stop_at=2"]) == [0]
    assert launch([*argv, "--guard.on_trouble=stop"], log=tmp_path / "log") == [6]
    (said,) = re.findall("distgan: error: (.*)", (tmp_path / "log").read_text())
    assert said.endswith(f"collapses. The run is saved. {START_ANEW}")
    assert "stopped by the guard, and saved: step 3 of 11" in (tmp_path / "log").read_text()


# Every generator starts collapsed: here that is judged at once.
COLLAPSED = [*TINY, "--guard.after=0", "--guard.patience=2", "--track.log_every=1", "--track.sample_every=100"]


def test_a_collapse_before_the_first_checkpoint_is_saved_and_not_said_to_have_lost_anything(tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    argv = [*COLLAPSED, f"--run.dir={run}", "--guard.on_trouble=stop", "--checkpoint.every=1000"]
    assert launch(argv, log=log) == [6]
    assert steps(run) == [2]
    (said,) = re.findall("distgan: error: (.*)", log.read_text())
    assert said.endswith(f"collapses. The run is saved. {START_ANEW}")


def test_a_run_that_used_up_its_rollbacks_is_told_so_and_what_it_is_told_works(tmp_path):
    run = tmp_path / "run"
    argv = [*COLLAPSED, f"--run.dir={run}", "--checkpoint.every=1", "--guard.rollbacks=1"]
    advised = ALLOW_MORE.replace("2 times", "1 time").replace("rollbacks is 2", "rollbacks is 1").replace("=3", "=2")
    for on_trouble in ("rollback", "stop"):
        log = tmp_path / on_trouble
        assert launch([*argv, f"--guard.on_trouble={on_trouble}"], log=log) == [6]
        assert log.read_text().count("rolled back from step") == (on_trouble == "rollback")
        (said,) = re.findall("distgan: error: (.*)", log.read_text())
        assert said.endswith(f"collapses. The run is saved. {advised}")
    assert launch([*argv, "--guard.on_trouble=rollback", "--guard.rollbacks=2"], log=tmp_path / "more") == [6]
    assert (tmp_path / "more").read_text().count("rolled back from step") == 1

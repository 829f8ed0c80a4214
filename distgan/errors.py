"""The errors that end a command, with their exit codes."""

import difflib
from collections.abc import Sequence


class UserError(ValueError):
    """A mistake of the user's. The message is one sentence that says what to do; exit code 2."""


class StoppedError(RuntimeError):
    """A fault that is reported in one sentence, without a traceback."""

    exit_code: int


class NotFiniteError(StoppedError):
    """A loss, a score or a tensor to be saved is NaN or inf: the training has diverged."""

    exit_code = 3


class LostRankError(StoppedError):
    """Another rank died, failed or hangs."""

    exit_code = 4


class NotSavedError(StoppedError):
    """The disk is full or fails; what was saved before is untouched."""

    exit_code = 5


class TroubleError(StoppedError):
    """The training collapses, and the guard was asked to stop it, or the run cannot roll back."""

    exit_code = 6


def mark_reported(error: BaseException) -> BaseException:
    """Marks an error that another rank reports, so that it is printed once."""
    error.add_note(_TOLD)
    return error


def is_reported(error: BaseException) -> bool:
    """Tells whether another rank reports this error."""
    return _TOLD in getattr(error, "__notes__", ())


_TOLD = "(reported by another rank)"


def nearest(word: str, known: Sequence[str]) -> str:
    """Returns `did you mean "x"?` if a known word is close, otherwise the list of known words."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f'did you mean "{close[0]}"?' if close else f"known are {', '.join(known)}."


def unknown_name(key: str, name: str, known: Sequence[str]) -> str:
    """Returns a sentence about an unknown name in a comma list."""
    several = (
        "" if len(known) < 2 else f' Separate several names with commas ("{known[0]},{known[1]}"); null means none.'
    )
    return f'{key} has "{name}", which is unknown: {nearest(name, known)}{several}'

"""What ends a run, each with its exit code and one sentence. A user's mistake is a ValueError, exit code 2."""


class StoppedError(RuntimeError):
    """A fault that is told in one sentence, without a traceback."""

    exit_code: int


class NotFiniteError(StoppedError):
    """A tensor to be saved has a number that is not finite: the training has diverged."""

    exit_code = 3


class LostRankError(StoppedError):
    """Another rank died, failed or hangs."""

    exit_code = 4


class NotSavedError(StoppedError):
    """The disk is full or fails; what was saved before is untouched."""

    exit_code = 5


class TroubleError(StoppedError):
    """The training collapses, and the guard was asked to stop it, or cannot go back any more."""

    exit_code = 6


def spoken_for(error: BaseException) -> BaseException:
    """Marks an error that another rank tells, so that it is told once."""
    error.add_note(_TOLD)
    return error


def is_spoken_for(error: BaseException) -> bool:
    """Tells whether another rank reports this error."""
    return _TOLD in getattr(error, "__notes__", ())


_TOLD = "(told by another rank)"

"""What goes wrong in kfdist, by who has to act: the user, the machine, or the run itself; and what a shell sees of it.

Every message names the value received, what is allowed, and what to do.
"""

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of `kfdist` and of every process it starts."""

    DONE = 0
    """All that was asked for is done."""

    ENVIRONMENT = 1
    """The input is fine but the machine isn't, or a process of the run failed."""

    BAD_INPUT = 2
    """A value is wrong; no other machine would make it right."""

    RESUMABLE = 75
    """Stopped before the last step; the same command resumes (EX_TEMPFAIL of sysexits.h)."""

    INTERRUPTED = 130
    """Ended at once by a second Ctrl-C, without a checkpoint."""


class KfdistError(Exception):
    """Base of all errors that kfdist raises on purpose."""


class ConfigError(KfdistError, ValueError):
    """Bad input: a value that no environment could make right. Commands exit with 2.

    Attributes:
        message: What is wrong, without the path.
        path: The dotted path of the offending field, or an empty string.
    """

    def __init__(self, message: str, *, path: str = "") -> None:
        super().__init__(f"{path}: {message}" if path else message)
        self.message = message
        self.path = path

    def at(self, path: str) -> "ConfigError":
        """Returns the same complaint about a field that goes by another path where the user wrote it."""
        return ConfigError(self.message, path=path)

    def under(self, prefix: str) -> "ConfigError":
        """Returns the same complaint with its path below `prefix`."""
        return self.at(f"{prefix}.{self.path}" if self.path else prefix)


class EnvironmentFault(KfdistError, RuntimeError):
    """The input is fine but the machine isn't: a port in use, an unreachable controller. Commands exit with 1."""


class RankFailed(EnvironmentFault):
    """Some ranks could not do their part of what all do together; raised on all ranks alike, with every reason."""


class Interrupted(KfdistError):
    """An agreed wait ended without its result, on all ranks at the same place; the gradient step was not applied.

    A checkpoint written now describes the step as not yet done, and a resumed run takes it up again.

    Attributes:
        reason: "stop" (somebody asked for it) or "wait_limit" (the wait outlasted its limit).
    """

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class RanksDiverged(KfdistError, RuntimeError):
    """The digests of the parameters differ between ranks."""


class LossNotFinite(KfdistError, ArithmeticError):
    """The loss is infinite or NaN. `AdaptiveStep.step` raises it before it changes anything; a run ends with it."""


class ModelChanged(KfdistError, RuntimeError):
    """A layer was replaced, resized, moved or converted after the preconditioner was made."""


class CheckpointError(KfdistError, RuntimeError):
    """A checkpoint is missing, torn or of another model."""


class KfdistWarning(UserWarning):
    """Something is allowed but surely not meant."""

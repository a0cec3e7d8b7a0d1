"""What goes wrong in kfdist, by who has to act: the person who typed, the machine, or the run itself.

Every message names the value received, what is allowed, and what to do.
"""


class KfdistError(Exception):
    """Base of all errors that kfdist raises on purpose."""


class ConfigError(KfdistError, ValueError):
    """Bad input: a value that no environment could make right. Commands exit with 2.

    Attributes:
        path: The dotted path of the offending field, or an empty string.
    """

    def __init__(self, message: str, *, path: str = "") -> None:
        super().__init__(f"{path}: {message}" if path else message)
        self.path = path


class EnvironmentFault(KfdistError, RuntimeError):
    """The input is fine but the machine isn't: a port in use, an unreachable controller. Commands exit with 1."""


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
    """The training loss became infinite or NaN; the parameters are of no use any more."""


class ModelChanged(KfdistError, RuntimeError):
    """A layer was frozen, replaced or resized after the preconditioner was made."""


class CheckpointError(KfdistError, RuntimeError):
    """A checkpoint is missing, torn or of another model."""


class KfdistWarning(UserWarning):
    """Something is allowed but surely not meant."""

"""How the commands and the processes of a run end, as seen by a shell or a scheduler."""

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
    """Ended at once by a second Ctrl-C, without a checkpoint of its own."""

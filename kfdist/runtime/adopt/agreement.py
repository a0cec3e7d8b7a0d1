"""What all ranks agree on before a step: the table of the last one, and what users ask of the run."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from kfdist.comm.background import TableExchange
from kfdist.errors import Interrupted, RanksDiverged
from kfdist.links.link import AbstractLink
from kfdist.policies import tuning
from kfdist.policies.adoption import ABSENT, AdoptionLedger, AgreedTable, decode_table, encode_table
from kfdist.runtime.in_force import SettingsInForce
from kfdist.types import ENDED_PHASES, Desired, GroupName, MetricSample, Obeyed, RunSettings

WAITING_ROUND_SECONDS = 1.0
"""Longest a rank blocks on its own between two agreed rounds, so that a waiting run still hears stop and resume."""

_PAUSED_ROUND_SECONDS = 0.25

_DESIRED = tuple(Desired)

_REFUSED_CHARACTERS = 500
"""Of a reason why settings were refused; all that is told again fits in one message."""

_TOLD_REVISIONS = 32
"""How many of the last revisions the controller is told again at each beat, as beats may be lost."""


class Agreement:
    """What users ask of the run, as it holds on this rank; it changes only on an agreed table or round.

    Args:
        table: The exchange of tables and rounds.
        link: Rank 0's is where new settings arrive.
        worker_rank: This rank.
        in_force: The settings of the method, which it changes.
        groups: The names of all groups, which users may want inverted.

    Attributes:
        settings: What all ranks obey.
        in_force: The settings of the method in force on all ranks.
        stop: Whether all ranks know that somebody asked to stop.
        biases: What all ranks together know of the blocks' biases (`kfdist.capture.biases`), as of the last table.
    """

    def __init__(
        self,
        table: TableExchange,
        link: AbstractLink,
        worker_rank: int,
        in_force: SettingsInForce,
        groups: Sequence[GroupName] = (),
    ) -> None:
        self._table = table
        self._link = link
        self._worker_rank = worker_rank
        self._step = 0
        self._obeyed: list[Obeyed] = []
        self._groups = tuple(groups)
        self._fresh: set[GroupName] = set()
        self._stop_requested = False
        self._gave_up = False
        self._told_end = False
        self.in_force = in_force
        self.settings = RunSettings()
        self.stop = False
        self.biases: Sequence[int] = ()

    # One table a step ------------------------------------------------------------------------------------------------

    def table(self, step: int) -> AgreedTable | None:
        """Completes the table started one step ago, obeys it, and waits, with all ranks, while the run is paused.

        Returns:
            The table; None at a process's first step and where a step is done again, for which none was started.

        Raises:
            RanksDiverged: The ranks' parameters differ.
            Interrupted: On all ranks, when a stop was asked for during a pause.
        """
        self._step, self._gave_up = step, False
        columns = self._table.complete()
        if columns is None:
            return None
        self.biases, columns = columns[: len(self.biases)], columns[len(self.biases) :]
        table = decode_table(columns)
        if table.digests_differ:
            raise RanksDiverged(
                f"the parameters differ between ranks before step {step}; the run stops. Likely causes: ranks that see "
                "different learning rates or clip gradients before reducing them, or faulty memory. Resume from the "
                "last checkpoint"
            )
        self.obey(revision=table.revision, stop=table.stop)
        self.wait_while_paused(step)
        return table

    def announce(self, ledgers: Sequence[AdoptionLedger], digest: Tensor | None, biases: Sequence[int]) -> None:
        """Starts the table that `table` completes in the next step.

        Args:
            ledgers: This rank's, one per group.
            digest: An int64 scalar of this rank's parameters; None on steps that don't compare them.
            biases: What this rank knows of the blocks' biases.
        """
        self.biases = biases
        columns = encode_table(ledgers, revision=self._newest_revision, stop=self.stop_requested)
        self._table.start([*biases, *columns], digest)

    def finish(self) -> None:
        """Completes the table under way; `close` needs quiet ranks."""
        self._table.complete()

    @property
    def bytes_sent(self) -> int:
        """Bytes of this rank's tables and rounds."""
        return self._table.bytes_sent

    # What users ask for ----------------------------------------------------------------------------------------------

    def take_fresh(self) -> frozenset[GroupName]:
        """Returns the groups that users want inverted since the last call, whatever their period."""
        fresh, self._fresh = frozenset(self._fresh), set()
        return fresh

    def state_dict(self) -> dict[str, Any]:
        """Returns what `take_fresh` would; there is something when a step was interrupted before it asked."""
        return {"wanted": sorted(self._fresh)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` returned."""
        self._fresh = set(state.get("wanted", ()))  # older checkpoints lack it

    def request_stop(self) -> None:
        """This rank was asked to stop; all ranks will know at the same step. Safe to call from a signal handler."""
        self._stop_requested = True

    @property
    def stop_requested(self) -> bool:
        """Whether this rank itself was asked to stop, by a signal or by its link.

        Any rank's link may say so: each courier hears from the controller, and one that learns that a newer start of
        the run exists has to end this one, whatever rank it serves.
        """
        return self._stop_requested or self._link.settings().desired is Desired.STOPPED

    @property
    def _newest_revision(self) -> int | None:
        """The newest settings heard of; None on every rank but 0, which alone contributes them."""
        return self._link.settings().revision if self._worker_rank == 0 else None

    def obey(self, *, revision: int, stop: bool) -> None:
        """Takes in what a table or round said; where the revision moved, all ranks share rank 0's settings."""
        self.stop = self.stop or stop
        if revision <= self.settings.revision:
            return
        heard = self._link.settings() if self._worker_rank == 0 else RunSettings()
        before = self.settings
        self.settings = _decode(self._table.share(_encode(heard, self._groups)), self._groups)
        if self.settings.refresh_serial > before.refresh_serial:
            self._fresh |= set(self.settings.refresh)
        refused = self.in_force.take(self.settings.changes)[:_REFUSED_CHARACTERS]
        obeyed = Obeyed(revision=self.settings.revision, step=self._step, refused=refused)
        self._obeyed = [*self._obeyed, obeyed][-_TOLD_REVISIONS:]
        self.stop = self.stop or self.settings.desired is Desired.STOPPED
        self._report(self._step)  # at once: a run that waits or is paused tells nothing else

    def agree_on_biases(self, biases: Sequence[int]) -> None:
        """Takes in at once, in a round, what all ranks know of the blocks' biases, where no table brings it."""
        self.biases = self._table.agree(biases) if biases else ()

    # Rounds ----------------------------------------------------------------------------------------------------------

    def agree(self, columns: Sequence[int]) -> list[int]:
        """One round without command columns, for exchanges that must not be broken off; returns the maximum."""
        return self._table.agree(columns)

    def round(self, columns: Sequence[int], *, expired: bool = False) -> list[int]:
        """One agreed round with `columns` beside the command columns; returns the reduced `columns`.

        Args:
            columns: This rank's contribution to a maximum.
            expired: Rank 0's judgement that the wait has lasted too long; ignored from others.

        Raises:
            Interrupted: On all ranks, when a stop was asked for or rank 0 judged the wait expired.
        """
        revision = self._newest_revision
        head = [
            ABSENT if revision is None else revision,
            int(self.stop_requested or self.stop),
            int(expired and self._worker_rank == 0),
        ]
        agreed = self._table.agree([*head, *columns])
        self.obey(revision=agreed[0], stop=bool(agreed[1]))
        if self.stop:
            raise Interrupted("the run was asked to stop while it waited", reason="stop")
        if agreed[2]:
            self._gave_up = True
            raise Interrupted(
                "the wait for an inversion outlasted wait_limit_seconds: no owner delivered it. Look at `kfdist "
                "status` and the pool's log, then start the run again: it resumes at this step",
                reason="wait_limit",
            )
        return agreed[3:]

    def wait_while_paused(self, step: int) -> float:
        """Blocks at `step`, with all ranks, while the settings in force say "paused"; returns for how many seconds.

        There is no limit: whoever paused the run decides when it goes on.

        Raises:
            Interrupted: On all ranks, when a stop was asked for.
        """
        if self.settings.desired is not Desired.PAUSED:
            return 0.0
        begun = time.monotonic()
        self.tell(step, "paused")
        while self.settings.desired is Desired.PAUSED:
            # Not the link's wait: it returns at once when a result lies there, which nobody takes during a pause.
            time.sleep(_PAUSED_ROUND_SECONDS)
            self.round([])
        self.tell(step, "running")
        return time.monotonic() - begun

    def tell(self, step: int, phase: str, samples: Sequence[MetricSample] = ()) -> None:
        """Tells the controller what the run is doing at `step`, and what it goes by."""
        self._told_end = phase in ENDED_PHASES
        self._report(step)
        self._link.beat(step, phase, samples)

    def tell_end(self, step: int, *, failed: bool) -> None:
        """Tells the controller how this rank ends, unless it has been told; silence would be that of a lost rank."""
        if not self._told_end:
            self._told_end = True
            # What the run goes by was told when it was taken up; to tell it again would ask schedules of one more step.
            self._link.beat(step, "failed" if failed else "stopped" if self.stop or self._gave_up else "finished", ())

    def _report(self, step: int) -> None:
        if self._worker_rank == 0:
            self._link.report(replace(self.in_force.told(step), obeyed=tuple(self._obeyed)))


def _encode(settings: RunSettings, groups: Sequence[GroupName]) -> list[float]:
    return [
        float(settings.revision),
        float(_DESIRED.index(settings.desired)),
        float(settings.checkpoint_serial),
        float(settings.refresh_serial),
        *tuning.encode(settings.changes),
        *(float(not settings.refresh or group in settings.refresh) for group in groups),
    ]


def _decode(values: Sequence[float], groups: Sequence[GroupName]) -> RunSettings:
    names, wanted = len(tuning.NAMES), values[4 + len(tuning.NAMES) :]
    return RunSettings(
        revision=int(values[0]),
        desired=_DESIRED[int(values[1])],
        checkpoint_serial=int(values[2]),
        refresh_serial=int(values[3]),
        changes=tuning.decode(values[4 : 4 + names]),
        refresh=tuple(group for group, is_wanted in zip(groups, wanted, strict=True) if is_wanted),
    )

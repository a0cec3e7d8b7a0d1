"""The adopt verbs: brings results to all ranks, and takes them into use at the same step everywhere."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kfdist.errors import Interrupted, KfdistWarning
from kfdist.policies.adoption import NO_VERSION, AgreedTable
from kfdist.runtime.adopt.exchange import Arrival, SnapshotExchange
from kfdist.runtime.adopt.snapshots import SnapshotInstaller
from kfdist.runtime.adopt.start import forget_lost
from kfdist.runtime.counters import PipelineCounters
from kfdist.runtime.in_force import SettingsInForce
from kfdist.runtime.invert.own import OwnInversion
from kfdist.runtime.invert.shipping import Inverting
from kfdist.runtime.track import Track
from kfdist.types import GroupName


@dataclass
class Adopting:
    """Brings results to all ranks and takes them into use. All ranks make the same calls.

    Attributes:
        tracks: All groups.
        in_force: The settings of the method in force.
        exchange: Broadcasts results.
        installer: Takes them into use.
        inverting: Ships what a wait is for.
        counters: Counts adoptions, and what is less than one.
        answered: Whether owners are known to answer, or were waited for in vain.
    """

    tracks: Sequence[Track]
    in_force: SettingsInForce
    exchange: SnapshotExchange
    installer: SnapshotInstaller
    inverting: Inverting
    counters: PipelineCounters
    answered: bool = field(default=False, init=False)

    def follow(self) -> None:
        """Goes over to another way of adopting where users have asked for it. All ranks must call it.

        Nothing travels then, and no version is waited for that a newer one has replaced.
        """
        exact = self.in_force.settings.lag is not None
        changed = [track for track in self.tracks if track.jobs.queued is not exact]
        if not changed:
            return
        self.inverting.ship_all()
        for track in changed:
            self.exchange.abandon(track)
            track.jobs.queued = exact
        forget_lost(changed, self.exchange.agreement, exact=False)

    def bring(self, step: int, table: AgreedTable | None) -> dict[int, Arrival]:
        """Waits for the results due now, and lets the others travel in the background.

        Args:
            step: The step.
            table: What the ranks agreed on; None where no table was started a step ago.

        Returns:
            By group index, what every rank is known to hold now; equal on all ranks.

        Raises:
            Interrupted: On all ranks, inside a wait.
        """
        due = self._due(step)
        if due or self.in_force.settings.lag is not None:
            brought = self._await(step, due, exact=True)
            self.answered = self.answered or bool(brought)
            return brought
        if not self.answered and (asked_for := {t.group.index: t.pending[-1] for t in self.tracks if t.pending}):
            return self._await_first(step, asked_for)
        arrived = self.exchange.received_by_all(table) if table is not None else {}
        if table is not None:
            self.exchange.enter(table)
        self.exchange.poll()
        stale = self._too_old(step, arrived)
        for index in stale:
            # Where the inversion turns out to have failed, the old snapshot stays in use, counted as "kept".
            self.counters.fallbacks["waited"] += 1
            self.exchange.abandon(self.tracks[index])
        return {**arrived, **self._await(step, stale, exact=False)}

    def take(
        self, step: int, arrived: Mapping[int, Arrival], inverted: Mapping[int, OwnInversion]
    ) -> tuple[tuple[GroupName, int], ...]:
        """Takes into use what every rank holds, or has inverted for itself.

        Args:
            step: The step.
            arrived: By group index, what `bring` returned.
            inverted: By group index, what the ranks have inverted at this step.

        Returns:
            Group and version of each adoption.
        """
        adopted = []
        for index, arrival in sorted(arrived.items()):
            track = self.tracks[index]
            if self.installer.install(track, arrival.version, arrival.payload):
                track.delay = step - arrival.version
            track.adopt(arrival.version)
            adopted.append((track.group.name, arrival.version))
        for index, made in sorted(inverted.items()):
            track = self.tracks[index]
            self.installer.install_own(track, step, made)
            track.delay = 0
            adopted.append((track.group.name, step))
        self.counters.adoptions += len(adopted)
        return tuple(adopted)

    def settle(self, step: int) -> None:
        """Looks, at the end of a step, whether what the ranks inverted themselves had any statistics."""
        plain = self.installer.settle(step)
        if plain:
            self.counters.fallbacks["no_snapshot"] += plain

    def finish(self) -> None:
        """Completes what travels to this rank; `close` needs quiet groups."""
        self.exchange.finish()

    def _due(self, step: int) -> dict[int, int]:
        """Returns, by group index, the versions to be adopted at `step`: at the lag, and version 0 at step 0 always."""
        under_way = {track.group.index: track.pending[0] for track in self.tracks if track.pending}
        if step == 0:
            return dict.fromkeys(under_way, 0)
        lag = self.in_force.settings.lag
        return {index: oldest for index, oldest in under_way.items() if lag is not None and oldest <= step - lag}

    def _too_old(self, step: int, arrived: Mapping[int, Arrival]) -> dict[int, int]:
        """Returns the versions to wait for where the hard bound is passed and its policy is to wait.

        A group about to adopt a version that is young enough does not wait, nor does one with nothing under way. The
        others wait for the oldest version that is young enough, else for the newest under way.
        """
        adoption = self.in_force.settings.adoption
        stale = {}
        for track in self.tracks:
            arrival = arrived.get(track.group.index)
            newest = NO_VERSION if arrival is None else arrival.version
            under_way = [version for version in track.pending if version > newest]
            if not (under_way and track.decision(step, adoption).wait):
                continue
            if arrival is not None and not adoption.decide(step - newest).wait:
                continue
            young = [version for version in under_way if not adoption.decide(step - version).wait]
            stale[track.group.index] = young[0] if young else under_way[-1]
        return stale

    def _await_first(self, step: int, asked_for: Mapping[int, int]) -> dict[int, Arrival]:
        """Waits for the first inverses that a resumed run asks for, as a new one does at step 0.

        Its ranks may be there long before its owners, and would use up the inverses of the checkpoint meanwhile. Where
        nobody answers it goes on all the same, as it would have had its owners been lost while it trained.

        Raises:
            Interrupted: On all ranks, when a stop was asked for.
        """
        try:
            brought = self._await(step, asked_for, exact=False)
        except Interrupted as interruption:
            if interruption.reason != "wait_limit":
                raise
            brought = {}
            self.exchange.agreement.tell(step, "running")
            if self.exchange.communicator.rank == 0:
                warnings.warn(
                    f"no owner delivered an inverse in {self.exchange.wait_limit_seconds:g} s; the run goes on with "
                    "those of its checkpoint, which get staler until one does",
                    KfdistWarning,
                    stacklevel=2,
                )
        self.answered = True
        return brought

    def _await(self, step: int, wanted: Mapping[int, int], *, exact: bool) -> dict[int, Arrival]:
        if not wanted:
            return {}
        self.inverting.ship_all()
        return self.exchange.await_results(step, wanted, exact=exact)

    def state_dict(self, *, snapshots: bool = True) -> dict[str, Any]:
        """Returns, by group, the snapshot in use and what is under way; the same on all ranks.

        Args:
            snapshots: Whether the snapshots are in it, as bytes, which take as much memory again as they do.
        """
        named = {track.group.name: track for track in self.tracks}
        return {
            "snapshots": {
                name: {"version": track.snapshot.version, "payload": track.snapshot.encoded()}
                for name, track in named.items()
                if snapshots and track.snapshot.preconditioners
            },
            "adopted": {name: track.ledger.adopted for name, track in named.items()},
            "starving": [name for name, track in named.items() if track.without_statistics],
            "fruitless": {name: track.fruitless for name, track in named.items() if track.fruitless},
            "pending": {name: list(track.pending) for name, track in named.items()},
            "memories": {
                block: state
                for track in self.tracks
                for block, memory in track.memories.items()
                if (state := memory.state_dict())
            },
            "calibrations": {
                name: track.calibrations for name, track in named.items() if track.calibrations is not None
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` returned, before the state's "step"."""
        for track in self.tracks:
            name = track.group.name
            if name in state["snapshots"]:
                snapshot = state["snapshots"][name]
                self.installer.install(track, int(snapshot["version"]), snapshot["payload"])
            track.ledger.restore(int(state["adopted"][name]))
            track.pending = [int(version) for version in state["pending"][name]]
            track.without_statistics = name in state["starving"]
            track.fruitless = int(state.get("fruitless", {}).get(name, 0))  # older checkpoints lack it
            if name in state["calibrations"]:
                track.calibrations = int(state["calibrations"][name])
            for block in track.memories.keys() & state["memories"].keys():
                self.installer.restore_memory(track, block, state["memories"][block])
            self.installer.ask_whether_measured(track)
        self.installer.settle(int(state["step"]) - 1)

"""The invert verb: ships reduced statistics to the inverters, and takes in what they have finished."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kfdist.curvature.inverter import AbstractInverter
from kfdist.curvature.jobs import NO_STATISTICS, failure_result, job_parts
from kfdist.runtime.counters import PipelineCounters
from kfdist.runtime.in_force import SettingsInForce
from kfdist.runtime.invert.departures import Departure, Reduced, job_record
from kfdist.runtime.invert.job_book import JobBook
from kfdist.runtime.invert.own import OwnInversion, invert_own
from kfdist.runtime.plan.groups import BlockGroup
from kfdist.runtime.reduce.reducer import Reduction
from kfdist.runtime.settings import JobTerms
from kfdist.runtime.track import Track
from kfdist.seeds import block_seed
from kfdist.types import BlockName, GroupName, Job, JobResult, LateBytes
from kfdist.wire.records import tensor_fields


@dataclass
class Inverting:
    """Has inverted what was reduced: by the link's inverters, or at once by every rank for itself.

    Attributes:
        tracks: All groups, by name.
        in_force: The settings of the method in force.
        terms: What its jobs say beside their content.
        book: Jobs and results of the groups this rank ships.
        rank: This rank.
        counters: Counts what comes back.
        departures: What has not reached the host yet, oldest first.
        bytes_received: Payload bytes of results.
    """

    tracks: Mapping[GroupName, Track]
    in_force: SettingsInForce
    terms: JobTerms
    book: JobBook
    rank: int
    counters: PipelineCounters
    departures: list[Departure] = field(default_factory=list, init=False)
    bytes_received: int = field(default=0, init=False)

    def take(self, reduction: Reduction, damping: float) -> dict[int, OwnInversion]:
        """Ships what has reached the host, and takes in what has come back.

        Args:
            reduction: This step's reduced statistics; they are shipped now or, where the host would have to wait for
                the device, in a later step.
            damping: lambda of this step.

        Returns:
            By group index, what every rank inverted for itself.
        """
        shipped = [track for track in reduction.tracks if not track.group.own]
        for track in shipped:
            track.ship(reduction.step)
        mine = [track for track in shipped if track.group.courier_rank == self.rank]
        if mine:
            # Kept as of now: how soon the copy reaches the host must not change what the job says.
            previous = {track.group.name: track.snapshot.states for track in mine}
            # The largest first: whoever is free takes the next one, and the last one to end is a small one.
            groups = sorted((track.group for track in mine), key=lambda group: group.spec.cost, reverse=True)
            tensors = reduced_tensors(groups, reduction)
            self.departures.append(Departure(reduction.step, groups, tensors, damping=damping, previous=previous))
        own = invert_own(reduction, seed=self.in_force.settings.seed)
        for track in reduction.tracks:
            if track.group.index in own and track.group.courier_rank == self.rank:  # each is counted once a run
                self.counters.completed[track.group.inverter.name] += 1
        while self.departures and self.departures[0].ready():
            self._ship(self.departures.pop(0))
        self.collect()
        return own

    def ship_all(self) -> None:
        """Ships also what has not reached the host yet: somebody is about to wait for it, or writes it down."""
        while self.departures:
            self._ship(self.departures.pop(0))

    def _ship(self, departure: Departure) -> None:
        version = departure.version
        for group, tensors in departure.arrived():
            if not tensors:
                payload = failure_result({block.name: NO_STATISTICS for block in group.blocks})
                self._announce(JobResult(group=group.name, version=version, payload=payload, seconds=0.0, owner="none"))
                continue
            encode = partial(
                _encode,
                group.inverter,
                tensors,
                damping=departure.damping,
                seeds={name: block_seed(self.in_force.settings.seed, name, version) for name in tensors},
                previous={} if group.inverter.online else departure.previous[group.name],
                threads=torch.get_num_threads(),
            )
            self.book.ship(self._job(group.name, version, LateBytes(encode)))

    def _job(self, group: GroupName, version: int, content: LateBytes) -> Job:
        return Job(
            run=self.terms.run,
            epoch=self.terms.epoch,
            group=group,
            version=version,
            content=content,
            deadline_seconds=self.terms.deadline_seconds,
            # Under asap any owner will do.
            fingerprint=self.terms.fingerprint if self.in_force.settings.lag is not None else "",
        )

    def _announce(self, result: JobResult) -> None:
        """Freezes a result that no running job waits for, and lets all ranks know of it."""
        track = self.tracks[result.group]
        track.jobs.put(result)
        track.ledger.announce(result.version)

    def collect(self) -> None:
        """Takes in what the inverters have finished, and lets all ranks know of it."""
        self.book.collect()
        for result in self.book.take_news():
            track = self.tracks[result.group]
            track.ledger.announce(result.version)
            self.counters.inverted(track.group.inverter.name, result.seconds)
            self.bytes_received += len(result.payload)

    def state_dict(self) -> dict[str, Any]:
        """Returns this rank's jobs and results that are not adopted yet, by "group@version".

        With them, by group, the version and result that an online group's next job goes on from.
        """
        self.ship_all()
        jobs = [(job, {"job": job.payload}) for track in self.tracks.values() for job in track.jobs.unanswered.values()]
        results = [
            (result, {"result": result.payload, "seconds": result.seconds, "owner": result.owner})
            for track in self.tracks.values()
            for result in track.jobs.results.values()
        ]
        return {
            "in_flight": {
                f"{each.group}@{each.version}": {"group": each.group, "version": each.version, **content}
                for each, content in [*jobs, *results]
            },
            "online": {
                name: {"version": track.jobs.head[0], "payload": track.jobs.head[1]}
                for name, track in self.tracks.items()
                if track.jobs.head is not None
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over, of the groups this rank now ships, what `state_dict` returned on any rank, oldest first.

        Of other groups nothing is kept: it would grow old and be saved again. Where the state lacks what an online
        group goes on from (another rank's was lost), that is the snapshot in use.
        """
        mine = {name: track for name, track in self.tracks.items() if track.group.courier_rank == self.rank}
        for name, track in mine.items():
            for head in (state["snapshots"].get(name), state["online"].get(name)):
                if head is not None:
                    track.jobs.remember(int(head["version"]), head["payload"])
        entries = [entry for entry in state["in_flight"].values() if entry["group"] in mine]
        for entry in sorted(entries, key=lambda entry: (entry["group"], entry["version"])):
            group, version = str(entry["group"]), int(entry["version"])
            if "job" in entry:
                self.book.ship(self._job(group, version, LateBytes.of(entry["job"])))
            else:
                seconds, owner = float(entry["seconds"]), str(entry["owner"])
                payload = entry["result"]
                self._announce(JobResult(group=group, version=version, payload=payload, seconds=seconds, owner=owner))


def _encode(inverter: AbstractInverter, tensors: Reduced, **said: Any) -> list[bytes | memoryview]:
    """Divides the sums and writes a job down, in a thread of the link."""
    statistics = {name: job_record(inverter.statistic, of_block) for name, of_block in tensors.items()}
    return job_parts(inverter=inverter, statistics=statistics, **said)


def reduced_tensors(groups: Sequence[BlockGroup], reduction: Reduction) -> Reduced:
    """Returns what was reduced of the groups' blocks, rows where there are any."""
    found: dict[BlockName, Mapping[str, Tensor]] = {}
    for block in (block for group in groups for block in group.blocks):
        if block.name in reduction.samples:
            found[block.name] = tensor_fields(reduction.samples[block.name])
        elif reduction.sums.get(block.name):
            found[block.name] = reduction.sums[block.name]
    return found

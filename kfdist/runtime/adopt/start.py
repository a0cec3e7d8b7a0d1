"""The first step of a process: all ranks make sure that they begin in the same place.

A checkpoint is loaded by each rank by itself. Had one loaded another file, or none, the ranks would enter different
collectives and hang; and a version under way whose job is in nobody's state would be waited for in vain.
"""

import hashlib
import json
import warnings
from typing import TYPE_CHECKING

from kfdist.comm.together import require_equal
from kfdist.errors import CheckpointError, ConfigError, KfdistWarning

if TYPE_CHECKING:
    from kfdist.runtime.pipeline import Pipeline


def agree_on_start(pipeline: "Pipeline") -> None:
    """Collective. Checks that all ranks are at the same place, and forgets versions that nobody can deliver.

    Such versions come from a state that one rank alone had saved: the other ranks' jobs are not in it. They count as
    never shipped, with a warning on rank 0; with every rank's own state, or a merged one, there are none.

    Raises:
        ConfigError: The ranks were given different arguments; on all ranks alike.
        CheckpointError: The ranks begin at different steps or with different snapshots; on all ranks alike.
    """
    _compare_arguments(pipeline)
    pipeline.ship_all()  # what still travels to the host is under way, not lost
    table, step = pipeline.parts.table, pipeline.next_step
    place = _place(pipeline)
    last, first, high, low = table.agree([step, -step, place, -place])
    if (last, high) != (-first, -low):
        where = f"steps {-first} to {last}" if last != -first else f"step {step} with different snapshots"
        raise CheckpointError(
            f"the ranks would begin at {where}; load the state of one checkpoint on all ranks before the first step"
        )
    _forget_lost(pipeline)


def _compare_arguments(pipeline: "Pipeline") -> None:
    """Refuses ranks whose schedules would part or whose updates would differ."""
    parts = pipeline.parts
    own = {
        **pipeline.settings.canonical(pipeline.next_step),
        "method": repr([(group.name, group.inverter) for group in parts.groups]),
        # Objects of a rank's own, which can be alike but not equal.
        "link": type(parts.link).__name__,
        "grad_scaler": "enabled" if parts.capture.scaled else "None",
    }
    require_equal(
        parts.communicators.training,
        own,
        lambda name, listed: ConfigError(
            f"the ranks were given different {name}: {listed}. Make the Preconditioner with equal arguments on "
            "all ranks"
        ),
    )


def _place(pipeline: "Pipeline") -> int:
    """Digests, to 62 bits, everything that decides which collectives a rank enters and what it applies."""
    snapshots, ledger = pipeline.parts.snapshots, pipeline.parts.ledger
    place = [
        pipeline.next_step,
        pipeline.statistics_step,
        pipeline.pending,
        ledger.adopted,
        pipeline.parts.agreement.settings.damping,
        [
            [group.name, snapshots.starving(group.index), hashlib.sha256(snapshots.payload(group.index)).hexdigest()]
            for group in pipeline.parts.groups
        ],
    ]
    return int.from_bytes(hashlib.sha256(json.dumps(place).encode()).digest()[:8], "big") >> 2


def _forget_lost(pipeline: "Pipeline") -> None:
    rank, groups, book = pipeline.parts.communicators.training.rank, pipeline.parts.groups, pipeline.parts.book
    under_way = [(group, version) for group in groups for version in pipeline.pending[group.index]]
    if not under_way:
        return
    own = [int(group.courier_rank == rank and book.holds(group.name, version)) for group, version in under_way]
    held = pipeline.parts.table.agree(own)
    lost = []
    for (group, version), is_held in zip(under_way, held, strict=True):
        if not is_held:
            newest = version == pipeline.pending[group.index][-1]
            pipeline.pending[group.index].remove(version)
            # Under asap a newer job may have replaced the waiting one; only the newest must be somewhere.
            if newest or pipeline.settings.lag is not None:
                lost.append(f"{group.name}@{version}")
    if lost and rank == 0:
        warnings.warn(
            f"no rank's state has the inversions under way {', '.join(lost)}, and they will not be adopted: the state "
            "was saved on one rank alone. Statistics and snapshots are whole; the next inversions follow on schedule",
            KfdistWarning,
            stacklevel=2,
        )

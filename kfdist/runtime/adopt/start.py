"""The first step of a process: all ranks make sure that they begin in the same place.

A checkpoint is loaded by each rank by itself. Had one loaded another file, or none, the ranks would enter different
collectives and hang; and a version under way whose job is in nobody's state would be waited for in vain.
"""

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence

from kfdist.comm.communicator import Communicator
from kfdist.comm.together import require_equal
from kfdist.errors import CheckpointError, ConfigError, KfdistWarning
from kfdist.runtime.adopt.agreement import Agreement
from kfdist.runtime.track import Track
from kfdist.seeds import seed_from


def agree_on_start(
    arguments: Mapping[str, str],
    tracks: Sequence[Track],
    agreement: Agreement,
    training: Communicator,
    *,
    step: int,
    statistics_step: int,
    stages: Sequence[Sequence[int]],
    exact: bool,
) -> None:
    """Collective. Checks that all ranks are at the same place, and forgets versions that nobody can deliver.

    Such versions come from a state that one rank alone had saved: the other ranks' jobs are not in it. They count as
    never shipped, with a warning on rank 0; with every rank's own state, or a merged one, there are none.

    Args:
        arguments: What this rank was given, as text by name.
        tracks: All groups.
        agreement: Carries the rounds.
        training: The ranks.
        step: The step that this rank does next.
        statistics_step: The newest step whose statistics this rank has folded.
        stages: How the periods have changed while the run trained.
        exact: Whether every version under way is adopted; else (asap) a newer one may take its place.

    Raises:
        ConfigError: The ranks were given different arguments; on all ranks alike.
        CheckpointError: The ranks begin at different steps or with different snapshots; on all ranks alike.
    """
    require_equal(
        training,
        arguments,
        lambda name, listed: ConfigError(
            f"the ranks were given different {name}: {listed}. Make the Preconditioner with equal arguments on "
            "all ranks"
        ),
    )
    place = _place([step, statistics_step, stages, agreement.in_force.changes], tracks)
    last, first, high, low = agreement.agree([step, -step, place, -place])
    if (last, high) != (-first, -low):
        where = f"steps {-first} to {last}" if last != -first else f"step {step} with different snapshots"
        raise CheckpointError(
            f"the ranks would begin at {where}; load the state of one checkpoint on all ranks before the first step"
        )
    lost = forget_lost(tracks, agreement, exact=exact)
    if lost and training.rank == 0:
        warnings.warn(
            f"no rank's state has the inversions under way {', '.join(lost)}, and they will not be adopted: the state "
            "was saved on one rank alone. Statistics and snapshots are whole; the next inversions follow on schedule",
            KfdistWarning,
            stacklevel=2,
        )


def _place(common: list[object], tracks: Sequence[Track]) -> int:
    """Digests, to 63 bits, everything that decides which collectives a rank enters and what it applies."""
    of_groups = [
        [
            track.group.name,
            track.pending,
            track.ledger.adopted,
            [track.without_statistics, track.fruitless],
            hashlib.sha256(track.snapshot.encoded()).hexdigest(),
        ]
        for track in tracks
    ]
    return seed_from(json.dumps([common, of_groups]))


def forget_lost(tracks: Sequence[Track], agreement: Agreement, *, exact: bool) -> list[str]:
    """Collective. Forgets the versions under way that no rank holds; returns those that would have been adopted.

    Args:
        tracks: The groups.
        agreement: Carries a round.
        exact: Whether every version under way is adopted; else only the newest one counts.
    """
    under_way = [(track, version) for track in tracks for version in track.pending]
    if not under_way:
        return []
    held = agreement.agree([int(track.jobs.holds(version)) for track, version in under_way])
    lost = []
    for (track, version), is_held in zip(under_way, held, strict=True):
        if not is_held:
            newest = version == track.pending[-1]
            track.pending.remove(version)
            # Under asap a newer job may have replaced the waiting one; only the newest must be somewhere.
            if newest or exact:
                lost.append(f"{track.group.name}@{version}")
    return lost

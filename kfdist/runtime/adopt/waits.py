"""Which versions all ranks wait for before a step goes on: pure functions of what they know alike."""

from collections.abc import Mapping, Sequence

from kfdist.policies.adoption import NO_VERSION
from kfdist.policies.staleness import Adoption
from kfdist.runtime.track import Track


def due_for_adoption(step: int, tracks: Sequence[Track], lag: int | None) -> dict[int, int]:
    """Returns the versions that must be on all ranks before `step` goes on: at the lag, and version 0 at step 0 always.

    Args:
        step: The step.
        tracks: All groups.
        lag: Steps to adoption; None for asap.

    Returns:
        Version by group index.
    """
    under_way = {track.group.index: track.pending[0] for track in tracks if track.pending}
    if step == 0:
        return dict.fromkeys(under_way, 0)
    if lag is None:
        return {}
    return {index: oldest for index, oldest in under_way.items() if oldest <= step - lag}


def too_old(step: int, tracks: Sequence[Track], arriving: Mapping[int, int], adoption: Adoption) -> dict[int, int]:
    """Returns the versions to wait for where the hard bound is passed and its policy is to wait.

    A group about to adopt a version that is young enough does not wait, nor does one with nothing under way.

    Args:
        step: The step.
        tracks: All groups.
        arriving: By group index, the versions about to be adopted.
        adoption: Its bounds.

    Returns:
        By group index, the oldest version that is young enough, else the newest under way.
    """
    stale = {}
    for track in tracks:
        newest = arriving.get(track.group.index, NO_VERSION)
        under_way = [version for version in track.pending if version > newest]
        if not (under_way and track.decision(step, adoption).wait):
            continue
        if newest != NO_VERSION and not adoption.decide(step - newest).wait:
            continue
        young = [version for version in under_way if not adoption.decide(step - version).wait]
        stale[track.group.index] = young[0] if young else under_way[-1]
    return stale

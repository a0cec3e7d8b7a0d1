"""What is due at which step, and what is asked to be measured for it."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from kfdist.curvature.inverters import make_inverter
from kfdist.errors import ConfigError
from kfdist.policies.schedule import Schedule
from kfdist.runtime.plan.timetable import Timetable
from kfdist.runtime.track import Track
from tests.support.plans import planned
from tests.support.preconditioning import backward, preconditioner, two_layers

FACTOR, INVERSE = 3, 12


def timetable(
    method: Any, *, starving: frozenset[int] = frozenset(), world_size: int = 1, later: Sequence[Schedule] = ()
) -> tuple[Timetable, tuple[Track, ...]]:
    """Two linear layers."""
    groups = planned(nn.Sequential(nn.Linear(20, 16), nn.Linear(16, 4)), method).groups
    schedule = Schedule(factor_period=FACTOR, inverse_period=INVERSE, groups=len(groups))
    tracks = tuple(Track.of(group, queued=False) for group in groups)
    for track in tracks:
        track.without_statistics = track.group.index in starving
    return Timetable([schedule, *later], tracks, seed=0, rank=0, world_size=world_size), tracks


def due(ask: Any, track: Track, steps: int = 25) -> list[int]:
    return [step for step in range(steps) if ask(track, step)]


def requests(table: Timetable, step: int, calibrating: tuple[int, ...] = ()) -> Mapping[str, Any]:
    return table.requests(step, calibrating=calibrating)


def test_methods_with_factors_fold_and_invert_by_the_schedule() -> None:
    table, (first, second) = timetable("kfac")
    assert due(table.folds, first) == [0, 3, 6, 9, 12, 15, 18, 21, 24]
    assert due(table.updates, first) == due(table.inverts, first) == [0, 12, 24]
    assert due(table.updates, second) == [0, 7, 19]
    assert [table.updates_until(second, step) for step in (0, 6, 7, 19)] == [1, 1, 2, 3]


def test_the_first_batch_of_a_group_is_measured_whole() -> None:
    table, _ = timetable("kfac")
    whole = [step for step in range(25) for each in requests(table, step).values() if each.whole]
    assert set(whole) == {0}


def test_another_period_begins_with_all_groups() -> None:
    later = [Schedule(factor_period=FACTOR, inverse_period=6, groups=2, begin=14)]
    table, (first, second) = timetable("kfac", later=later)
    assert due(table.folds, first) == [0, 3, 6, 9, 12, 14, 17, 20, 23]
    assert due(table.updates, first, 30) == [0, 12, 14, 20, 26]
    assert due(table.updates, second, 30) == [0, 7, 14, 18, 24]
    for ask, counted in ((table.folds, table.foldings_until), (table.updates, table.updates_until)):
        for track in (first, second):
            assert [counted(track, step) for step in range(30)] == [
                len(due(ask, track, step + 1)) for step in range(30)
            ]
    assert [step for step in range(24) if table.takes_norms(step, measures=False)] == due(table.folds, first, 24)
    with pytest.raises(ConfigError, match=r"brand_period: 12 is not allowed"):
        timetable(make_inverter("b-kfac", rank=4, increment_rows=8, brand_period=12), later=later)


def test_online_methods_update_between_inversions_where_they_get_rows() -> None:
    table, (first, second) = timetable(make_inverter("b-r-kfac", rank=4, increment_rows=8))
    assert due(table.updates, first) == [0, 3, 6, 9, 12, 15, 18, 21, 24]
    assert due(table.inverts, first) == [0, 12, 24]
    assert table.updates_until(first, 6) == 3
    assert requests(table, 3)[first.group.name].rows == {"A", "G"}
    assert requests(table, 5) == {}
    table, (first, second) = timetable(make_inverter("b-kfac", rank=4, increment_rows=8, brand_period=6))
    assert due(table.updates, first) == [0, 6, 12, 18, 24]
    # Brand takes all but the second layer's G, which is folded more often than rows are taken.
    assert [sorted(requests(table, 4)[name].sums) for name in requests(table, 4)] == [["G"]]
    # Both layers' factors are too small: no rows, so no jobs between inversions.
    table, (first, second) = timetable(make_inverter("b-kfac", rank=40))
    assert due(table.updates, first) == due(table.inverts, first) == [0, 12, 24]


def test_a_period_of_its_own_must_fit() -> None:
    with pytest.raises(ConfigError, match="brand_period"):
        timetable(make_inverter("b-kfac", rank=4, increment_rows=8, brand_period=5))


def test_starving_groups_are_due_at_every_step() -> None:
    table, (first, second) = timetable("seng", starving=frozenset({1}))
    assert due(table.updates, first) == [0, 12, 24]
    assert due(table.updates, second) == due(table.folds, second) == list(range(25))
    assert list(requests(table, 1)) == [second.group.name]


def test_on_a_step_on_which_nothing_is_due_all_groups_are_quiet_but_those_wanted_now() -> None:
    table, (first, second) = timetable("kfac")
    assert not (table.due(5).folding or table.due(5).reducing or requests(table, 5))
    table.fresh = frozenset({second.group.name})
    assert (table.due(5).folding, table.due(5).reducing) == ((second,), (second,))
    asked = requests(table, 5)
    assert list(asked) == [second.group.name] and asked[second.group.name].sums == {"A", "G"}
    table.fresh = frozenset()
    first.without_statistics = True
    assert (table.due(5).folding, table.due(5).reducing) == ((first,), (first,))
    assert list(requests(table, 5)) == [first.group.name]


def test_calibration_asks_for_samples_on_a_step_on_which_nothing_is_due() -> None:
    table, (_, second) = timetable(make_inverter("ekfac", examples=8, rows=20))
    assert not table.due(5).folding and requests(table, 5) == {}
    asked = requests(table, 5, calibrating=(1,))
    assert list(asked) == [second.group.name]
    assert (asked[second.group.name].samples, asked[second.group.name].sums) == (8, frozenset())


def test_rows_that_an_inverse_is_multiplied_onto_are_asked_for_at_every_step() -> None:
    table, tracks = timetable(make_inverter("b-kfac", rank=4, increment_rows=8, apply_to="rows"))
    for step in (2, 5):
        assert not (table.due(step).folding or table.due(step).reducing)
        asked = requests(table, step)
        assert list(asked) == [track.group.name for track in tracks]
        assert all(each.rows == {"A", "G"} and each.most_rows is None and not each.sums for each in asked.values())


def test_a_step_done_again_makes_only_what_ranks_invert_themselves() -> None:
    """Its sums are folded and its jobs under way."""
    table, (first, second) = timetable({"0": "kfac", "1": "eva"})
    due = table.due(0)
    assert (due.folding, due.reducing) == ((first, second), (first, second))
    again = due.again()
    assert (again.step, again.folding, again.reducing) == (0, (), (second,))


def test_samples_are_asked_at_inversions_and_for_calibration() -> None:
    table, (first, second) = timetable(make_inverter("seng", examples=10, columns=None), world_size=4)
    asked = requests(table, 12)
    assert list(asked) == [first.group.name]
    assert (asked[first.group.name].samples, asked[first.group.name].sums) == (3, frozenset())
    table, (first, second) = timetable(make_inverter("ekfac", examples=8, rows=20), world_size=4)
    assert requests(table, 3)[first.group.name].samples is None
    asked = requests(table, 5, calibrating=(0,))
    assert list(asked) == [first.group.name]
    assert (asked[first.group.name].samples, asked[first.group.name].sample_rows, asked[first.group.name].sums) == (
        2,
        5,
        frozenset(),
    )


@pytest.mark.parametrize("method", ["b-kfac", "b-r-kfac", "seng", "kfac"])
def test_groups_whose_first_batches_were_unusable_get_on_at_the_first_good_one(method: str) -> None:
    """Also where Brand takes one factor and a dense average is due only at inversions."""
    settings = {"rank": 2, "increment_rows": 1} if method.startswith("b-") else {}
    model = two_layers()
    pre = preconditioner(model, make_inverter(method, **settings), factor_period=2, inverse_period=20)
    brand = {"b-kfac": "Brand on A, randomised SVD on G", "b-r-kfac": "Brand on A"}.get(method, "")
    assert brand in str(pre.coverage())
    for step in range(5):
        model.zero_grad()
        if step < 2:
            model(torch.full((3, 4), torch.nan, dtype=torch.float64)).sum().backward()
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
        else:
            backward(model, 1, seed=step)
        pre.step()
    assert min(pre.versions().values()) >= 2
    pre.close()


def test_a_run_follows_periods_that_change_and_resumes_before_the_change() -> None:
    """Two groups; the second is inverted in the middle of a period."""

    def run(steps: range, net: nn.Module, state: Any = None) -> tuple[list[list[int]], Any]:
        with preconditioner(net, "kfac", factor_period=2, inverse_period={0: 8, 7: 4}) as pre:
            if state is not None:
                pre.load_state_dict(state)
            versions = []
            for step in steps:
                net.zero_grad()
                backward(net, seed=step)
                pre.step()
                with torch.no_grad():
                    for parameter in net.parameters():
                        assert parameter.grad is not None
                        parameter -= 0.1 * parameter.grad
                versions.append(list(pre.versions().values()))
            return versions, pre.state_dict()

    whole, halves = two_layers(), two_layers()
    versions, _ = run(range(14), whole)
    assert [first for first, _ in versions] == [0] * 7 + [7] * 4 + [11] * 3
    assert [second for _, second in versions] == [0] * 5 + [5] * 2 + [7] * 3 + [10] * 4
    before, state = run(range(5), halves)
    after, _ = run(range(5, 14), halves, state)
    assert before + after == versions
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), halves.parameters(), strict=True))


@pytest.mark.parametrize("method", ["kfac", "b-r-kfac", "ekfac-adam"])
@pytest.mark.parametrize("starving", [frozenset[int](), frozenset({1})])
def test_what_is_due_of_all_groups_is_what_is_due_of_each(method: str, starving: frozenset[int]) -> None:
    settings: dict[str, Any] = {"b-r-kfac": {"rank": 4, "increment_rows": 8}, "ekfac-adam": {"basis_period": 6}}
    later = [Schedule(factor_period=FACTOR, inverse_period=6, groups=2, begin=14)]
    table, tracks = timetable(make_inverter(method, **settings.get(method, {})), starving=starving, later=later)
    for step in range(40):
        found = table.due(step)
        assert found.folding == tuple(track for track in tracks if table.folds(track, step))
        assert found.reducing == tuple(track for track in tracks if table.updates(track, step))
        wanted = {block.name for track in {*found.folding, *found.reducing} for block in track.group.blocks}
        assert requests(table, step).keys() <= wanted
        assert bool(requests(table, step)) >= bool(found.folding)

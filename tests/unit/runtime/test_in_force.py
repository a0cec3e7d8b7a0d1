"""Settings changed while a run trains: taken up whole or not at all, counted right, and kept over a resume."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import kfdist
from kfdist.errors import ConfigError, Interrupted
from kfdist.policies import tuning
from kfdist.policies.schedule import Schedule
from kfdist.policies.staleness import Asap, FixedLag
from kfdist.runtime.in_force import SettingsInForce
from kfdist.runtime.plan.timetable import Timetable
from kfdist.runtime.track import Track
from kfdist.types import Desired, MetricSample, RunSettings, Value
from tests.support.faulty.link import FaultyLink
from tests.support.plans import planned

MODEL = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))


def in_force(method: Any = "kfac-eigen", **configured: Any) -> SettingsInForce:
    plan = planned(MODEL, method, **configured)
    return SettingsInForce(plan.settings, plan.groups)


changes_strategy = st.fixed_dictionaries(
    {},
    optional={
        **{name: st.sampled_from(words) | st.none() for name, words in tuning.WORDS.items()},
        **{name: st.integers(0, 2**40) | st.none() for name in tuning.WHOLE},
        "damping": st.floats(1e-12, 1e12) | st.none(),
        "kl_clip": st.floats(0, 1e3) | st.none(),
    },
)


@given(changes_strategy)
def test_changes_travel_between_ranks_whole(changes: dict[str, Value | None]) -> None:
    assert tuning.decode(tuning.encode(changes)) == changes


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ({"damping": 0.5}, {"damping": 0.5}),
        ({"kl_clip": 0.0}, {"kl_clip": None}),
        ({"factor_period": 3, "inverse_period": 9}, {"factor_period": 3, "inverse_period": 9}),
        ({"soft_bound": 30}, {"adoption": Asap(soft_bound=30, hard_bound=50)}),
        ({"hard_bound": 0, "at_hard_bound": "keep"}, {"adoption": Asap(at_hard_bound="keep")}),
        ({"adoption": "fixed-lag", "lag": 2}, {"adoption": FixedLag(2)}),
        ({"adoption": "asap"}, {}),
    ],
)
def test_what_users_say_is_in_force_and_goes_away_again(said: dict[str, Value], wanted: Mapping[str, Any]) -> None:
    held = in_force(factor_period=2, inverse_period=10, adoption=Asap(hard_bound=50), kl_clip=0.1, lr=0.1)
    configured = held.settings
    assert held.take(said) == ""
    assert {name: getattr(held.settings, name) for name in wanted} == wanted
    told = held.told(0).values
    assert {name: told[name] for name in said} == said
    assert held.take(dict.fromkeys(said)) == ""
    assert held.settings == configured and held.changes == {}


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"damping": 0.5, "inverse_period": 9}, "inverse_period: is 9, which is no multiple of factor_period = 2"),
        ({"soft_bound": 8}, "soft_bound: is 8"),
        ({"adoption": "fixed-lag"}, "lag: is missing"),
        ({"kl_clip": 1.0}, "kl_clip: can't be changed: it was made without a clip"),
    ],
)
def test_what_does_not_fit_changes_nothing(said: dict[str, Value], words: str) -> None:
    held = in_force(factor_period=2, inverse_period=10, kl_clip=None)
    before = held.settings
    assert words in held.take(said)
    assert held.settings is before and held.changes == {}


def test_a_method_with_a_period_of_its_own_says_so_and_refuses() -> None:
    held = in_force(kfdist.curvature.inverters.BKfac(brand_period=4), factor_period=2, inverse_period=8)
    assert held.told(0).job_periods == (4,)
    assert held.take({"inverse_period": 10}).startswith("brand_period: 4 is not allowed")
    assert held.take({"inverse_period": 12}) == ""


def test_an_inverse_period_that_changes_nothing_is_refused_and_one_that_acts_is_not() -> None:
    held = in_force(kfdist.EkfacAdam(basis_period=4), factor_period=2, inverse_period=12, kl_clip=None)
    assert "inverse_period: would change nothing: blocks are inverted every 4 steps" in held.take(
        {"inverse_period": 24}
    )
    assert held.changes == {}
    assert held.take({"inverse_period": 2}) == ""  # below the basis_period, it is what bounds
    assert held.take({"inverse_period": None}) == ""
    assert held.take({"inverse_period": 24, "hard_bound": 26}) == ""  # the bound goes by it
    mixed = {"0": kfdist.EkfacAdam(basis_period=4), "*": "kfac-eigen"}
    assert in_force(mixed, factor_period=2, inverse_period=12, kl_clip=None).take({"inverse_period": 24}) == ""


def test_damping_can_be_changed_where_a_method_has_one() -> None:
    held = in_force("ekfac-adam", kl_clip=None)
    assert "damping: can't be changed: ekfac-adam, the run's only method, has none" in held.take({"damping": 0.1})
    assert "damping" in held.told(0).fixed
    assert in_force({"0": "ekfac-adam", "*": "kfac-eigen"}, kl_clip=None).take({"damping": 0.1}) == ""
    held.load_state_dict({"changes": {"damping": 0.1, "hard_bound": 500}})  # of before it was refused
    assert held.changes == {"hard_bound": 500}
    held.load_state_dict({"changes": {"inverse_period": 200}})


@pytest.mark.parametrize("method", ["ekfac-adam", "kfac"])
def test_a_soft_bound_is_refused_where_no_direction_obeys_damping(method: str) -> None:
    held = in_force(method, kl_clip=None)
    assert "soft_bound: would do nothing: beyond it damping is raised" in held.take({"soft_bound": 300})
    assert held.changes == {} and held.take({"soft_bound": 0, "hard_bound": 300}) == ""
    mixed = {"0": method, "*": "kfac-eigen"}
    assert in_force(mixed, kl_clip=None).take({"soft_bound": 300}) == ""


def test_a_run_without_a_method_has_nothing_to_set() -> None:
    assert "no second-order method" in in_force("none").take({"damping": 0.1})


@given(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=4))
def test_what_was_due_is_counted_right_whenever_periods_change(changes: list[tuple[int, int, int]]) -> None:
    plan = planned(MODEL, "kfac", factor_period=2, inverse_period=6)
    tracks = [Track.of(group, queued=False) for group in plan.groups]
    first = Schedule(factor_period=2, inverse_period=6, groups=len(tracks))
    table = Timetable([first], tracks, seed=0, rank=0, world_size=1, settings=plan.settings)
    held = SettingsInForce(plan.settings, plan.groups)
    folded, updated, step = [0] * len(tracks), [0] * len(tracks), 0
    for steps, factor, multiple in changes:
        held.take({"factor_period": factor, "inverse_period": factor * multiple})
        table.follow(held.settings, step)
        for step in range(step, step + steps):  # noqa: B020
            for index, track in enumerate(tracks):
                folded[index] += table.folds(track, step)
                updated[index] += table.updates(track, step)
                assert table.foldings_until(track, step) == folded[index]
                assert table.updates_until(track, step) == updated[index]
                assert not table.updates(track, step) or table.folds(track, step)
        step += 1
    again = Timetable([first], tracks, seed=0, rank=0, world_size=1, settings=plan.settings)
    again.load_state_dict(table.state_dict(step), held.settings)
    again.follow(held.settings, step)
    for later in range(step, step + 30):
        assert [again.due(later), again.foldings_until(tracks[0], later)] == [
            table.due(later),
            table.foldings_until(tracks[0], later),
        ]


def test_the_names_of_changes_that_are_in_force_are_told() -> None:
    held = in_force(adoption=FixedLag(3), factor_period=2, inverse_period=10, lr=0.1)
    held.take({"damping": 0.5, "soft_bound": 40, "lag": 4})
    assert held.told(0).changed == ("damping", "lag"), "bounds are for asap"
    held.take({"damping": None, "adoption": "asap", "lag": None})
    assert held.told(0).changed == ("adoption", "soft_bound")


class Run:
    """A model trained in this process by synchronous K-FAC, whose users a test plays."""

    def __init__(self, link: FaultyLink | None = None, **arguments: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
        self.link = link or FaultyLink()
        given: dict[str, Any] = {"factor_period": 2, "inverse_period": 4, "adoption": FixedLag(0), "lr": 0.1}
        given |= {"damping": 0.1} | arguments
        self.pre = kfdist.Preconditioner(self.model, "kfac-eigen", link=self.link, **given)
        self.adopted: list[list[int]] = []

    def set(self, **changes: Value | None) -> None:
        wanted = self.link.wanted
        self.link.wanted = RunSettings(revision=wanted.revision + 1, changes={**wanted.changes, **changes})

    def steps(self, count: int) -> None:
        for _ in range(count):
            generator = torch.Generator().manual_seed(self.pre.pipeline.next_step)
            x, y = torch.randn(16, 6, generator=generator), torch.randint(0, 4, (16,), generator=generator)
            self.model.zero_grad()
            nn.functional.cross_entropy(self.model(x), y).backward()
            report = self.pre.step()
            self.adopted.append([version for _, version in report.adopted])
            with torch.no_grad():
                for parameter in self.model.parameters():
                    assert parameter.grad is not None
                    parameter -= 0.1 * parameter.grad

    @property
    def parameters(self) -> list[Any]:
        return [parameter.detach().tolist() for parameter in self.model.parameters()]


def test_periods_change_one_step_after_the_agreed_one() -> None:
    run = Run()
    run.steps(5)
    run.set(inverse_period=6)
    run.steps(10)
    # Said before step 5; the table started at its end is complete at step 6, whose measurements had begun.
    assert [step for step, versions in enumerate(run.adopted) if len(versions) == 2] == [0, 7]
    assert [step for step, versions in enumerate(run.adopted) if versions] == [0, 3, 4, 7, 10, 13]
    run.pre.close()


def test_users_may_want_blocks_inverted_out_of_turn_and_get_it_once() -> None:
    run = Run(inverse_period=12)
    run.steps(4)
    run.link.wanted = RunSettings(revision=1, refresh_serial=1, refresh=("0",))
    run.steps(3)
    run.link.wanted = RunSettings(revision=2, refresh_serial=1, refresh=("0",), desired=Desired.RUNNING)
    run.steps(3)
    run.link.wanted = RunSettings(revision=3, refresh_serial=2)
    run.steps(6)
    # Said before steps 4, 7 and 10; agreed on one later, inverted one after that; phases are 0 and 7.
    assert [step for step, versions in enumerate(run.adopted) if versions] == [0, 6, 7, 12]
    assert [len(versions) for versions in run.adopted if versions] == [2, 1, 1, 2]
    run.pre.close()


class StoppingUsers(FaultyLink):
    """Users that pause a run, want fresh inverses, and have it stop once it is paused."""

    def beat(self, step: int, phase: str, samples: Sequence[MetricSample]) -> None:
        super().beat(step, phase, samples)
        if phase == "paused":
            self.wanted = RunSettings(revision=2, desired=Desired.STOPPED, refresh_serial=1)


def test_a_refresh_that_is_agreed_on_in_a_pause_outlives_a_stop_in_that_pause() -> None:
    run = Run(StoppingUsers(), inverse_period=12)
    run.steps(3)
    run.link.wanted = RunSettings(revision=1, desired=Desired.PAUSED, refresh_serial=1)
    with pytest.raises(Interrupted):
        run.steps(2)
    resumed = Run(inverse_period=12)
    resumed.model.load_state_dict(run.model.state_dict())
    resumed.pre.load_state_dict(run.pre.state_dict())
    resumed.steps(2)
    # Stopped at step 4, which is done again; the refresh is for the step after the one at which it was agreed on.
    assert [len(versions) for versions in resumed.adopted] == [0, 2]
    for each in (run, resumed):
        each.pre.close()


def test_the_clip_can_be_changed_and_taken_away() -> None:
    clipped, free, never = Run(kl_clip=1e-6), Run(kl_clip=1e-6), Run(kl_clip=None)
    free.set(kl_clip=0.0)
    for run in (clipped, free, never):
        run.steps(3)
        run.pre.close()
    assert clipped.parameters != free.parameters
    moved = [[(a - b) for a, b in zip(run.parameters[1], Run().parameters[1], strict=True)] for run in (free, clipped)]
    assert max(map(abs, moved[0])) > 10 * max(map(abs, moved[1]))


def test_a_clip_by_schedule_is_the_clip_that_users_set_at_its_steps_and_goes_on_after_a_resume() -> None:
    def schedule(step: int) -> float:
        return 1e-6 if step < 6 else 1e-3

    by_hand, by_schedule, stopped, resumed = Run(kl_clip=1e-6), *(Run(kl_clip=schedule) for _ in range(3))
    by_hand.steps(5)
    by_hand.set(kl_clip=1e-3)  # said before step 5, in force at step 6: a step that waits for inverses obeys at once
    by_hand.steps(4)
    by_schedule.steps(9)
    stopped.steps(5)
    resumed.model.load_state_dict(stopped.model.state_dict())
    resumed.pre.load_state_dict(stopped.pre.state_dict())
    resumed.steps(4)
    assert by_schedule.parameters == by_hand.parameters == resumed.parameters
    told = by_schedule.pre.pipeline.in_force.told
    assert [told(step).values["kl_clip"] for step in (5, 6)] == [1e-6, 1e-3]
    by_schedule.set(kl_clip=1e-5)
    by_schedule.steps(2)
    assert told(11).values["kl_clip"] == 1e-5  # for the rest of the run
    for run in (by_hand, by_schedule, stopped, resumed):
        run.pre.close()


@pytest.mark.parametrize("value", [-1.0, float("nan"), "1e-3", True, torch.ones(2)])
@pytest.mark.parametrize("name", ["kl_clip", "damping"])
def test_a_schedule_out_of_range_is_refused_before_anything_is_folded(name: str, value: Any) -> None:
    given: dict[str, Any] = {name: lambda step: 1e-3 if step < 2 else value}
    run = Run(**given)
    run.steps(2)
    run.pre.beat("running")  # rank 0's alone, so it doesn't fail
    assert name not in run.pre.pipeline.in_force.told(2).values
    with pytest.raises(ConfigError, match=re.escape(f"the {name} schedule gave {value!r} at step 2; a positive")):
        run.steps(1)
    assert run.pre.pipeline.statistics_step == 1
    run.pre.close()


@pytest.mark.parametrize("begin", [0, 2])
@pytest.mark.parametrize("name", ["kl_clip", "damping"])
def test_what_a_schedule_raises_is_told_at_the_step_and_not_before(name: str, begin: int) -> None:
    given: dict[str, Any] = {name: lambda step: 1e-3 if step < begin else [][step]}
    run = Run(**given)
    run.steps(begin)
    assert name not in run.pre.pipeline.in_force.told(begin).values
    with pytest.raises(ConfigError, match=f"the {name} schedule failed at step {begin}: IndexError"):
        run.steps(1)
    run.pre.close()


@pytest.mark.parametrize("off", [None, 0, 0.0])
def test_a_schedule_turns_the_clip_off_as_users_do(off: float | None) -> None:
    by_hand, by_schedule = Run(kl_clip=1e-6), Run(kl_clip=lambda step: 1e-6 if step < 6 else off)
    by_hand.steps(5)
    by_hand.set(kl_clip=0.0)  # said before step 5, in force at step 6
    by_hand.steps(4)
    by_schedule.steps(9)
    assert by_schedule.parameters == by_hand.parameters
    assert [run.pre.pipeline.in_force.told(7).values["kl_clip"] for run in (by_hand, by_schedule)] == [0.0, 0.0]
    by_hand.pre.close()
    by_schedule.pre.close()


def test_a_schedule_without_a_clip_needs_no_learning_rate() -> None:
    run = Run(kl_clip=lambda step: None if step < 2 else 1e-3, lr=None)
    run.steps(2)
    with pytest.raises(ConfigError, match="kl_clip is set but there is no learning rate"):
        run.steps(1)
    run.pre.close()


@pytest.mark.parametrize(
    ("changes", "configured"),
    [
        ({"damping": 0.5, "kl_clip": 1e-4}, {}),
        ({"factor_period": 3, "inverse_period": 6}, {}),
        ({"lag": 2}, {}),
        ({"factor_period": 1}, {"inverse_period": {0: 4, 9: 8}}),  # begins between the change and the checkpoint
        ({"factor_period": 1}, {"inverse_period": {0: 4, 15: 8}}),
    ],
)
def test_changes_outlive_a_resume_bit_for_bit(changes: dict[str, Value], configured: dict[str, Any]) -> None:
    whole = Run(**configured)
    whole.steps(5)
    whole.set(**changes)
    whole.steps(6)
    state, parameters = whole.pre.state_dict(), {k: v.clone() for k, v in whole.model.state_dict().items()}
    whole.steps(12)
    resumed = Run(**configured)
    resumed.model.load_state_dict(parameters)
    resumed.pre.load_state_dict(state)
    resumed.steps(12)
    assert resumed.parameters == whole.parameters
    assert resumed.adopted == whole.adopted[11:]
    for run in (whole, resumed):
        run.pre.close()


def test_adoption_goes_from_asap_to_a_fixed_lag_and_back() -> None:
    run = Run(adoption="asap")
    run.steps(7)
    run.set(adoption="fixed-lag", lag=2)
    run.steps(12)
    late = [(step, version) for step, versions in enumerate(run.adopted) for version in versions if step >= 11]
    assert late and all(step - version == 2 for step, version in late)
    run.set(adoption="asap")
    run.steps(12)
    assert any(versions for versions in run.adopted[22:])
    run.pre.close()


def test_a_state_with_changes_that_no_longer_fit_is_refused_before_anything_of_it_is_loaded() -> None:
    def optimizer() -> kfdist.Optimizer:
        model = nn.Sequential(nn.Linear(3, 2))
        return kfdist.Optimizer(model, method="kfac-eigen", adoption=kfdist.FixedLag(0), inverse_period=10)

    with optimizer() as stepped, optimizer() as fresh:
        stepped.preconditioner.model(torch.ones(4, 3)).sum().backward()
        stepped.step()
        state = stepped.state_dict()
        state["preconditioner"] = {**state["preconditioner"], "changes": {"adoption": "asap", "hard_bound": 3}}
        for refused in (
            lambda: fresh.preconditioner.check_state(state["preconditioner"]),
            lambda: fresh.load_state_dict(state),
        ):
            with pytest.raises(ConfigError, match=r"users had changed settings.*hard_bound: is 3.*configure what goes"):
                refused()
        assert not fresh.state

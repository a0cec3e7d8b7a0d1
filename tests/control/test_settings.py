"""Settings of a running method: what may be changed, what is refused and why, and what the event log says of it."""

import pytest

from kfdist.errors import ConfigError
from kfdist.rpc.authentication import user_metadata
from kfdist.types import InForce, Obeyed
from tests.support.waits import eventually

ASAP = InForce(
    values={
        "damping": 0.03,
        "kl_clip": 0.01,
        "factor_period": 2,
        "inverse_period": 10,
        "adoption": "asap",
        "soft_bound": 20,
        "hard_bound": 40,
        "at_hard_bound": "wait",
    }
)
WHO = user_metadata()[0][1]


@pytest.fixture
def trains(client, member):
    """A run whose rank 0 has said what it goes by."""

    def say(in_force: InForce = ASAP, step: int = 7) -> None:
        member.beat_worker("r", step=step, in_force=in_force)

    client.create("r")
    member.register_worker("r", fingerprint="cpu/2")
    say()
    return say


def texts(client, kind: str) -> list[str]:
    return [event.text for event in client.events("r") if event.kind == kind]


def test_every_setting_travels_and_the_log_says_who_changed_what_from_what_to_what(client, member, trains) -> None:
    changes = {
        "damping": 0.5,
        "kl_clip": 0.0,
        "factor_period": 3,
        "inverse_period": 6,
        "soft_bound": 0,
        "hard_bound": 30,
        "at_hard_bound": "fallback",
    }
    run = client.update_settings("r", **changes)
    settings = member.beat_worker("r").settings
    assert {name: getattr(settings, name) for name in changes} == changes
    assert not settings.HasField("adoption") and not settings.HasField("lag")
    changed = texts(client, "settings_changed")
    assert len(changed) == len(changes)
    for name, change in (
        ("damping", "0.03 to 0.5"),
        ("kl_clip", "0.01 to none"),
        ("soft_bound", "20 to none"),
        ("at_hard_bound", "wait to fallback"),
    ):
        assert f"{WHO} set {name} from {change} at step 7 (revision {run.settings_revision})" in changed


def test_the_step_at_which_all_ranks_obeyed_is_in_the_log_once(client, member, trains) -> None:
    revision = client.pause("r").settings_revision
    client.update_settings("r", damping=0.5, inverse_period=16)
    new = {**ASAP.values, "damping": 0.5, "inverse_period": 16}
    obeyed = (Obeyed(revision=revision, step=8), Obeyed(revision=revision + 1, step=9))
    for _ in range(2):  # beats repeat what they say, as one may be lost
        trains(InForce(values=new, obeyed=obeyed), step=9)
    assert texts(client, "settings_obeyed") == [
        f"revision {revision} (pause), agreed on by all ranks at step 8",
        f"revision {revision + 1} (damping 0.5, inverse_period 16 from the step after), "
        "agreed on by all ranks at step 9",
    ]
    run = client.get("r")
    assert (run.settings_revision, run.obeyed_revision, run.obeyed_step) == (revision + 1, revision + 1, 9)
    assert run.settings == new


def test_methods_that_damp_when_they_invert_are_named(client, trains) -> None:
    trains(InForce(values=ASAP.values, late_damping=("kfac",)))
    revision = client.update_settings("r", damping=0.5).settings_revision
    trains(InForce(values=ASAP.values, late_damping=("kfac",), obeyed=(Obeyed(revision=revision, step=8),)))
    assert "damping 0.5, which kfac takes up with its next inversions" in texts(client, "settings_obeyed")[0]


def test_what_the_ranks_refuse_is_told_and_asked_no_more(client, member, trains) -> None:
    client.update_settings("r", damping=0.5)
    revision = client.update_settings("r", inverse_period=12).settings_revision
    in_force = {**ASAP.values, "damping": 0.5}
    refused = Obeyed(revision=revision, step=9, refused="inverse_period: no")
    trains(InForce(values=in_force, obeyed=(refused,)))
    (text,) = texts(client, "settings_refused")
    assert text.endswith("at step 9: the settings of the method stay as they were: inverse_period: no")
    settings = member.beat_worker("r").settings
    assert settings.damping == 0.5 and not settings.HasField("inverse_period")


def test_as_configured_again(client, member, trains) -> None:
    client.update_settings("r", damping=0.5)
    client.update_settings("r", damping=None)
    settings = member.beat_worker("r").settings
    assert list(settings.as_configured) == ["damping"] and not settings.HasField("damping")
    assert texts(client, "settings_changed")[-1].startswith(f"{WHO} set damping from 0.5 to as configured")


def test_what_a_checkpoint_kept_is_told_when_a_start_begins_with_the_way_back(client, member, trains) -> None:
    kept = InForce(values={**ASAP.values, "damping": 0.5}, changed=("damping",))
    trains(kept)  # the run had begun, as configured: somebody's change that this controller knows nothing of
    eventually(lambda: client.get("r").changed, lambda changed: changed == ("damping",))
    assert texts(client, "settings_kept") == []
    member.register_worker("r", epoch=2)
    assert client.get("r").changed == ()
    for step in (8, 9):
        member.beat_worker("r", epoch=2, step=step, in_force=kept)
    (text,) = texts(client, "settings_kept")
    assert text.startswith("damping 0.5, as set in an earlier start, whatever the configuration says")
    assert "`kfdist set r damping=configured` goes back" in text
    client.update_settings("r", damping=0.25)
    member.register_worker("r", epoch=3)
    member.beat_worker("r", epoch=3, step=9, in_force=kept)
    assert len(texts(client, "settings_kept")) == 1, "this controller asks for it, and the ranks will obey"


def test_adoption_can_be_changed_with_what_goes_with_it(client, member, trains) -> None:
    client.update_settings("r", adoption="fixed-lag", lag=3, soft_bound=0, hard_bound=0)
    assert member.beat_worker("r").settings.lag == 3
    trains(InForce(values={**ASAP.values, "adoption": "fixed-lag", "lag": 3, "soft_bound": 0, "hard_bound": 0}))
    client.update_settings("r", adoption="asap")
    assert list(member.beat_worker("r").settings.as_configured) == ["lag"]


FIXED = InForce(values=ASAP.values, fixed={"kl_clip": "it was made without one"})
BRAND = InForce(values={**ASAP.values, "inverse_period": 12}, job_periods=(4,))


@pytest.mark.parametrize(
    ("in_force", "changes", "words"),
    [
        (ASAP, {}, ["settings: nothing is to be changed", "damping", "lag"]),
        (ASAP, {"damping": 0.0}, ["damping: is 0.0; it must be greater than 0"]),
        (ASAP, {"damping": float("inf")}, ["damping: is inf"]),
        (ASAP, {"kl_clip": -1.0}, ["kl_clip: is -1.0; it must be at least 0"]),
        (ASAP, {"factor_period": 0}, ["factor_period: is 0; it must be at least 1"]),
        (
            ASAP,
            {"factor_period": 3},
            ["inverse_period: is 10, which is no multiple of factor_period = 3; take 9 or 12"],
        ),
        (ASAP, {"inverse_period": 20}, ["soft_bound: is 20", "the smallest legal value is 21"]),
        (ASAP, {"soft_bound": 50}, ["soft_bound: is 50, above hard_bound = 40"]),
        (ASAP, {"at_hard_bound": "panic"}, ["at_hard_bound: is 'panic'; it must be 'wait', 'keep' or 'fallback'"]),
        (ASAP, {"lag": 3}, ["lag: is 3", 'adoption = "fixed-lag" only']),
        (ASAP, {"adoption": "fixed-lag"}, ["lag: is missing"]),
        (ASAP, {"adoption": "fixed-lag", "lag": 3}, ["soft_bound: is 20; bounds go with", "remove the bound"]),
        (FIXED, {"kl_clip": 1.0}, ["kl_clip: can't be changed: it was made without one"]),
        (BRAND, {"inverse_period": 10}, ["inverse_period: is 10; a method of the run has a period of its own, 4"]),
        (InForce(), {"inverse_period": 0}, ["inverse_period: is 0; it must be at least 1"]),
        (InForce(), {"inverse_period": 2**62}, [f"inverse_period: is {2**62}; it must be at most 1000000000000"]),
        (ASAP, {"hard_bound": 2**63 - 1}, ["hard_bound: is 9223372036854775807; it must be at most"]),
        (InForce(), {"soft_bound": 9, "inverse_period": 9}, ["soft_bound: is 9", "10"]),
    ],
)
def test_a_refusal_names_the_field_and_what_is_allowed_and_changes_nothing(client, trains, in_force, changes, words):
    trains(in_force)
    before = client.get("r")
    with pytest.raises(ConfigError) as caught:
        client.update_settings("r", **changes)
    assert [word for word in words if word not in str(caught.value)] == []
    assert client.get("r").settings_revision == before.settings_revision


def test_before_the_ranks_have_said_anything_each_setting_is_checked_for_itself(client) -> None:
    client.create("early")
    client.update_settings("early", inverse_period=15)
    client.update_settings("early", soft_bound=900, lag=None)
    with pytest.raises(ConfigError, match="as_configured: 'dampling' is not allowed; .*did you mean 'damping'"):
        client.update_settings("early", dampling=None)


def test_a_fixed_lag_needs_an_owner_that_computes_as_the_ranks_do(client, member, trains) -> None:
    member.register_owner("owner-0")  # of the fingerprint "cpu"
    with pytest.raises(
        ConfigError, match="adoption: .*compute as the ranks do, 'cpu/2', and none of them does: .'cpu'"
    ):
        client.update_settings("r", adoption="fixed-lag", lag=3, soft_bound=0, hard_bound=0)

"""Who does what: every group is dealt once, evenly by the policy's own measure, and alike in every process."""

import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kfdist.errors import ConfigError
from kfdist.policies.assignment import POLICIES, assign, courier_ranks, rendezvous
from kfdist.types import GroupSpec


def spec(name: str, cost: float = 1.0, position: int = 0, size: int = 0) -> GroupSpec:
    return GroupSpec(name=name, cost=cost, position=position, bytes=size)


@st.composite
def group_lists(draw) -> list[GroupSpec]:
    costs = draw(st.lists(st.floats(0, 1e12), max_size=40))
    sizes = draw(st.lists(st.integers(0, 1 << 40), min_size=len(costs), max_size=len(costs)))
    order = draw(st.permutations(range(len(costs))))
    return [spec(f"layer{i}", costs[i], order[i], sizes[i]) for i in range(len(costs))]


owner_lists = st.lists(st.text(min_size=1, max_size=8), unique=True, min_size=1, max_size=9)


@given(group_lists(), owner_lists, st.sampled_from(sorted(POLICIES)), st.randoms())
def test_every_group_has_one_live_owner_whatever_the_order(groups, owners, policy, random):
    dealt = assign(groups, owners, policy)
    assert dealt.keys() == {group.name for group in groups}
    assert set(dealt.values()) <= set(owners)
    shuffled_groups, shuffled_owners = list(groups), list(owners)
    random.shuffle(shuffled_groups)
    random.shuffle(shuffled_owners)
    assert assign(shuffled_groups, shuffled_owners, policy) == dealt


@given(group_lists(), owner_lists, st.sampled_from(["round_robin", "model_order"]))
def test_round_robin_deals_equally_many(groups, owners, policy):
    counts = Counter(assign(groups, owners, policy).values())
    loads = [counts[owner] for owner in owners]
    assert max(loads) - min(loads) <= 1


@given(group_lists(), owner_lists)
def test_lpt_keeps_grahams_bound(groups, owners):
    dealt = assign(groups, owners, "lpt")
    loads = dict.fromkeys(owners, 0.0)
    for group in groups:
        loads[dealt[group.name]] += group.cost
    # The busiest owner got its last group when it had least: at most the mean plus one group.
    mean = sum(loads.values()) / len(owners)
    largest = max((group.cost for group in groups), default=0.0)
    assert max(loads.values()) <= (mean + largest) * (1 + 1e-9)


@given(group_lists(), st.integers(1, 9))
def test_courier_ranks_balance_bytes(groups, world_size):
    ranks = courier_ranks(groups, world_size)
    loads = [0] * world_size
    for group in groups:
        loads[ranks[group.name]] += group.bytes
    largest = max((group.bytes for group in groups), default=0)
    assert max(loads) - min(loads) <= largest


def test_resnet50_is_balanced_as_the_research_found():
    # reference/platform.md 0.6: share of the busiest of 4 owners, cost dA^3 + dG^3 over the 54 layers.
    dims = [(147, 64)]
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            dims += [(channels, width), (width * 9, width), (width, width * 4)]
            if block == 0:
                dims.append((channels, width * 4))
            channels = width * 4
    dims.append((2049, 1000))
    assert len(dims) == 54
    groups = [spec(f"l{i}", float(a**3 + g**3), i) for i, (a, g) in enumerate(dims)]
    total = sum(group.cost for group in groups)

    def busiest(policy: str) -> float:
        loads: Counter = Counter()
        for name, owner in assign(groups, ["a", "b", "c", "d"], policy).items():
            loads[owner] += next(group.cost for group in groups if group.name == name)
        return max(loads.values()) / total

    assert busiest("model_order") == pytest.approx(0.494, abs=0.01)
    assert busiest("round_robin") == pytest.approx(0.304, abs=0.01)
    assert busiest("lpt") == pytest.approx(0.25, abs=0.01)


def test_equal_groups_without_bytes_spread_over_the_ranks():
    ranks = courier_ranks([spec(f"l{i}", position=i) for i in range(8)], 4)
    assert sorted(Counter(ranks.values()).values()) == [2, 2, 2, 2]


def test_no_owner_means_no_assignment():
    assert assign([spec("a")], []) == {}


@given(st.text(max_size=20), owner_lists)
def test_rendezvous_moves_only_what_it_must(group, owners):
    order = rendezvous(group, owners)
    assert sorted(order) == sorted(owners)
    assert rendezvous(group, list(reversed(owners))) == order
    for gone in owners:
        left = [owner for owner in owners if owner != gone]
        assert rendezvous(group, left) == [owner for owner in order if owner != gone]


def test_rendezvous_spreads():
    firsts = Counter(rendezvous(f"layer{i}", ["a", "b", "c", "d"])[0] for i in range(4000))
    assert all(850 < firsts[owner] < 1150 for owner in "abcd")  # binomial: 1000 +- 5 sigma


def test_other_processes_agree():
    groups = [spec(f"l{i}", float(i % 7), i, i * 100) for i in range(30)]
    script = (
        "from kfdist.policies.assignment import *; from kfdist.types import GroupSpec\n"
        "g = [GroupSpec(name=f'l{i}', cost=float(i % 7), position=i, bytes=i * 100) for i in range(30)]\n"
        "print([assign(g, ['x', 'y', 'z'], p) for p in POLICIES], courier_ranks(g, 3), rendezvous('l1', list('xyz')))"
    )
    theirs = subprocess.run(
        [sys.executable, "-c", script], env={"PYTHONHASHSEED": "7"}, capture_output=True, text=True, check=True
    ).stdout.strip()
    ours = [assign(groups, ["x", "y", "z"], policy) for policy in POLICIES]
    assert theirs == f"{ours} {courier_ranks(groups, 3)} {rendezvous('l1', list('xyz'))}"


@pytest.mark.parametrize(
    ("groups", "owners", "policy", "words"),
    [
        ([], ["a"], "round-robin", ["'round-robin'", "model_order", "did you mean 'round_robin'"]),
        ([spec("x"), spec("x")], ["a"], "lpt", ["'x'", "twice"]),
        ([spec("x", float("nan"))], ["a"], "lpt", ["'x'", "nan"]),
        ([spec("x", -1.0)], ["a"], "lpt", ["'x'", "-1"]),
        ([spec("x", size=-5)], ["a"], "lpt", ["'x'", "-5 bytes"]),
        ([spec("x")], ["a", "a"], "lpt", ["repeated"]),
    ],
)
def test_bad_input_is_named(groups, owners, policy, words):
    with pytest.raises(ConfigError) as caught:
        assign(groups, owners, policy)
    assert all(word in str(caught.value) for word in words)


def test_no_rank_is_refused():
    with pytest.raises(ConfigError, match="world_size: 0 is not allowed"):
        courier_ranks([], 0)

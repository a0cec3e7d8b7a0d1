"""Of a family of tests every value, and of three parameters every pair, is run every time."""

from itertools import combinations, product

from tests.support.tiers import in_turn


def test_each_value_and_of_three_axes_each_pair_is_run_every_time() -> None:
    axes = ("abc", range(4), "xyz")
    found = in_turn(*axes, of=3)
    assert [each.values for each in found] == list(product(*axes))
    soon = [each.values for each in found if not each.marks]
    assert len(soon) == len(found) / 3
    for i, j in combinations(range(3), 2):
        assert {(values[i], values[j]) for values in soon} == set(product(axes[i], axes[j]))
    of_two = [each.values for each in in_turn("abcd", [1, 2], of=2) if not each.marks]
    assert of_two == [("a", 1), ("b", 2), ("c", 1), ("d", 2)]

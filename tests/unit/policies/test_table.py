"""The table's columns: what one elementwise maximum over ranks says."""

import pytest
from hypothesis import given, strategies

from kfdist.comm.background import Header
from kfdist.policies.adoption import ABSENT, NO_VERSION, AdoptionLedger, decode_table, encode_table

int64 = strategies.integers(-(2**63), 2**63 - 1)
serials = strategies.lists(strategies.tuples(*[strategies.integers(0, 2**40)] * 3), min_size=2, max_size=2)


def maximum(*columns: list[int]) -> list[int]:
    return [max(values) for values in zip(*columns, strict=True)]


@given(strategies.lists(serials, min_size=1, max_size=4), strategies.integers(0, 2**53), strategies.integers(0, 3))
def test_a_table_says_the_newest_announced_what_all_received_and_what_any_rejected(
    ranks: list[list[tuple[int, int, int]]], revision: int, stopping: int
) -> None:
    columns = []
    for number, groups in enumerate(ranks):
        ledgers = [AdoptionLedger(announced=each[0], received=each[1], rejected=each[2]) for each in groups]
        columns.append(encode_table(ledgers, revision=revision if number == 0 else None, stop=number == stopping))
    table = decode_table(maximum(*columns))
    assert len(table.groups) == 2
    for group, agreed in enumerate(table.groups):
        assert agreed.announced == max(rank[group][0] for rank in ranks)
        assert agreed.received == min(rank[group][1] for rank in ranks)
        assert agreed.rejected == max(rank[group][2] for rank in ranks)
    assert table.revision == revision
    assert table.stop is (stopping < len(ranks))
    assert table.digests_differ is None


@given(strategies.lists(int64, min_size=1, max_size=4))
def test_digests_differ_exactly_where_two_ranks_have_different_ones(digests: list[int]) -> None:
    columns = [[*encode_table([AdoptionLedger()], revision=0, stop=False)[:-2], digest, ~digest] for digest in digests]
    assert decode_table(maximum(*columns)).digests_differ is (len(set(digests)) > 1)


def test_an_empty_table_holds_every_column_in_the_range_of_int64() -> None:
    columns = encode_table([AdoptionLedger()] * 2, revision=None, stop=False)
    assert len(columns) == 3 * 2 + 4
    assert all(-(2**63) <= column < 2**63 for column in columns)
    assert columns[:2] == [NO_VERSION] * 2
    assert columns[-4] == ABSENT


@given(strategies.integers(0, 2**40), strategies.integers(0, 2**40), strategies.binary(min_size=32, max_size=32))
def test_a_header_survives_the_maximum_with_ranks_that_have_none(version: int, size: int, digest: bytes) -> None:
    header = Header(version, size, digest.hex())
    nothing = [-1] * len(header.columns())
    assert Header.read(maximum(nothing, header.columns(), nothing)) == header
    assert Header.read(nothing) is None


def test_a_version_never_goes_back() -> None:
    ledger = AdoptionLedger()
    ledger.enter(5)
    with pytest.raises(AssertionError, match="while one of 5 runs"):
        ledger.enter(6)
    ledger.adopt(5)
    for version in (4, 5):
        with pytest.raises(AssertionError, match="go back"):
            ledger.adopt(version)
        with pytest.raises(AssertionError, match="go back"):
            ledger.enter(version)

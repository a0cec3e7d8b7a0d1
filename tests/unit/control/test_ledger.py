"""What the ledger keeps of owners."""

import asyncio
from pathlib import Path

from kfdist.control import run_rules
from kfdist.control.control_records import Change, OwnerRecord, RunRecord
from kfdist.control.dealing import Groups
from kfdist.control.ledger import Ledger
from kfdist.control.mutations import Request
from kfdist.control.owner_rules import DEAD_OWNERS_KEPT
from kfdist.control.store import Store
from kfdist.types import GroupSpec


def test_dead_owners_are_forgotten_beyond_those_kept_and_live_ones_never(tmp_path: Path):
    """Every pool has new names, so the file would grow for ever."""

    async def remember() -> set[str]:
        ledger = Ledger(Store(tmp_path / "control.sqlite"), on_change=lambda record: None)
        count = DEAD_OWNERS_KEPT + 50
        await ledger.put_owners([OwnerRecord(owner_id=f"o{i}", address="a:1", live=i < 5) for i in range(count)])
        # Known the longest, and the last to die.
        await ledger.put_owners([OwnerRecord(owner_id="o0", address="a:1", live=False)])
        known = set(ledger.owners)
        await ledger.close()
        return known

    known = asyncio.run(remember())
    assert known == {f"o{i}" for i in (0, 1, 2, 3, 4, *range(51, DEAD_OWNERS_KEPT + 50))}
    store = Store(tmp_path / "control.sqlite")
    owners = store.load().owners
    assert set(owners) == known and list(owners)[-1] == "o0"
    store.close()


def test_what_was_measured_of_other_groups_deals_no_new_ones(tmp_path: Path):
    """Seconds of the known groups beside the operations of new ones would give one owner all the known."""

    def specs(*costs: float) -> Groups:
        groups = tuple(GroupSpec(name=f"g{i}", cost=cost, position=i, bytes=0) for i, cost in enumerate(costs))
        return Groups(policy="lpt", specs=groups)

    def same(record: RunRecord | None) -> Change:
        return Change(record) if record else run_rules.created(None, name="r", directory="", total_steps=9, now_ns=1)

    async def dealt() -> list[dict[str, float]]:
        ledger = Ledger(Store(tmp_path / "control.sqlite"), on_change=lambda record: None)
        await ledger.put_owners([OwnerRecord(owner_id=f"o{i}", address="a:1") for i in range(2)])
        await ledger.change("r", same, groups=specs(1e9, 1e9))
        ledger.measure("r", {"g0": 0.01, "g1": 0.02})
        await ledger.replan("r", "ada", Request(request_id="a", digest=""))
        seconds = []
        for groups in (specs(1e9, 1e9), specs(1e9, 1e9, 1e9, 1e9)):
            await ledger.change("r", same, groups=groups)
            seconds.append(dict(ledger.assignment("r").seconds))
        owners = ledger.assignment("r").owner_by_group
        assert owners["g0"] != owners["g1"] and owners["g2"] != owners["g3"]
        await ledger.close()
        return seconds

    assert asyncio.run(dealt()) == [{"g0": 0.01, "g1": 0.02}, {}]

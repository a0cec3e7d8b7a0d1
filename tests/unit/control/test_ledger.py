"""What the ledger keeps of owners."""

import asyncio
from pathlib import Path

from kfdist.control.ledger import DEAD_OWNERS_KEPT, Ledger
from kfdist.control.run_rules import OwnerRecord
from kfdist.control.store import Store


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

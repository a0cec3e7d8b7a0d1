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
        await ledger.put_owners([OwnerRecord(owner_id="o0", address="a:1", live=False)])
        known = set(ledger.owners)
        await ledger.close()
        return known

    known = asyncio.run(remember())
    assert known == {f"o{i}" for i in (1, 2, 3, 4, *range(50, DEAD_OWNERS_KEPT + 50))}
    store = Store(tmp_path / "control.sqlite")
    assert set(store.load().owners) == known
    store.close()

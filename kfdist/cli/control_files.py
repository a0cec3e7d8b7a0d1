"""Reading a controller's SQLite file beside the controller, or after its end, without changing it."""

import contextlib
import sqlite3
from pathlib import Path
from typing import Any


def read_rows(database: Path, query: str, *arguments: str) -> list[tuple[Any, ...]]:
    """Returns what a query finds; nothing if the file can't be read."""
    if not database.is_file():
        return []
    # The second way is for a directory in which nothing may be written, as SQLite must beside a file in WAL mode.
    for mode in ("mode=ro", "immutable=1"):
        with contextlib.suppress(sqlite3.Error):
            with contextlib.closing(
                sqlite3.connect(f"{database.absolute().as_uri()}?{mode}", uri=True, timeout=0.2)
            ) as connection:
                return connection.execute(query, arguments).fetchall()
    return []

"""What a shell completes: runs, owners and configurations, from notices and files; nobody is asked, so it is quick."""

import json
from glob import escape
from pathlib import Path

from kfdist.cli.control_files import read_rows
from kfdist.system.run_notices import notices

_HOME = Path("runs")


def complete_run(incomplete: str) -> list[str]:
    """Returns the runs whose name, or whose directory, begins with what was typed."""
    if "/" in incomplete:
        parent = Path(incomplete[: incomplete.rindex("/") + 1])
        found = [
            f"{incomplete[: incomplete.rindex('/') + 1]}{path.parent.name}" for path in parent.glob("*/config.toml")
        ]
    else:
        posted = notices()
        found = [notice.run for notice in posted if notice.run]
        found += [name for notice in posted if notice.database for name in _known(Path(notice.database))]
        found += [path.parent.name for path in _HOME.glob("*/config.toml")]
    return sorted({name for name in found if name.startswith(incomplete)})


def complete_owner(incomplete: str) -> list[str]:
    """Returns the owners of this machine's controllers whose name begins with what was typed."""
    rows = [
        row
        for notice in notices()
        if notice.database
        for row in read_rows(Path(notice.database), "SELECT name, record FROM owners")
    ]
    return sorted({name for name, record in rows if name.startswith(incomplete) and json.loads(record)["live"]})


def complete_config(incomplete: str) -> list[str]:
    """Returns the recipes and the TOML files whose name begins with what was typed; none: the shell completes files."""
    from kfdist.config.recipes import recipes

    files = [str(path) for path in Path().glob(f"{escape(incomplete)}*.toml")] if incomplete[:1] != "/" else []
    return sorted([*(name for name in recipes() if name.startswith(incomplete)), *files])


def _known(database: Path) -> list[str]:
    return [name for (name,) in read_rows(database, "SELECT name FROM runs")]

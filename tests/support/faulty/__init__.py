"""The places outside tests where a script of faults (`tests/support/faults.py`) can act, and the facts that they state.

| module | facts | kinds besides kill, stop and delay |
|---|---|---|
| `link` | `start`, the rank of a link that starts | fail |
| `link` | `poll`, the number of a look at the link | |
| `link` | `result` (its number), `group`, `version`, the link's `step` | late, twice, withhold |
| `broadcasts` | `payload`, the number of one that arrives | late, corrupt |
| `inverter` | `seed`, of the inversion | fail |
| `child` | `inversion`, its number in the inversion process | |
| `courier` | `written`, the number of a result for the rank | corrupt |

Ranks state `rank` at every place, owners that a test starts state `owner`.
"""

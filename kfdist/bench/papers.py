"""`kfdist bench papers`: the papers' claims, measured (docs/papers.md)."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kfdist import checks
from kfdist.bench.claim_a_brand import measure_brand
from kfdist.bench.claim_b_cg import measure_cg_claim
from kfdist.bench.claim_c_seng import measure_seng_claim
from kfdist.bench.claim_d_reparametrisation import measure_reparametrisation
from kfdist.bench.claim_e_widths import measure_width_claim
from kfdist.bench.claims import ClaimResult
from kfdist.bench.measuring import measured
from kfdist.errors import ConfigError

CLAIMS: Mapping[str, Callable[[bool], ClaimResult]] = {
    "a": measure_brand,
    "b": measure_cg_claim,
    "c": measure_seng_claim,
    "d": measure_reparametrisation,
    "e": measure_width_claim,
}
"""Who measures what; the argument is `quick`."""

_MARKS = {True: "yes", False: "no", None: "?"}


def checked_claims(names: Sequence[str]) -> list[str]:
    """Returns the claims to measure, in the table's order and once each; all where none are named.

    Raises:
        ConfigError: There is no such claim.
    """
    for name in names:
        checks.choice("--claim", name, CLAIMS)
    return [name for name in CLAIMS if not names or name in names]


def run_claims(names: Sequence[str], *, quick: bool, directory: Path) -> Iterator[dict[str, Any]]:
    """Measures claims one after the other, on one thread, and writes each as soon as it is there.

    Args:
        names: Keys of `CLAIMS`; all if empty.
        quick: Small sizes: shows that the measurement works, not what it would find.
        directory: Where `papers_a.json` and so on go (`papers_a_quick.json` if quick); made if it doesn't exist.

    Yields:
        What was written: the result, and the hardware, versions, load average and time that belong to it.

    Raises:
        ConfigError: There is no such claim, or the directory can't be written to.
    """
    chosen = checked_claims(names)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{str(directory)!r} can't be made a directory ({error.strerror}); name another", path="--out"
        ) from None
    for name in chosen:
        content = {"quick": quick, **measured(lambda name=name: CLAIMS[name](quick).to_json())}
        path = directory / f"papers_{name}{'_quick' if quick else ''}.json"
        try:
            path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"{str(path)!r} can't be written ({error.strerror}); name another", path="--out"
            ) from None
        yield content


def describe(content: Mapping[str, Any]) -> str:
    """Puts one claim into lines: the verdict, what was seen of every part, and the conditions.

    Args:
        content: What `run_claims` yields.
    """
    load = content["load_average"]
    lines = [f"{content['claim']}  {content['verdict']:<17}{content['title']}"]
    lines += [f"     {_MARKS[part['holds']]:<4}{part['statement']}: {part['seen']}" for part in content["parts"]]
    conditions = "; ".join(f"{name} {_short(value)}" for name, value in content["conditions"].items())
    machine = f"{content['hardware']['cores']} cores, 1 thread, load {load['start']} to {load['end']}"
    quick = ["     quick: small sizes, which show that it runs and nothing else"] if content["quick"] else []
    return "\n".join([*lines, f"     on: {conditions}", f"     machine: {machine}; {content['seconds']:.0f} s", *quick])


def _short(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict | list) else str(value)

"""Defaults that depend on what else is configured: the sections' own are those of kfdist's own optimizer."""

from collections.abc import Mapping
from typing import Any

from kfdist.config.preconditioner_section import BY_WIDTH, PreconditionerSection
from kfdist.config.task_sections import OWN_OPTIMIZER

Table = dict[str, Any]

_TORCHS: Mapping[str, Table] = {
    "optimizer": {"lr": 0.1, "weight_decay": 5e-4},
    "preconditioner": {"ema_decay": 0.95, "factor_period": 2, "inverse_period": 10, "kl_clip": 1e-2},
}
"""What goes with an optimizer of torch, which takes directions as they are."""

_LR = 0.003
"""Where to begin on a task of which nothing is known (docs/tuning.md); the section's was the best on the digits."""

_TORCHS_METHOD: Table = {"method": "rs-kfac", "settings": {"rank": 128}}

_OWN = PreconditionerSection().settings
"""The default method's."""

_PERIODS = ("factor_period", "inverse_period", "inverse_period_epochs")


def defaults_beside(given: Mapping[str, Any]) -> Table:
    """Returns what differs from the sections' defaults, as `kfdist.Optimizer` differs where it is given arguments.

    Args:
        given: What a configuration says, without any default; tables may be of any type yet.
    """
    optimizer, preconditioner = table_of(given.get("optimizer")), table_of(given.get("preconditioner"))
    settings = table_of(preconditioner.get("settings"))
    others = {name for name in ("dense", "wide") if settings.get(name, _OWN[name]) != _OWN[name]}
    named = bool(preconditioner.keys() & {"method", "methods"})
    if optimizer.get("name", OWN_OPTIMIZER) != OWN_OPTIMIZER:
        method = {} if named else _TORCHS_METHOD
        return {**_TORCHS, "preconditioner": {**_TORCHS["preconditioner"], **method}}
    graft, found = table_of(optimizer.get("settings")).get("graft", "adamw"), Table()
    if named or others or graft != "adamw":
        found["ema_decay"] = 0.95
    if not named and graft != "adamw":
        # Under SGD's lengths, or the Newton step's, a direction of Adam's size is another method's.
        found |= {"method": BY_WIDTH, "settings": {"dense": "kfac-eigen"}}
    elif not named and "dense" in others:
        found |= {"method": BY_WIDTH, "settings": {}}  # it has settings of its own
    elif not named and preconditioner.keys() & set(_PERIODS):
        # A period that is given holds for all blocks.
        found |= {"method": BY_WIDTH, "settings": {name: _OWN[name] for name in ("dense", "wide")}}
    if graft == "none":
        found["kl_clip"] = 1e-3
    return {"optimizer": _rate(given, graft), "preconditioner": found}


def _rate(given: Mapping[str, Any], graft: object) -> Table:
    if graft == "sgd":
        return {"lr": _TORCHS["optimizer"]["lr"]}  # the lengths are SGD's
    named = any("name" in table_of(given.get(section)) for section in ("data", "model"))
    return {"lr": _LR} if named else {}


def table_of(value: object) -> Mapping[str, Any]:
    """Returns a table, empty where the value is none, which `config_from_table` says."""
    return value if isinstance(value, Mapping) else {}

"""Numerical guards and diagnostics that the methods share."""

from torch import Tensor

from kfdist.curvature.inverter import Outcome, split_seed
from kfdist.errors import ConfigError
from kfdist.linalg.lowrank import gaussian_sketch

PROBES = 4
"""Random columns by which residuals are estimated: enough to miss a gross error with probability below 1e-6, at a
cost of O(d^2)."""

NEGATIVE_TOLERANCE = 1e-3
"""Negative eigenvalues up to this fraction of the largest are rounding: sums of d float32 products reach about d
1e-7."""


def probes_like(matrix: Tensor, columns_of: Tensor | None, *, seed: int, label: str) -> Tensor:
    """Draws Gaussian probe columns.

    Args:
        matrix: `[c, d, d]`; gives dtype, device and, without `columns_of`, the size.
        columns_of: A matrix `[c, d, r]` for probes with r rows instead.
        seed: The inversion's seed.
        label: Which factor.
    """
    like = matrix if columns_of is None else columns_of.mT
    return gaussian_sketch(like, PROBES, seed=split_seed(seed, f"probes/{label}"))


def clamp_spectrum(values: Tensor) -> tuple[Tensor, Outcome]:
    """Sets negative eigenvalues to zero.

    Args:
        values: `[c, r]`.

    Returns:
        The clamped values, and CLAMPED if any was negative beyond rounding.
    """
    largest = values.abs().amax(-1, keepdim=True)
    beyond_rounding = bool((values < -NEGATIVE_TOLERANCE * largest).any())
    return values.clamp_min(0), Outcome.CLAMPED if beyond_rounding else Outcome.DONE


def check_choice(field: str, value: object, allowed: tuple[object, ...]) -> None:
    """Refuses a setting outside its allowed values.

    Raises:
        ConfigError: `value` isn't in `allowed`.
    """
    if value not in allowed:
        raise ConfigError(f"{value!r} is not allowed; choose one of {', '.join(map(repr, allowed))}", path=field)


def check_count(field: str, value: object, *, least: int) -> None:
    """Refuses a setting that isn't a whole number of at least `least`.

    Raises:
        ConfigError: It isn't.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{value!r} is not allowed; must be a whole number of at least {least}", path=field)


def check_switch(field: str, value: object) -> None:
    """Refuses a setting that isn't true or false.

    Raises:
        ConfigError: It isn't.
    """
    if not isinstance(value, bool):
        raise ConfigError(f"{value!r} must be true or false", path=field)

"""Refusals of settings that the methods share."""

from kfdist.errors import ConfigError


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

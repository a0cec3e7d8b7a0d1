"""Things chosen by name in a configuration, with settings of their own: models, data sets."""

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from kfdist.checks import suggestion
from kfdist.config.fields import Section
from kfdist.config.findings import config_error
from kfdist.errors import ConfigError

S = TypeVar("S", bound=Section)


def by_name(table: Mapping[str, type[S]], name: str, settings: Mapping[str, Any], *, section: str) -> S:
    """Looks a name up in a table and gives the settings to what is found there.

    Args:
        table: What there is; the settings are the fields of the class.
        name: The name as configured.
        settings: The `settings` as configured.
        section: The configuration section both stand in, for messages.

    Raises:
        ConfigError: The name is unknown, or a setting is unknown or not allowed.
    """
    if name not in table:
        known = ", ".join(sorted(table))
        raise ConfigError(f"is {name!r}{suggestion(name, table) or ';'} there is: {known}", path=f"{section}.name")
    kind = table[name]
    try:
        return kind.model_validate(dict(settings))
    except ValidationError as error:
        raise config_error(error, kind, prefix=f"{section}.settings") from None

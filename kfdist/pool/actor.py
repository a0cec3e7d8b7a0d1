"""The Ray actor: a thin shell around `OwnerServer`. It shows as `ray::Owner` in `ps`.

An owner holds caches only. When its process ends, Ray starts it again under the same name, with nothing to restore.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from kfdist.owner.owner_server import OwnerOptions, OwnerServer
from kfdist.telemetry.logging import setup_logging


class Owner:
    """Inverts the groups assigned to it. The supervisor makes an actor of it; methods take and return plain data."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        """Starts serving.

        Args:
            options: The fields of `OwnerOptions`.
        """
        setup_logging()
        self._server = OwnerServer(OwnerOptions(**options))

    def ping(self) -> dict[str, Any]:
        """Returns how it stands: address, fingerprint, whether it is registered, process ids, counts."""
        return self._server.status()

    def set_peers(self, owners: Sequence[Mapping[str, str]]) -> None:
        """Records the live owners, to tell couriers while the controller is away."""
        self._server.set_peers(owners)

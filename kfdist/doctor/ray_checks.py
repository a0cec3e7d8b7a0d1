"""Whether the pool can talk to Ray: where it is, and whether this process would show it the right token."""

import os
import socket
from collections.abc import Mapping
from pathlib import Path

from kfdist.config import Config
from kfdist.doctor.finding import Finding, failed, ok, warning
from kfdist.system.addresses import split_address
from kfdist.system.files import is_private

SECONDS = 3.0

_MODES = ("token", "disabled")


def check_ray(config: Config, environment: Mapping[str, str] = os.environ) -> list[Finding]:
    """Checks the Ray that the pool would connect to.

    Args:
        config: Which one it is.
        environment: The process's variables.
    """
    if config.cluster.link != "service" or not config.preconditioner.inverts:
        return [ok("ray", "this run needs none")]
    if config.cluster.ray == "local":
        return [ok("ray authentication", "a Ray of the run's own, with a new token")]
    return [check_reachable(config.cluster.ray, environment), check_authentication(environment)]


def check_reachable(address: str, environment: Mapping[str, str]) -> Finding:
    """Checks that somebody listens where Ray should be."""
    wanted = environment.get("RAY_ADDRESS", "") if address == "auto" else address
    if not wanted:
        return ok("ray", 'cluster.ray = "auto": Ray looks for one on this machine')
    try:
        socket.create_connection(split_address(wanted), timeout=SECONDS).close()
    except (OSError, ValueError) as error:
        mend = "give the address that `ray start --head` printed in cluster.ray, and open its port in the firewall"
        return failed("ray", f"nobody listens at {wanted} ({error})", mend)
    return ok("ray", f"somebody listens at {wanted}")


def check_authentication(environment: Mapping[str, str]) -> Finding:
    """Checks that how this process would show itself to a cluster makes sense, as Ray reads the variables."""
    check, mode = "ray authentication", environment.get("RAY_AUTH_MODE", "")
    token, where = _token(environment)
    if mode and mode not in _MODES:
        mend = "export RAY_AUTH_MODE=token, or disabled, as the cluster has it"
        return failed(check, f"RAY_AUTH_MODE is {mode!r}, which Ray doesn't know", mend)
    if mode == "disabled" or (not mode and where is None):
        if where is not None:
            mend = "export RAY_AUTH_MODE=token if the cluster has one"
            return warning(check, f"RAY_AUTH_MODE is disabled, although there is a token ({where})", mend)
        seen = "no token, and RAY_AUTH_MODE isn't set: a cluster with a token refuses this"
        mend = (
            "export RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH for a cluster with a token, else RAY_AUTH_MODE=disabled"
        )
        return ok(check, "disabled (RAY_AUTH_MODE)") if mode else warning(check, seen, mend)
    if token is None:
        seen = f"RAY_AUTH_MODE is token, and {where or 'there is none'}"
        return failed(check, seen, "put the cluster's token into a file, and its path into RAY_AUTH_TOKEN_PATH")
    if isinstance(where, Path) and not is_private(where):
        return warning(check, f"others may read the token in {where}", f"chmod 600 {where}")
    return ok(check, f"token mode; the token is in {where}")


def _token(environment: Mapping[str, str]) -> tuple[str | None, Path | str | None]:
    """Returns the token that Ray would take, if there is one, and where that is or what is wrong with it."""
    if "RAY_AUTH_TOKEN" in environment:
        token = environment["RAY_AUTH_TOKEN"].strip()
        return token or None, "RAY_AUTH_TOKEN" if token else "RAY_AUTH_TOKEN is empty"
    given = environment.get("RAY_AUTH_TOKEN_PATH")
    path = Path(given) if given else Path(environment.get("HOME", "/")) / ".ray" / "auth_token"
    try:
        token = path.read_text(encoding="utf-8").strip()
    except OSError as error:
        return None, f"{path} can't be read ({error.strerror})" if given else None
    return token or None, path if token else f"{path} is empty"

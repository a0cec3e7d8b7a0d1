"""Whether the addresses of a run can be had or reached, and whether the controller's clock agrees with this one."""

import errno
import http.client
import socket
import ssl
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from kfdist.config import Config
from kfdist.control.client import ControlClient
from kfdist.doctor.finding import Finding, divided, failed, ok, warning
from kfdist.errors import EnvironmentFault, KfdistError
from kfdist.system.addresses import check_bindable, is_loopback, join_address, socket_address, split_address
from kfdist.system.credentials import Role

SECONDS = 3.0

CLOCKS_DIFFER_SECONDS = 5.0
"""What clocks may differ by without a word: HTTP tells whole seconds, and answers take a while."""

_FAR_OFF_SECONDS = 3600.0
"""New certificates hold from an hour ago (`kfdist.rpc.certificates`)."""

_SHOWN = 5


def check_server_port(check: str, address: str, path: str) -> Finding:
    """Checks that a server could take an address, or that it is another machine's.

    Args:
        check: The finding's name.
        address: "host:port".
        path: The field that has it.
    """
    host, port = split_address(address)
    if port == 0:
        return ok(check, f"{address}: any free port")
    try:
        check_bindable(host, port, path=path)
    except EnvironmentFault as fault:
        seen, mend = divided(fault)
        if is_elsewhere(host):
            return ok(check, f"{address} is another machine's")
        return failed(check, seen, mend)
    return ok(check, f"{address} is free")


def is_elsewhere(host: str) -> bool:
    """Says whether a host is another machine, as far as its address shows."""
    if is_loopback(host):
        return False
    try:
        family, address = socket_address(host, 0)
        with socket.socket(family) as probe:
            probe.bind(address)
    except socket.gaierror:
        return True
    except OSError as error:
        return error.errno == errno.EADDRNOTAVAIL
    return False


def check_owner_ports(ports: tuple[int, int] | None, owners: int) -> Finding:
    """Checks that as many of the ports that owners may take are free as one machine may have owners.

    Args:
        ports: The first and the last; None for any.
        owners: How many there will be.
    """
    if ports is None:
        return ok("owner ports", "any free ones")
    first, last = ports
    taken = [port for port in range(first, last + 1) if not _is_free(port)]
    free = last - first + 1 - len(taken)
    shown = ", ".join(map(str, taken[:_SHOWN])) + (", ..." if len(taken) > _SHOWN else "")
    seen = f"{free} of {first} to {last} are free" + (f", taken: {shown}" if taken else "")
    if free >= owners:
        return ok("owner ports", seen)
    mend = f"{owners} owners on one machine take {owners}: widen cluster.owner_ports, or end what has them"
    return failed("owner ports", seen, mend)


def _is_free(port: int) -> bool:
    try:
        check_bindable("127.0.0.1", port, path="")
    except EnvironmentFault:
        return False
    return True


def check_controller(config: Config) -> Finding:
    """Asks the controller for its runs, if one is to be there already or answers."""
    address = config.control.address
    host, port = split_address(address)
    if port == 0:
        return ok("controller", f"{address}: the launch starts one of its own")
    try:
        socket.create_connection((host, port), timeout=SECONDS).close()
    except OSError as error:
        seen = f"nobody answers at {address} ({error.strerror or error})"
        if is_elsewhere(host):
            mend = "start `kfdist serve` there, open its port in the firewall, or correct control.address"
            return failed("controller", seen, mend)
        return ok("controller", f"{seen}; `kfdist train` starts one")
    try:
        credentials = config.security.credentials(Role.CLIENT)
        with ControlClient(address, credentials, timeout_seconds=SECONDS) as client:
            runs = client.runs()
    except KfdistError as fault:
        seen, mend = divided(fault)
        return failed("controller", seen, mend or f"another program may have {address}: choose another control.address")
    return ok("controller", f"answers at {address}, knows {len(runs)} run{'' if len(runs) == 1 else 's'}")


def check_ports(config: Config, controller: Finding) -> list[Finding]:
    """Checks the ports that the run's processes take on this machine.

    Args:
        config: What is to run.
        controller: What was found of the controller: where one answers, its ports are taken rightly.
    """
    owners = config.cluster.owners if config.cluster.link == "service" else 0
    findings = [check_owner_ports(config.cluster.owner_ports, owners)]
    if controller.seen.startswith("answers at"):
        return findings
    servers = (("controller port", "address"), ("metrics port", "metrics_address"))
    return [
        *(check_server_port(check, getattr(config.control, name), f"control.{name}") for check, name in servers),
        *findings,
    ]


def time_at(address: str, context: ssl.SSLContext | None) -> datetime | None:
    """Returns what an HTTP server says the time is, in whole seconds; None if it doesn't.

    Args:
        address: "host:port".
        context: For HTTPS.
    """
    host, port = split_address(address)
    connection = (
        http.client.HTTPConnection(host, port, timeout=SECONDS)
        if context is None
        else http.client.HTTPSConnection(host, port, timeout=SECONDS, context=context)
    )
    try:
        connection.request("GET", "/metrics")
        said = connection.getresponse().getheader("Date")
        return None if said is None else parsedate_to_datetime(said)
    except (OSError, http.client.HTTPException, ValueError):
        return None
    finally:
        connection.close()


def compare_clocks(there: datetime, now: datetime, address: str) -> Finding:
    """Compares another machine's time with this one's."""
    behind = (there - now).total_seconds()
    seen = f"{abs(behind):.0f} s {'behind' if behind > 0 else 'ahead of'} the controller's ({address})"
    mend = "set both clocks right, by NTP"
    if abs(behind) >= _FAR_OFF_SECONDS:
        return failed("clocks", f"{seen}: certificates look expired, or not valid yet", mend)
    if abs(behind) > CLOCKS_DIFFER_SECONDS:
        return warning("clocks", f"{seen}: ages and leases are told wrongly", mend)
    return ok("clocks", f"this one agrees with the controller's ({address})")


def check_clocks(config: Config) -> Finding | None:
    """Compares this machine's clock with the controller's; None where that doesn't tell."""
    address = config.control.metrics_address
    host, port = split_address(address)
    if port == 0:
        return None
    context = None
    credentials = config.security.credentials(Role.CLIENT)
    if credentials is not None and not is_loopback(host):
        try:
            context = credentials.tls(ssl.PROTOCOL_TLS_CLIENT)
        except EnvironmentFault:  # told of the certificates
            return None
        context.check_hostname = False  # certificates name roles; time is no secret
    there = time_at(address, context)
    return None if there is None else compare_clocks(there, datetime.now(UTC), join_address(host, port))

"""All checks, one after the other; the order is that of the table that is shown."""

from kfdist.config import Config
from kfdist.doctor.certificate_checks import check_certificates
from kfdist.doctor.finding import Finding
from kfdist.doctor.gpu_checks import check_gpus, look_for_gpus
from kfdist.doctor.machine_checks import check_machine
from kfdist.doctor.network_checks import check_clocks, check_controller, check_ports
from kfdist.doctor.ray_checks import check_ray
from kfdist.doctor.version_checks import check_versions


def examine(config: Config) -> list[Finding]:
    """Looks at everything that a run of this configuration takes of this machine; starts and leaves nothing."""
    controller = check_controller(config)
    clocks = check_clocks(config)
    return [
        *check_versions(),
        *check_machine(config, checkpoints=(0, "some for checkpoints")),
        *([clocks] if clocks is not None else []),
        *check_ray(config),
        *check_ports(config, controller),
        controller,
        *check_certificates(config),
        *check_gpus(config, look_for_gpus()),
    ]

"""All checks, one after the other; the order is that of the table that is shown."""

from kfdist.config import Config
from kfdist.doctor.certificate_checks import check_certificates
from kfdist.doctor.finding import Finding
from kfdist.doctor.gpu_checks import check_gpus, look_for_gpus
from kfdist.doctor.machine_checks import check_machine
from kfdist.doctor.network_checks import check_clocks, check_controller, check_ports
from kfdist.doctor.ray_checks import check_ray
from kfdist.doctor.version_checks import check_versions
from kfdist.forecast.checkpoint_size import checkpoint_bytes
from kfdist.system.memory import in_words


def examine(config: Config) -> list[Finding]:
    """Looks at everything that a run of this configuration takes of this machine; starts and leaves nothing."""
    controller = check_controller(config)
    clocks = check_clocks(config)
    return [
        *check_versions(config),
        *check_machine(config, checkpoints=_checkpoints(config)),
        *([clocks] if clocks is not None else []),
        *check_ray(config),
        *check_ports(config, controller),
        controller,
        *check_certificates(config),
        *check_gpus(config, look_for_gpus()),
    ]


def _checkpoints(config: Config) -> tuple[int, str]:
    """Returns what a run's checkpoints take, 0 if that isn't known, and what they are."""
    kept = config.checkpoint.keep + 1  # the next one is written before the oldest is removed
    try:
        size = checkpoint_bytes(config)
    except Exception as error:  # of the user's own code, too; `kfdist plan` and the run itself say more
        return 0, f"{kept} checkpoints of unknown size ({type(error).__name__} while the model was made)"
    if size is None:
        return 0, f"{kept} checkpoints of unknown size"
    return kept * size, f"{kept} checkpoints of about {in_words(size)}"

"""Users set a default device and a default dtype; the package's own tensors depend on neither."""

import ast
from pathlib import Path

from torch.utils._device import _device_constructors

from tests.support.sources import FILES, PACKAGE, calls_of

OF_ITS_OWN_PROCESS = PACKAGE / "bench"

FACTORIES = {function.__name__ for function in _device_constructors()}
WHOLE_NUMBERS = {"arange", "randperm", "tril_indices", "triu_indices"}


def _factory_calls(path: Path) -> list[tuple[str, ast.Call]]:
    return [
        (call.func.attr, call)
        for _, call in calls_of(path)
        if isinstance(call.func, ast.Attribute)
        and isinstance(call.func.value, ast.Name)
        and call.func.value.id == "torch"
        and call.func.attr in FACTORIES
    ]


def test_every_factory_names_its_device_and_dtype() -> None:
    found, silent = 0, []
    for path in FILES:
        if OF_ITS_OWN_PROCESS in path.parents:
            continue
        for name, call in _factory_calls(path):
            found += 1
            needed = {"device"} if name in WHOLE_NUMBERS else {"device", "dtype"}
            missing = needed - {keyword.arg for keyword in call.keywords}
            if missing:
                silent.append(f"{path.relative_to(PACKAGE)}:{call.lineno}: torch.{name} without {sorted(missing)}")
    assert found > 50
    assert silent == []

from collections.abc import Iterator

import pytest

from tests.support.ranks import stop_fork_server


@pytest.fixture(scope="session", autouse=True)
def fork_server() -> Iterator[None]:
    yield
    stop_fork_server()


@pytest.fixture(autouse=True)
def one_thread() -> None:
    import torch  # the process that only hands tests out reads this file, too

    torch.set_num_threads(1)

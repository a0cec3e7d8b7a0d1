import pytest


@pytest.fixture(autouse=True)
def one_thread() -> None:
    import torch  # the process that only hands tests out reads this file, too

    torch.set_num_threads(1)

"""A preconditioner's state outside of kfdist's own checkpoints."""

import io

import pytest
import torch

from kfdist.errors import CheckpointError
from kfdist.wire.tree import pack, unpack
from tests.support.preconditioning import backward, preconditioner, two_layers


@pytest.mark.parametrize("by_torch", [True, False], ids=["torch.save", "safetensors"])
def test_a_state_goes_on_from_a_file_without_pickled_code(by_torch: bool):
    def trained(steps: range, state: object = None) -> tuple[dict[str, object], list[torch.Tensor]]:
        model = two_layers()
        with preconditioner(model, "kfac-eigen") as pre:
            if state is not None:
                pre.load_state_dict(state)
            for step in steps:
                model.zero_grad()
                backward(model, seed=step)
                pre.step()
            return pre.state_dict(), [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    state, _ = trained(range(3))
    if by_torch:
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        again = torch.load(file, weights_only=True)
    else:
        again = unpack(pack(state))
    _, resumed = trained(range(3, 5), again)
    _, whole = trained(range(5))
    assert all(torch.equal(one, other) for one, other in zip(resumed, whole, strict=True))


def test_a_state_of_an_older_format_is_refused_with_what_to_do():
    with preconditioner(two_layers()) as pre:
        state = {**pre.state_dict(), "format": 2}
        with pytest.raises(CheckpointError, match="has format 2 and .* reads 3 alone; resume it with the version"):
            pre.load_state_dict(state)

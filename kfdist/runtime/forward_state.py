"""What a forward pass in training mode changes besides gradients: torch's generators and the model's buffers."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kfdist.seeds import seed_from


def seed_rank(seed: int, *, worker_rank: int, start: int = 0) -> None:
    """Seeds torch's generators (CPU and devices), differently on every rank.

    Args:
        seed: The run's seed.
        worker_rank: This rank.
        start: The step at which training starts: a run resumed on another number of ranks draws anew from there.
    """
    torch.manual_seed(seed_from(f"kfdist rank {seed} {worker_rank} {start}"))


class ForwardState:
    """The generators (the CPU's and the model's device's) and buffers (BatchNorm's averages) at one moment.

    A step that is interrupted after its forward is done again, and a closure may run several times in one step: each
    then starts from a state held here. Python's and NumPy's generators are the user's and stay as they are.

    Args:
        model: The module that runs.
        device: Where it is.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._device = device
        homes = {name: name.rpartition(".") for name, _ in model.named_buffers(remove_duplicate=False)}
        self._homes = {name: (model.get_submodule(path), key) for name, (path, _, key) in homes.items()}
        self._persistent = self._homes.keys() & model.state_dict(keep_vars=True).keys()
        self.remember()

    def remember(self) -> None:
        """Holds the present state from now on. Copies on the device; nothing is synchronised."""
        self._random = {
            "cpu": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(self._device) if self._device.type == "cuda" else None,
        }
        # The tensor is kept beside its values: a forward may put another one in its place.
        tensors: dict[str, Tensor] = {name: getattr(module, key) for name, (module, key) in self._homes.items()}
        self._buffers = {name: (buffer, buffer.detach().clone()) for name, buffer in tensors.items()}

    def restore(self) -> None:
        """Puts generators and buffers back to what is held."""
        self._restore_random(self._random)
        with torch.no_grad():
            for name, (buffer, values) in self._buffers.items():
                buffer.copy_(values)
                module, key = self._homes[name]
                setattr(module, key, buffer)

    def state_dict(self) -> dict[str, Any]:
        """Returns what is held, without the buffers that the model declares as not persistent."""
        buffers = {name: values for name, (_, values) in self._buffers.items() if name in self._persistent}
        return {"random": self._random, "buffers": buffers}

    def load_random(self, state: Mapping[str, Any]) -> None:
        """Puts the generators back to a saved state, and holds it."""
        self._restore_random(state["random"])
        self.remember()

    def load_buffers(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Puts the buffers back to saved states, and holds them.

        Args:
            states: One per rank that saved: floating-point buffers take the mean, counters the first rank's value.
        """
        for name in self._persistent:
            saved = [state["buffers"][name] for state in states]
            mean = torch.stack(saved).mean(0) if saved[0].is_floating_point() and len(saved) > 1 else saved[0]
            module, key = self._homes[name]
            getattr(module, key).copy_(mean)
        self.remember()

    def _restore_random(self, random: Mapping[str, Any]) -> None:
        torch.set_rng_state(random["cpu"])
        if self._device.type == "cuda" and random["cuda"] is not None:
            torch.cuda.set_rng_state(random["cuda"], self._device)

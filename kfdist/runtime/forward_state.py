"""The random state of a rank: seeded from the run's seed, saved before each forward, put back on resume."""

from typing import Any

import torch
from torch import Tensor

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
    """What a forward pass in training mode changes besides gradients: generators and buffers (BatchNorm's averages).

    Remembered after each step that is done, because a step that was interrupted after its forward is done again.
    """

    def __init__(self, model: torch.nn.Module, device: torch.device) -> None:
        self._device = device
        persistent = model.state_dict(keep_vars=True)
        self._live: dict[str, Tensor] = {name: buffer for name, buffer in model.named_buffers() if name in persistent}
        self._saved = {name: buffer.clone() for name, buffer in self._live.items()}
        self._random: dict[str, Any] = {}
        self.remember()

    def remember(self) -> None:
        """Remembers the present state. Copies on the device; nothing is synchronised."""
        self._random = {
            "cpu": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(self._device) if self._device.type == "cuda" else None,
        }
        for name, buffer in self._live.items():
            self._saved[name].copy_(buffer)

    def state_dict(self) -> dict[str, Any]:
        """Returns what was remembered last."""
        return {"random": self._random, "buffers": self._saved}

    def load_random(self, state: dict[str, Any]) -> None:
        """Puts the generators back to a saved state."""
        torch.set_rng_state(state["random"]["cpu"])
        if self._device.type == "cuda" and state["random"]["cuda"] is not None:
            torch.cuda.set_rng_state(state["random"]["cuda"], self._device)

    def load_buffers(self, states: list[dict[str, Any]]) -> None:
        """Puts the buffers back; of several ranks' states, averages take the mean and counters the first rank's."""
        for name, buffer in self._live.items():
            saved = [state["buffers"][name] for state in states]
            mean = torch.stack(saved).mean(0) if saved[0].is_floating_point() and len(saved) > 1 else saved[0]
            buffer.copy_(mean)
        self.remember()

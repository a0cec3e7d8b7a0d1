"""How far steps move each group, and what grafts made of its directions' lengths, for telemetry; nothing waits for it.

Both are worked out where somebody asks. In between a step costs nothing on the device, and no memory.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kfdist.comm.host_copy import HostCopy, LateTotal
from kfdist.runtime.plan.groups import BlockGroup
from kfdist.torch_internals import foreach_norm
from kfdist.types import GroupName

ENTRIES = 16_384
"""Of a parameter that has more, as many are drawn, so that no copy of the model is made: lengths are then estimates,
whose standard deviation is below a percent where the entries move about alike."""

PERIOD = 10
"""Steps from one that is measured to the next, at least, however often somebody asks."""

Groups = Mapping[GroupName, Sequence[nn.Parameter]]
"""The parameters of each group."""


def parameters_of(groups: Iterable[BlockGroup]) -> Groups:
    """Returns the parameters of each group, none twice."""
    return {group.name: list(dict.fromkeys(p for b in group.blocks for p in b.parameters())) for group in groups}


class StepLengths:
    """Measures |theta' - theta| / |theta| of each group over one step, whatever moved it: lr |direction| / |theta|.

    Momentum, a graft, decay and the KL clip are in it; a step that was skipped or undone has 0.

    Args:
        groups: The parameters; none where another rank measures.
    """

    def __init__(self, groups: Groups) -> None:
        self._groups = groups
        self._parameters = list(dict.fromkeys(p for parameters in groups.values() for p in parameters))
        self._asked = False
        self._rest = 0
        self._before: list[Tensor] | None = None
        self._copy: HostCopy | None = None
        self._known: dict[GroupName, float] = {}
        self._places: dict[tuple[int, torch.device], Tensor] = {}

    def ask(self) -> None:
        """Has a step measured: the next one, unless one was lately."""
        self._asked = bool(self._parameters)

    def begin(self) -> None:
        """A step's gradients are final: from here on parameters move."""
        self._rest -= 1
        if self._asked and self._rest <= 0:
            self._asked, self._rest = False, PERIOD
            self._before = [self._entries(parameter) for parameter in self._parameters]

    def end(self) -> None:
        """The parameters have moved."""
        if self._before is None:
            return
        before, self._before = self._before, None
        changes = [self._entries(p) - entries for p, entries in zip(self._parameters, before, strict=True)]
        self._copy = HostCopy([torch.stack([*foreach_norm(changes), *foreach_norm(before)])])

    def latest(self) -> dict[GroupName, float]:
        """Returns the newest lengths that have reached the host; groups whose parameters were all 0 are left out."""
        if self._copy is not None and self._copy.ready():
            [norms] = self._copy.wait()
            self._copy = None
            moved, length = norms.view(2, -1).tolist()
            place = {parameter: number for number, parameter in enumerate(self._parameters)}

            def norm(norms: Sequence[float], parameters: Sequence[nn.Parameter]) -> float:
                return math.sqrt(sum(norms[place[p]] ** 2 * max(p.numel() / ENTRIES, 1.0) for p in parameters))

            found = {name: (norm(moved, each), norm(length, each)) for name, each in self._groups.items()}
            self._known = {name: change / size for name, (change, size) in found.items() if size}
        return self._known

    def _entries(self, parameter: nn.Parameter) -> Tensor:
        # Dimensions in the order of memory, whichever it is: of a dense tensor that is a view, channels_last or not.
        order = sorted(range(parameter.dim()), key=parameter.stride, reverse=True)
        flat = parameter.detach().permute(order).reshape(-1)
        if flat.numel() <= ENTRIES:
            return flat.to(torch.float64, copy=True)
        key = flat.numel(), flat.device
        if key not in self._places:  # drawn where they are needed: a copy to the device would be waited for
            draw = torch.Generator(device=flat.device).manual_seed(flat.numel())
            self._places[key] = torch.randint(
                flat.numel(), (ENTRIES,), generator=draw, dtype=torch.int64, device=flat.device
            )
        return flat[self._places[key]].double()


class GraftLengths(NamedTuple):
    """Of one step, by parameter, on the device.

    Attributes:
        wanted: |a|, the length of the graft's update.
        own: |U|, the direction's.
        usable: Whether the direction was taken; otherwise the update was.
    """

    wanted: Tensor
    own: Tensor
    usable: Tensor


class GraftRatios:
    """Keeps |a| / |U| of each group at the newest step: what the graft multiplied its direction by.

    Args:
        groups: The parameters; none where another rank tells.
    """

    def __init__(self, groups: Groups) -> None:
        self._groups = groups
        self._replaced: Tensor | None = None
        self._told = LateTotal()
        self._noted: list[tuple[Sequence[Tensor], GraftLengths]] = []
        self._copy: tuple[list[Tensor], HostCopy] | None = None
        self._known: dict[GroupName, float] = {}

    def begin(self) -> None:
        """Another step begins."""
        self._noted = []

    def note(self, parameters: Sequence[Tensor], lengths: GraftLengths, replaced: Tensor) -> None:
        """Keeps what a step did, as it is: the device isn't asked.

        Args:
            parameters: Some of a step's; none twice.
            lengths: Theirs.
            replaced: How many directions gave way so far.
        """
        self._noted.append((parameters, lengths))
        self._replaced = replaced

    def latest(self) -> dict[GroupName, float]:
        """Returns the newest ratios that have reached the host, and sends for newer ones.

        Groups of which every direction gave way have none.
        """
        self._take_if_ready()
        if self._copy is None and self._noted and self._groups:
            parameters = [parameter for some, _ in self._noted for parameter in some]
            together = [torch.stack([part.double() for part in lengths]) for _, lengths in self._noted]
            self._copy = parameters, HostCopy([torch.cat(together, dim=1)])
            self._noted = []
            self._take_if_ready()
        return self._known

    def replaced(self) -> float | None:
        """Returns how many directions gave way, as of a little earlier; None without a graft."""
        return None if self._replaced is None else self._told.latest([self._replaced])

    def _take_if_ready(self) -> None:
        if self._copy is None or not self._copy[1].ready():
            return
        parameters, copy = self._copy
        self._copy = None
        columns = zip(*copy.wait()[0].tolist(), strict=True)
        taken = {p: (wanted, own) for p, (wanted, own, usable) in zip(parameters, columns, strict=True) if usable}
        found = {name: [taken[p] for p in each if p in taken] for name, each in self._groups.items()}
        self._known = {
            name: math.hypot(*(wanted for wanted, _ in pairs)) / math.hypot(*(own for _, own in pairs))
            for name, pairs in found.items()
            if pairs
        }

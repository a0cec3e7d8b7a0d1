"""One rank's training in a test of adoption, with a record of every step; what the records of all ranks must say."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import kfdist
from kfdist.comm.communicator import Communicator
from kfdist.comm.reduce import GradientReducer
from kfdist.runtime.pipeline import Pipeline
from tests.support.faults import reach
from tests.support.faulty.link import FaultyLink
from tests.support.small_models import images, small_cnn


@dataclass(frozen=True, kw_only=True)
class Record:
    """What one rank saw of one step, after the optimizer's step."""

    step: int
    stop: bool
    parameters: str
    adopted: tuple[tuple[str, int], ...]
    versions: Mapping[str, int]
    payloads: Mapping[str, str]
    staleness: Mapping[str, int]
    damping: float
    policy: Mapping[str, int]
    pending: Mapping[str, int]
    overlapping: tuple[str, ...]


class TrainingRank:
    """A small model trained for a few steps; every rank of a test makes one.

    Args:
        communicator: The training group.
        **options: For the preconditioner, over what is usual here.
    """

    def __init__(self, communicator: Communicator, **options: Any) -> None:
        self.link = FaultyLink()
        self.model = small_cnn(dtype=torch.float32)
        self.pre = kfdist.Preconditioner(
            self.model,
            **{
                "method": "kfac-eigen",
                "damping": 0.1,
                "factor_period": 1,
                "inverse_period": 4,
                "lr": 0.05,
                "digest_period": 1,
                "link": self.link,
                **options,
            },
        )
        self._communicator = communicator
        self._optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        self._reducer = GradientReducer(list(self.model.parameters()), communicator, bucket_bytes=400)
        self._fallbacks: Counter[str] = Counter()

    @property
    def pipeline(self) -> Pipeline:
        """The pipeline under test."""
        return self.pre.pipeline

    def limit_waits(self, seconds: float) -> None:
        """Limits the agreed waits from now on; those before may have taken long on a busy machine."""
        self.pipeline.adopting.exchange.wait_limit_seconds = seconds

    def run(self, steps: int) -> list[Record]:
        """Trains up to step number `steps`."""
        return [self.step() for _ in range(self.pre.next_step, steps)]

    def step(self) -> Record:
        """Makes one training step."""
        reach(step=self.pre.next_step)
        self.backward()
        return self.second_half()

    def backward(self, *, poisoned: bool = False) -> None:
        """Computes and averages gradients; non-finite ones (a poisoned batch on any rank) count as zero on all."""
        step, rank = self.pre.next_step, self._communicator.rank
        x, y = images(8 * self._communicator.world_size, seed=step, dtype=torch.float32)
        x, y = x[8 * rank : 8 * rank + 8], y[8 * rank : 8 * rank + 8]
        self._optimizer.zero_grad()
        nn.functional.cross_entropy(self.model(torch.full_like(x, torch.nan) if poisoned else x), y).backward()
        self._reducer.reduce()
        for parameter in self.model.parameters():
            assert parameter.grad is not None
            if not parameter.grad.isfinite().all():
                parameter.grad.zero_()

    def second_half(self) -> Record:
        """Preconditions, steps and takes the record."""
        report = self.pre.step()
        self._optimizer.step()
        pipeline, counted = self.pipeline, self.pipeline.counters.fallbacks
        policy = counted - self._fallbacks
        self._fallbacks = counted.copy()
        return Record(
            step=report.step,
            stop=report.stop,
            parameters=self.digest(),
            adopted=report.adopted,
            versions=self.pre.versions(),
            payloads={track.group.name: _sha256(track.snapshot.encoded()) for track in pipeline.tracks},
            staleness=self.pre.staleness(),
            damping=pipeline.in_force.damping(report.step),
            policy=dict(policy),
            pending={track.group.name: len(track.pending) for track in pipeline.tracks},
            overlapping=tuple(
                track.group.name
                for track in pipeline.tracks
                if track.ledger.in_flight and track.ledger.announced > track.ledger.entered
            ),
        )

    def digest(self) -> str:
        """SHA-256 of all parameters."""
        return _sha256(b"".join(parameter.detach().numpy().tobytes() for parameter in self.model.parameters()))

    def optimizer_state(self) -> dict[str, Any]:
        """What a resumed run needs besides the preconditioner's state."""
        return {
            "parameters": [parameter.detach().clone() for parameter in self.model.parameters()],
            "optimizer": self._optimizer.state_dict(),
        }

    def load_optimizer_state(self, state: Mapping[str, Any]) -> None:
        """Puts model and optimizer where `optimizer_state` was taken."""
        with torch.no_grad():
            for own, stored in zip(self.model.parameters(), state["parameters"], strict=True):
                own.copy_(stored)
        self._optimizer.load_state_dict(state["optimizer"])

    def close(self) -> None:
        """Ends everything; all ranks call it."""
        self.pre.close()
        self._reducer.close()


def check_invariants(ranks: Sequence[Sequence[Record]]) -> None:
    """After every step all ranks are equal in all that the protocol decides, and versions never go back."""
    first = ranks[0]
    for other in ranks[1:]:
        for mine, theirs in zip(first, other, strict=True):
            for what in ("step", "parameters", "adopted", "versions", "payloads", "staleness", "damping", "policy"):
                assert getattr(mine, what) == getattr(theirs, what), f"step {mine.step}: {what} differs between ranks"
            assert (mine.stop, mine.pending) == (theirs.stop, theirs.pending), f"step {mine.step}"
    for before, after in zip(first, first[1:], strict=False):
        for group, version in after.versions.items():
            assert version >= before.versions[group], f"step {after.step}: {group} went back"
            assert after.staleness[group] == after.step - version
            changed = after.payloads[group] != before.payloads[group]
            assert changed == (version != before.versions[group])
            assert not changed or (group, version) in after.adopted


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()

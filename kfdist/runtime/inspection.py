"""What can be asked of a Preconditioner; nothing here changes it."""

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from kfdist.comm.communicator import Communicator
from kfdist.curvature.auto import MeasuredCosts
from kfdist.curvature.inverse import AbstractPreconditioner
from kfdist.runtime.apply.rates import LearningRates
from kfdist.runtime.assembly import Assembly
from kfdist.runtime.pipeline import Pipeline
from kfdist.runtime.plan.coverage import Coverage
from kfdist.runtime.plan.groups import BlockGroup
from kfdist.runtime.plan.planner import Plan
from kfdist.runtime.settings import Settings
from kfdist.runtime.telemetry_samples import diagnostic_note, pipeline_samples, pipeline_totals
from kfdist.types import BlockName, MetricSample


class Inspection:
    """The part of a `kfdist.Preconditioner` that answers questions."""

    _plan: Plan
    _world: Communicator
    _assembly: Assembly
    _rates: LearningRates
    _grad_scaler: torch.amp.GradScaler | None

    def coverage(self) -> Coverage:
        """Returns every parameter with its block, its method and how the inversion in use went, or why it has none."""
        notes = {
            name: diagnostic_note(track.snapshot.version, outcome)
            for track in self.pipeline.tracks
            for name, outcome in track.snapshot.outcomes.items()
        }
        capture = self.pipeline.capture
        planned = self._plan.coverage.as_of_now(self._plan.model, capture.multiplied)
        planned = planned.without_biases(self._plan.blocks, capture.biases.left_out)
        found = planned.with_inversions(notes, capture.unmeasured, capture.unseen)
        return replace(found, mask=self.pipeline.notices.masks.describe())

    def staleness(self) -> dict[str, int]:
        """Returns each block's staleness in steps: the last step done minus the version in use."""
        by_group = self.pipeline.staleness()
        return {block.name: by_group[group.name] for group in self._plan.groups for block in group.blocks}

    def versions(self) -> dict[str, int]:
        """Returns the version in use of each group; -1 where there is none."""
        return {track.group.name: track.snapshot.version for track in self.pipeline.tracks}

    def inverses(self) -> dict[BlockName, AbstractPreconditioner]:
        """Returns the inverse in use of each block that has one."""
        return {
            name: inverse for track in self.pipeline.tracks for name, inverse in track.snapshot.preconditioners.items()
        }

    def diagnostics(self) -> dict[BlockName, dict[str, float]]:
        """Returns how the inversion in use of each block went, in the numbers that its method gives."""
        return {
            name: dict(outcome.diagnostics)
            for track in self.pipeline.tracks
            for name, outcome in track.snapshot.outcomes.items()
        }

    def noise_scale(self) -> float | None:
        """Returns the gradient noise scale tr(Sigma) / |G|^2 in examples (docs/large-batch.md); never waits.

        From the gradients of micro-batches and ranks, of which there must be two, before anything clips them; averaged
        over about the last twenty measurements, one each `factor_period` steps. None before the first, while |G|^2
        can't be told from the noise, where gradients are sparse or `.grad` isn't the mean of what was measured, and
        where a compiled model trains by method "none".
        """
        return self.pipeline.noise_scale.latest()

    @property
    def costs(self) -> MeasuredCosts | None:
        """What inversions cost, if "auto" chose by it."""
        return self._plan.costs

    @property
    def world(self) -> Communicator:
        """The ranks that train together."""
        return self._world

    @property
    def model(self) -> nn.Module:
        """The bare model, without the wrappers of DDP and torch.compile."""
        return self._plan.model

    @property
    def attached(self) -> bool:
        """Whether an optimizer is attached."""
        return self._rates.optimizer is not None

    @property
    def grad_scaler(self) -> torch.amp.GradScaler | None:
        """The AMP scaler it was made with."""
        return self._grad_scaler

    @property
    def settings(self) -> Settings:
        """What it was told."""
        return self._plan.settings

    @property
    def groups(self) -> tuple[BlockGroup, ...]:
        """The groups of blocks with their methods."""
        return self._plan.groups

    @property
    def pipeline(self) -> Pipeline:
        """What does the steps, for those who look inside; it may change from release to release."""
        return self._assembly.pipeline

    @property
    def next_step(self) -> int:
        """The step that the next call of `step` does."""
        return self.pipeline.next_step

    @property
    def epoch(self) -> int:
        """The start of the run that all ranks agreed on."""
        return self._assembly.terms.epoch

    def samples(self) -> list[MetricSample]:
        """Returns this rank's measurements for the controller; observations are returned once."""
        return pipeline_samples(self.pipeline, self._assembly.link.counters())

    def counters(self) -> dict[str, Any]:
        """Returns totals for a summary: bytes by purpose, inversions, staleness quantiles, failures."""
        return pipeline_totals(self.pipeline, self._assembly.link.counters())

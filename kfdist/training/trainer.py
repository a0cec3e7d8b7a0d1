"""The training loop of a rank: one step in one method, and what happens around the steps."""

import hashlib
import math
import time
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from kfdist.config import to_toml
from kfdist.data.feed import LoaderFeed
from kfdist.errors import EnvironmentFault, Interrupted, LossNotFinite
from kfdist.runtime.settings import StepReport
from kfdist.system.run_summary import unsaved
from kfdist.training.checkpoint import CheckpointStore
from kfdist.training.evaluation import Evaluation, evaluate
from kfdist.training.history import History
from kfdist.training.optimizers import precondition, set_learning_rate
from kfdist.training.progress import Progress, ProgressLine, shown
from kfdist.training.reporting import MetricsLog
from kfdist.training.run_state import Standing, Training, collect_state
from kfdist.training.target import Reached
from kfdist.training.unreadable import Unreadable
from kfdist.types import MetricSample

_BEAT_SECONDS = 0.25
"""How often the controller hears of a rank; steps may be much shorter."""


class Trainer:
    """Trains until the last step or until all ranks agree to stop. All ranks run one, in step.

    Args:
        training: What is trained with.
        standing: How far the run has come.
        store: The checkpoints.
        log: `metrics.jsonl`.
        history: `history.jsonl`.
        progress: What users see.

    Attributes:
        standing: How far the run has come.
        step_seconds: Host seconds of each step of this start.
        input_seconds: Those of them that were waited for examples.
        metrics: The newest losses and metrics.
        unreadable: Examples that couldn't be read.
        checkpoint_faults: Checkpoints that could not be written.
        asked_to_stop: Whether somebody asked for the stop, and no wait that lasted too long.
    """

    def __init__(
        self,
        training: Training,
        standing: Standing,
        *,
        store: CheckpointStore,
        log: MetricsLog,
        history: History,
        progress: Progress,
    ) -> None:
        # The controller counts requests for checkpoints anew at each start of an ended run.
        position = training.sampler.start(standing.position)
        self.standing = replace(standing, position=position, checkpoint_serial=0)
        self.step_seconds = array("d")
        self.input_seconds = array("d")
        self.checkpoint_faults = 0
        self._saved_step = standing.step
        self.asked_to_stop = False
        self._told_steps = 0
        self._evaluated = -1
        self._training = training
        self._store, self._log, self._history, self._progress = store, log, history, progress
        limit = training.config.data.corrupt_limit
        self.unreadable = Unreadable(training.communicator, limit=limit, log=log, progress=progress)
        metrics = training.data.objective.metrics
        self.metrics: dict[str, float | None] = {f"train_{name}": None for name in ("loss", *metrics)}
        self._tally = torch.zeros(1 + len(metrics), dtype=torch.float64, device=training.device)
        self._tallied = 0
        self._clock = self._window_start = self._last_beat = time.perf_counter()

    @property
    def done(self) -> bool:
        """Whether the last step is done."""
        run, standing = self._training.config.run, self.standing
        if run.stop_at_target and standing.reached is not None:
            return True
        return standing.step >= run.steps if run.steps is not None else standing.position.epoch >= (run.epochs or 0)

    def run(self) -> str:
        """Trains to the end, writes the last checkpoint, and evaluates if the run is finished.

        Returns:
            Why the run stopped before its last step; empty if it is finished.

        Raises:
            LossNotFinite: The loss became infinite or NaN; found out at a log period or before a checkpoint.
        """
        stopped = ""
        while not self.done and not stopped:
            try:
                report = self._step()
            except Interrupted as interruption:
                # The step wasn't applied: it is the next one to do after a resume.
                del self.input_seconds[len(self.step_seconds) :]
                stopped = str(interruption)
                self.asked_to_stop = interruption.reason == "stop"
            else:
                stopped = self._after_step(report)
        self._checkpoint(last=True)
        self._history.write_if_due(self.standing.step, ended=True)
        if not stopped and self._evaluated != self.standing.step:
            self._evaluate()
        return stopped

    def _step(self) -> StepReport:
        training, standing = self._training, self.standing
        started = time.perf_counter()
        set_learning_rate(training.optimizer, training.learning_rate(standing.step))
        training.optimizer.zero_grad(set_to_none=True)
        measured = torch.zeros_like(self._tally)
        for inputs, targets in self._waited_for(training.feed.training_step(standing.position)):
            measured += self._forward_and_backward(inputs, targets)
        training.reducer.reduce()
        training.scaler.unscale_(training.optimizer)
        report = precondition(training.preconditioner, training.optimizer)
        training.scaler.step(training.optimizer)
        training.scaler.update()
        if training.average is not None:
            training.average.update()
        # Only now: if the step had been interrupted, its forward would have to be undone.
        training.forward_state.remember()
        self._tally += measured  # running sums, on the device: nothing is read before the log period
        self._tallied += 1
        self.step_seconds.append(time.perf_counter() - started)
        return report

    def _autocast(self) -> torch.autocast:
        precision = self._training.config.run.precision
        return torch.autocast(
            self._training.device.type,
            dtype=torch.bfloat16 if precision == "bfloat16" else torch.float16,
            enabled=precision != "float32",
        )

    def _waited_for(self, batches: Iterator[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields a step's micro-batches, and takes the time that they are waited for."""
        waited = 0.0
        while True:
            started = time.perf_counter()
            batch = next(batches, None)
            waited += time.perf_counter() - started
            if batch is None:
                break
            yield batch
        self.input_seconds.append(waited)

    def _forward_and_backward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Returns the loss and the sums of the metrics, float64."""
        training, parts = self._training, self._training.config.data.micro_batches
        objective = training.data.objective
        with self._autocast():
            output = training.model(inputs)
            loss = objective.loss(output, targets)
        loss = loss / parts if parts > 1 else loss
        if (observation := objective.observation(targets)) is not None:
            training.preconditioner.observe(output, **observation)
        training.scaler.scale(loss).backward()
        return torch.cat([loss.detach().double()[None], objective.measure(output.detach(), targets).double()])

    def _after_step(self, report: StepReport) -> str:
        """Does what is due after a step; returns why to stop, or nothing."""
        before = self.standing
        position = self._training.sampler.advance(before.position)
        self.standing = replace(before, step=before.step + 1, position=position)
        config, step = self._training.config, self.standing.step
        if position.epoch != before.position.epoch:
            self._log.write("epoch", step=step, epoch=position.epoch)
        if step % config.run.log_period == 0 or self.done:
            self._report(report)
        elif time.perf_counter() - self._last_beat > _BEAT_SECONDS:
            self._beat("running")
        self._history.count(report, total=self.step_seconds[-1], waited=self.input_seconds[-1])
        self._history.write_if_due(step)
        if self._evaluation_is_due(before) and not self.done:
            self._evaluate()
        if report.stop and not self.done:
            self.asked_to_stop = True
            return "the run was asked to stop"
        self._checkpoint_if_due(report)
        return ""

    def _checkpoint_if_due(self, report: StepReport) -> None:
        period, settings = self._training.config.checkpoint.period, report.settings
        # Before any settings were heard of (revision 0) the serial says nothing.
        asked = settings.revision > 0 and settings.checkpoint_serial != self.standing.checkpoint_serial
        if asked:
            self.standing = replace(self.standing, checkpoint_serial=settings.checkpoint_serial)
        if (asked or (period and self.standing.step % period == 0)) and not self.done:
            self._checkpoint()

    def _report(self, report: StepReport | None = None) -> None:
        """Reads the running means, the same on all ranks, checks them and tells everybody."""
        if not self._tallied:
            return
        self._tell_unreadable()
        step, training = self.standing.step, self._training
        total_loss, *totals = training.communicator.all_reduce_sum_(self._tally).tolist()
        loss = total_loss / (self._tallied * training.communicator.world_size)
        examples = self._tallied * training.sampler.step_examples
        metrics = {name: total / examples for name, total in zip(training.data.objective.metrics, totals, strict=True)}
        lr = training.learning_rate(step - 1)
        if not math.isfinite(loss):
            section = training.config.preconditioner
            damping_then = training.preconditioner.pipeline.in_force.settings.damping_at(step - 1)
            damping = f", damping {damping_then:g}" if section.inverts else ""
            remedy = " or raise preconditioner.damping" if section.inverts else ""
            raise LossNotFinite(
                f"the training loss is {loss} in the {self._tallied} steps up to step {step} (learning rate {lr:g}"
                f"{damping}); lower optimizer.lr{remedy}, and start again: the run goes on from its newest checkpoint"
            )
        now = time.perf_counter()
        staleness = sorted(training.preconditioner.staleness().values())
        rate = self._tallied / max(now - self._window_start, 1e-9)
        self.metrics.update(train_loss=loss, **{f"train_{name}": value for name, value in metrics.items()})
        self._log.write(
            "step",
            step=step,
            epoch=self.standing.position.epoch,
            loss=loss,
            **metrics,
            lr=lr,
            noise_scale=training.preconditioner.noise_scale(),
            staleness={"p50": staleness[len(staleness) // 2], "max": staleness[-1]} if staleness else None,
            **self._step_lengths(),
            step_seconds=sum(self.step_seconds[-self._tallied :]) / self._tallied,
            input_seconds=sum(self.input_seconds[-self._tallied :]) / self._tallied,
            phase_seconds=dict(report.phase_seconds) if report else {},
        )
        self._progress.show(
            ProgressLine(
                step=step,
                total_steps=training.learning_rate.total_steps,
                loss=loss,
                metrics=metrics,
                staleness=staleness[-1] if staleness else None,
                steps_per_second=rate,
            )
        )
        accuracy = [MetricSample(name="kfdist_accuracy", value=metrics["accuracy"])] if "accuracy" in metrics else []
        self._beat("running", MetricSample(name="kfdist_loss", value=loss), *accuracy)
        self._tally.zero_()
        self._tallied = 0
        self._window_start = now

    def _step_lengths(self) -> dict[str, Any]:
        """Returns how far steps go: over the blocks, and the factor of the KL clip; as of a little earlier."""
        pipeline = self._training.preconditioner.pipeline

        def spread(values: Iterable[float]) -> dict[str, float] | None:
            found = sorted(value for value in values if math.isfinite(value))
            return {"p50": found[len(found) // 2], "max": found[-1]} if found else None

        return {
            "step_length": spread(pipeline.lengths.latest().values()),
            "graft_ratio": spread(pipeline.grafts.latest().values()),
            "graft_replacements": pipeline.grafts.replaced(),
            "kl_clip_factor": pipeline.counters.late_kl_clip_factor(),
        }

    def _tell_unreadable(self) -> None:
        if isinstance(self._training.feed, LoaderFeed):  # on all ranks alike
            self.unreadable.add(self._training.feed.take_corrupt())

    def _beat(self, phase: str, *samples: MetricSample) -> None:
        """Tells the controller; what is the same on all ranks comes from rank 0 alone."""
        seen = len(self.step_seconds) * self._training.sampler.step_examples
        counted = MetricSample(name="kfdist_examples_total", value=seen)
        own = (counted, *samples) if self._training.communicator.rank == 0 else ()
        new, self._told_steps = slice(self._told_steps, None), len(self.step_seconds)
        steps = [
            MetricSample(name="kfdist_step_seconds", value=seconds, labels={"phase": phase})
            for phase, taken in (("input", self.input_seconds), ("total", self.step_seconds))
            for seconds in taken[new]
        ]
        self._training.preconditioner.beat(phase, [*own, *steps])
        self._last_beat = time.perf_counter()

    def _evaluation_is_due(self, before: Standing) -> bool:
        run, now = self._training.config.run, self.standing
        by_step = run.eval_period and now.step % run.eval_period == 0
        new_epoch = now.position.epoch != before.position.epoch
        return bool(by_step or (run.eval_epochs and new_epoch and now.position.epoch % run.eval_epochs == 0))

    def _evaluate(self) -> None:
        self._evaluated = self.standing.step
        self._evaluate_weights("trained", prefix="test")
        if (average := self._training.average) is not None:
            with average.in_place():
                self._evaluate_weights("averaged", prefix="averaged_test")

    def _evaluate_weights(self, weights: str, *, prefix: str) -> None:
        training, step, feed = self._training, self.standing.step, self._training.feed
        result = evaluate(
            training.model, feed.evaluation(), training.data.objective, training.communicator, training.device
        )
        self._tell_unreadable()
        if not result.examples:
            raise EnvironmentFault(
                "none of the test examples can be read, so that there is nothing to evaluate on; mend the data, and "
                "start again, which resumes"
            )
        found = {"loss": result.loss, **result.metrics}
        self.metrics.update({f"{prefix}_{name}": value for name, value in found.items()})
        self._log.write(
            "evaluation", step=step, weights=weights, **{f"test_{name}": value for name, value in found.items()}
        )
        told = ", ".join(f"{prefix.replace('_', ' ')} {shown(*metric)}" for metric in found.items())
        self._progress.say(f"step {step}: {told}")
        self._look_for_target(weights, result)

    def _look_for_target(self, weights: str, result: Evaluation) -> None:
        standing, target = self.standing, self._training.config.run.target_accuracy
        accuracy = result.metrics.get("accuracy", 0.0)
        if target is None or standing.reached is not None or accuracy < target:
            return
        # The clocks differ; rank 0's is everybody's, as the state is that all ranks share.
        seconds = standing.seconds + time.perf_counter() - self._clock
        reached = Reached(
            step=standing.step,
            epoch=standing.position.epoch,
            seconds=self._training.communicator.broadcast_json(seconds),
            accuracy=accuracy,
            weights=weights,
        )
        self.standing = replace(standing, reached=reached)
        self._log.write("target", target_accuracy=target, **asdict(reached))
        self._progress.say(f"step {reached.step}: test accuracy {target:.2%} was reached after {reached.seconds:.1f} s")

    @property
    def unsaved_steps(self) -> int:
        """Steps that are in no checkpoint."""
        return self.standing.step - self._saved_step

    def _checkpoint(self, *, last: bool = False) -> None:
        """Writes a checkpoint of the present standing; a failure is told and the run goes on."""
        # Never keep parameters that are NaN already: the loss up to here is looked at first.
        self._report()
        now = time.perf_counter()
        self.standing = replace(self.standing, seconds=self.standing.seconds + now - self._clock)
        self._clock = now
        training, config = self._training, self._training.config
        shared, own = collect_state(training, self.standing)
        saved = self._store.save(
            shared,
            own,
            step=self.standing.step,
            statistics=config.checkpoint.statistics,
            config_sha256=hashlib.sha256(to_toml(config).encode()).hexdigest(),
            facts={"run": config.run.name, "torch": torch.__version__, "unix_time": round(time.time(), 3)},
        )
        self._log.write(
            "checkpoint", step=saved.step, fault=saved.fault, bytes=saved.bytes, seconds=round(saved.seconds, 6)
        )
        self._history.write_spectra(saved.step)
        if not saved.fault:
            self._saved_step = saved.step
            return
        self.checkpoint_faults += 1
        then = after_lacking_checkpoint(saved.step, self._saved_step, last=last)
        self._progress.say(f"the checkpoint at step {saved.step} could not be written ({saved.fault}); {then}")


def after_lacking_checkpoint(step: int, saved_step: int, *, last: bool) -> str:
    """Says what is kept, what is lost and what to do where the checkpoint at `step` couldn't be written.

    Args:
        step: How many steps are done.
        saved_step: How many are in the newest checkpoint; 0 if there is none.
        last: Whether the run ends with it.
    """
    kept = "older checkpoints are kept" if saved_step else "there is none yet"
    if not last:
        return f"the run goes on, and {kept}; make room before the next one"
    if lost := unsaved({"steps": step, "unsaved_steps": step - saved_step}):
        return f"{kept}; make room first: {lost}"
    return f"{kept}, and no step is lost; make room first"

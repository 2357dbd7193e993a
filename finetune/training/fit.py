"""The training loop: take the steps of a recipe, evaluate after each epoch, keep the best weights, and write checkpoints.

What happens in a step (`finetune.training.step`) depends only on recipe, step number and weights, and so do the trainable
parameters, the order of the images and their augmentation. Therefore a run that is killed and resumed from its newest
checkpoint ends with the same bits as one that is not interrupted. Batches come from loaders that can start at any step; they may
contain images or cached activations, which makes no difference here.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from finetune.data.loader import Batch
from finetune.errors import TrainingError
from finetune.events import CheckpointDamaged, Resumed, Trained, TrainingStarted
from finetune.events import Interrupted as InterruptedEvent
from finetune.model.classifier import Classifier
from finetune.model.freeze import apply_freeze, frozen_digest, parameter_groups
from finetune.model.selection import HEAD
from finetune.progress import Progress, ProgressCallback, silent
from finetune.runtime.allocator import retaining_memory
from finetune.runtime.memory import memory_errors_named
from finetune.runtime.seconds import Seconds, process_clock
from finetune.storage.files import write_atomic
from finetune.storage.journal import append_line, read_lines
from finetune.storage.rundir import RunDir
from finetune.tasks import Task
from finetune.training import checkpoint
from finetune.training.average import MovingAverage, copy_state, loaded_state
from finetune.training.choices import Choices
from finetune.training.epoch_totals import EpochTotals
from finetune.training.evaluator import Evaluator, Forward, Prepare, Targets, closed_after, forward_images
from finetune.training.final_weights import FinalWeights, TrainBatches
from finetune.training.interrupt import Interrupted, StopRequest
from finetune.training.machine import Numerics, computing_with, place, prepare_images
from finetune.training.objectives import Objective
from finetune.training.optim import build_optimizer, group_key
from finetune.training.recipe import Recipe, freeze_plan, learning_rates, widest_plan
from finetune.training.sample import TrainSample
from finetune.training.signals import Parameters
from finetune.training.state import CandidateWeights, CheckpointSchedule, Fitted, LoopState
from finetune.training.step import Stepper, check_finite

REPORT_EVERY_STEPS = 5


def fit(
    classifier: Classifier,
    recipe: Recipe,
    train: TrainBatches,
    val: Iterable[Batch] | Choices,
    run: RunDir,
    checkpointing: CheckpointSchedule,
    *,
    task: Task,
    objective: Objective,
    train_targets: NDArray[Any],
    val_targets: NDArray[Any],
    train_weights: NDArray[np.float64] | None = None,
    numerics: Callable[[], Numerics] = Numerics,
    solve_head: Callable[[Classifier], Seconds] | None = None,
    sample: TrainSample | None = None,
    prepare: Prepare = prepare_images,
    forward: Forward = forward_images,
    progress: ProgressCallback = silent,
) -> Fitted:
    """Train `classifier` as `recipe` says, from the newest intact checkpoint in `run` if there is one.

    Args:
        val: the validation images, on which the weights are chosen; or the choices of an earlier run: then nothing is evaluated,
            and training ends after their number of epochs.
        checkpointing: when checkpoints are written.
        train_targets, val_targets: encoded by `task`; the ``indices`` of a batch are rows of these arrays.
        train_weights: (N,) weights of the training images in the loss, with mean 1; None: all equal.
        numerics: is called once, when the run begins; a resumed run uses the same numerics.
        solve_head: solves the head on frozen features and sets it in the classifier; is called at the start of a run if the
            recipe begins with a solved head. Returns the seconds it took without those of computing the features.
        sample: training images that are predicted at some steps; this does not change training.
        prepare, forward: compute logits from a batch; by default its arrays are images.

    Raises:
        CheckpointError: the checkpoints in `run` belong to another run.
        TrainingError: the loss is not finite.
        OutOfMemory: PyTorch could not allocate memory for a step.
        DiskFull: there is no space left for a checkpoint.
        Interrupted: SIGINT or SIGTERM arrived; a checkpoint has been written.
    """
    with memory_errors_named(_no_memory_for(recipe.batch_size)):
        found = _find_checkpoint(run, checkpointing)
        chosen = numerics() if found is None else Numerics(**found["numerics"])
        targets = Targets(task, objective, train_targets, val_targets, train_weights)
        with computing_with(chosen), retaining_memory():
            place(classifier, chosen)
            training = _Training(
                classifier, recipe, train, val, run, checkpointing, chosen, targets, sample, prepare, forward, progress
            )
            if found is None:
                training.begin(solve_head)
            else:
                training.resume(found)
            del found  # frees its copy of all weights
            with training.stop.receiving_signals():
                return training.run_to_end()


def _find_checkpoint(run: RunDir, checkpointing: CheckpointSchedule) -> dict[str, Any] | None:
    """Return the newest intact checkpoint of this run. If there is none, training starts over: empty the journal, return None.

    Raises:
        CheckpointError: the checkpoint belongs to another run.
    """
    damaged: list[str] = []
    found = checkpoint.load_newest(run.checkpoints, lambda path, why: damaged.append(f"{path.name} ({why})"))
    if damaged:
        run.record(CheckpointDamaged(f"checkpoints that cannot be read are left out: {', '.join(damaged)}"))
    if found is not None:
        checkpoint.check_belongs(found["identity"], checkpointing.identity, run.checkpoints)
    else:
        write_atomic(run.metrics, lambda stream: stream.write(b""))
    return found


@dataclass
class _Training:
    """One session of training: from the start of the run, or from a checkpoint, to its end or its interruption."""

    classifier: Classifier
    recipe: Recipe
    train: TrainBatches
    val: Iterable[Batch] | Choices
    run: RunDir
    checkpointing: CheckpointSchedule
    numerics: Numerics
    targets: Targets
    sample: TrainSample | None
    prepare: Prepare
    forward: Forward
    progress: ProgressCallback

    def __post_init__(self) -> None:
        self.stop = StopRequest()
        self.evaluator = Evaluator(self.classifier, self.targets, self.prepare, self.forward, self.numerics, self.stop)
        self.state = LoopState()
        self.optimizer = build_optimizer(self.classifier, self.recipe)
        self.average: MovingAverage | None = None
        self.stepper = Stepper(
            self.classifier, self.recipe, self.targets, self.optimizer, self.prepare, self.forward, self.numerics
        )
        self.totals = EpochTotals(self.numerics.device)
        self.resumed_at_step: int | None = None
        self.saved_at = time.perf_counter()
        self.began = process_clock()
        self.seconds_before = Seconds()
        self.session_steps = 0  # the steps taken in this session

    # beginning and resuming ---------------------------------------------------------------------------------------

    def begin(self, solve_head: Callable[[Classifier], Seconds] | None) -> None:
        """Start a new run: solve the head or initialise it with zeros, and write the first checkpoint."""
        state = self.state
        state.frozen_before = self._frozen_digest()
        if not self.recipe.solves_head_first:
            nn.init.zeros_(self.classifier.head.weight)
            nn.init.zeros_(self.classifier.head.bias)
            state.evaluated_step = 0  # an untrained head is not evaluated
        elif solve_head is not None:
            before = process_clock()
            solving = solve_head(self.classifier)
            self.began += process_clock() - before - solving
        if self.recipe.solves_head_first and self.recipe.n_steps:
            state.start_weights = copy_state(self.classifier)
        state.history = read_lines(self.run.metrics)
        self._build_average()
        self.run.record(TrainingStarted(f"computing with {self.numerics}", self.numerics.to_dict()))
        self._save()

    def resume(self, found: Mapping[str, Any]) -> None:
        """Restore the state in a checkpoint, and the journal of metrics as it was then."""
        state = self.state = LoopState(**found["state"])
        self.seconds_before = Seconds(state.seconds, state.cpu_seconds)
        state.best_weights = self._on_device(state.best_weights)
        state.start_weights = self._on_device(state.start_weights)
        self.classifier.load_state_dict(found["model"])
        self.optimizer.load_state_dict(found["optimizer"])
        self._build_average()
        if self.average is not None:
            self.average.load(found["average"])
        self.totals.restore(state.epoch_totals)
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in state.history)
        write_atomic(self.run.metrics, lambda stream: stream.write(lines.encode()))
        self.resumed_at_step = state.step
        exact = self.numerics.device == "cpu" and found["torch"] == torch.__version__
        message = f"training goes on at step {state.step} of {self.recipe.n_steps}"
        self.run.record(Resumed(message, state.step, exact))
        progress_message = f"going on at step {state.step}" if state.step < self._last_step else "trained before"
        self.progress(Progress("training", state.step, self._last_step, "steps", message=progress_message))

    def _on_device(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.to(self.numerics.device) for name, tensor in tensors.items()}

    def _build_average(self) -> None:
        if self.recipe.ema_half_life_steps is not None:
            self.average = MovingAverage(self.classifier, self.recipe.ema_half_life_steps)

    def _frozen_digest(self) -> str:
        """Return the sha256 of the parameters and buffers that this recipe never trains."""
        apply_freeze(self.classifier, widest_plan(self.recipe))
        return frozen_digest(self.classifier)

    # the loop -----------------------------------------------------------------------------------------------------

    def run_to_end(self) -> Fitted:
        """Train to the end, load the chosen weights, and return the result.

        Raises:
            Interrupted: a signal arrived; a checkpoint has been written.
            TrainingError: the loss is not finite, or frozen weights have changed.
        """
        state = self.state
        try:
            while not state.finished:
                self._advance()
        except Interrupted as stop:
            self._save()
            message = f"{stop} at step {state.step} of {self.recipe.n_steps}; the same command goes on from there"
            self.run.record(InterruptedEvent(message, state.step))
            raise Interrupted(message) from None
        self.classifier.load_state_dict(state.best_weights)
        self.classifier.eval()
        frozen_after = self._frozen_digest()
        if frozen_after != state.frozen_before:
            raise TrainingError("frozen weights changed while training. This is a defect of finetune: please report it.")
        return Fitted(
            chosen=state.chosen,
            best=state.best,
            best_step=state.best_step,
            n_steps=state.step,
            stopped_early=state.stopped_early,
            numerics=self.numerics,
            choices=Choices(
                l2=next((line["values"]["head/l2"] for line in state.history if "head/l2" in line["values"]), None),
                n_epochs=state.best_step // self.recipe.steps_per_epoch,
                share=state.share,
                recalibrated=state.recalibrated,
                numerics=self.numerics.to_dict(),
            ),
            seconds=self._seconds(),
            frozen_before=state.frozen_before,
            frozen_after=frozen_after,
            resumed_at_step=self.resumed_at_step,
            history=tuple(state.history),
        )

    def _advance(self) -> None:
        """Do the next of: predict the sample, evaluate, train to the end of the epoch, finish.

        If it is interrupted, it is repeated after the run is resumed, except for steps that a checkpoint contains.
        """
        state = self.state
        if self._sample_is_due():
            self._predict_sample()
        elif state.evaluated_step < state.step and state.step % self.recipe.steps_per_epoch == 0:
            self._end_epoch()
        elif state.step < self._last_step and not state.stopped_early:
            self._train_epoch()
        else:
            self._finish()

    def _sample_is_due(self) -> bool:
        state = self.state
        if self.sample is None or state.sampled_step == state.step:
            return False
        return state.step in self.sample.plan.steps or state.step == self._last_step or state.stopped_early

    @property
    def _last_step(self) -> int:
        return self.val.n_epochs * self.recipe.steps_per_epoch if isinstance(self.val, Choices) else self.recipe.n_steps

    def _train_epoch(self) -> None:
        """Take the steps from the current one to the end of the epoch."""
        epoch, start_step = divmod(self.state.step, self.recipe.steps_per_epoch)
        phase, _ = self.recipe.phase_at(self.state.step)
        self.classifier.train()
        apply_freeze(self.classifier, freeze_plan(self.recipe, phase))
        parameters = {group_key(group): list(group.parameters.values()) for group in parameter_groups(self.classifier)}
        self.totals.start_timing()
        with closed_after(self.train(epoch, start_step)) as batches:
            for batch in batches:
                self._take_step(batch, parameters)
                self.stop.check()
                if self._checkpoint_is_due():
                    self._save()
        if (ended_at := self.state.step) != (epoch + 1) * self.recipe.steps_per_epoch:
            raise ValueError(f"epoch {epoch} ended at step {ended_at}: an epoch has {self.recipe.steps_per_epoch} steps")

    def _take_step(self, batch: Batch, parameters: Parameters) -> None:
        """Take one optimiser step on a batch, count it, and check and report the loss at times.

        Raises:
            TrainingError: the loss is not finite.
        """
        state, recipe, step = self.state, self.recipe, self.state.step
        taken = self.stepper.take(step, batch, parameters)
        if self.average is not None:
            self.average.update(self.classifier)
        if taken.signals:
            self._log({f"train/{name}": value for name, value in taken.signals.items()})
        self.totals.add(taken.loss, self.targets.objective.n_correct(taken.logits, taken.targets), len(batch.indices))
        state.step += 1
        self.session_steps += 1
        if self.numerics.device == "cpu" or step % REPORT_EVERY_STEPS == 0:  # reading the loss synchronises a GPU
            check_finite(float(taken.loss), state.step, recipe.n_steps, taken.head_lr)
        if step % REPORT_EVERY_STEPS == 0:
            self._report(taken.head_lr)

    def _end_epoch(self) -> None:
        """Evaluate, log the metrics, keep the weights if they are the best, decide on early stopping, and write a checkpoint."""
        state, recipe = self.state, self.recipe
        with self._weights_to_evaluate():
            choosing = not isinstance(self.val, Choices)
            values = {} if isinstance(self.val, Choices) else self.evaluator.evaluate(self.val)
            if self.evaluator.improves(values, state.best) if choosing else state.step == self._last_step:
                state.best, state.best_step, state.best_weights = values, state.step, copy_state(self.classifier)
                state.chosen = self._describe(state.step)
        self._log({**self._epoch_values(), **values})
        state.evaluated_step = state.step
        if choosing and state.step > 0 and recipe.phase_at(state.step - 1)[0] == recipe.phases[-1]:
            state.epochs_without_gain = 0 if state.best_step == state.step else state.epochs_without_gain + 1
            patience = recipe.early_stopping_epochs
            state.stopped_early = patience is not None and state.epochs_without_gain >= patience and state.step < recipe.n_steps
        self.totals.reset()
        self._save()

    def _finish(self) -> None:
        """Try interpolations of the best epoch's weights with those at the start, then recalibrated running statistics.

        The best weights on val are kept, or those that the earlier run's choices require.
        """
        state = self.state
        kept = CandidateWeights(state.chosen, state.best, state.best_weights)
        weights = FinalWeights(self.classifier, self.recipe, self.evaluator, self.train, kept, state.start_weights)
        if isinstance(self.val, Choices):
            kept = weights.as_in(self.val)
        elif state.best_step > 0:
            kept = weights.best_on(self.val)
        state.chosen, state.best, state.best_weights = kept.name, kept.values, kept.tensors
        state.share, state.recalibrated = kept.share, kept.recalibrated
        state.start_weights = {}
        state.finished = True
        metrics_text = ": " + ", ".join(f"{key} {value:.4f}" for key, value in kept.values.items()) if kept.values else ""
        self.run.record(Trained(f"keeps {kept.name}{metrics_text}", kept.values))
        self._save()

    # evaluation ---------------------------------------------------------------------------------------------------

    def _weights_to_evaluate(self) -> AbstractContextManager[None]:
        """Load the weights to evaluate into the classifier for the block: the moving average, if there is one."""
        return nullcontext() if self.average is None else loaded_state(self.classifier, self.average.state)

    def _predict_sample(self) -> None:
        """Predict the sample with the weights to evaluate, and log its metrics."""
        assert self.sample is not None
        with self._weights_to_evaluate():
            values = self.evaluator.evaluate_sample(self.sample, self.state.step)
        self._log(values)
        self.state.sampled_step = self.state.step

    def _describe(self, step: int) -> str:
        if step == 0:
            solved = "the solved head on the pretrained backbone"
            return f"{solved}, because no epoch improved on it" if self.recipe.n_steps else solved
        averaged = " (moving average)" if self.average is not None else ""
        return f"the weights after epoch {step // self.recipe.steps_per_epoch}{averaged}"

    # metrics and progress -----------------------------------------------------------------------------------------

    def _epoch_values(self) -> dict[str, float]:
        loss, correct, count = self.totals.sums()
        if not count:
            return {}
        lr = learning_rates(self.recipe, self.state.step - 1)[HEAD]
        values = {"train/loss": loss / count, f"train/{self.targets.task.mean_score.key}": correct / count, "train/lr": lr}
        rate = self.totals.images_per_second()
        return values | ({} if rate is None else {"train/images_per_second": rate})

    def _log(self, values: Mapping[str, float]) -> None:
        step = self.state.step
        record = {"at": time.time(), "step": step, "epoch": step / self.recipe.steps_per_epoch, "values": dict(values)}
        append_line(self.run.metrics, record)
        self.state.history.append(record)

    def _report(self, lr: float) -> None:
        """Report progress: loss, metrics, speed and the remaining seconds."""
        loss, correct, count = self.totals.sums()
        step, total = self.state.step, self._last_step
        eta = (process_clock() - self.began).wall / self.session_steps * (total - step)
        values = {
            "loss": loss / count,
            self.targets.task.mean_score.key: correct / count,
            "lr": lr,
            "images/s": self.totals.images_per_second() or 0.0,
            "eta_seconds": eta,
        }
        key = f"val/{self.targets.task.headline.key}"
        if key in self.state.best:
            values[key] = self.state.best[key]
        self.progress(Progress("training", step, total, "steps", values))

    # checkpoints --------------------------------------------------------------------------------------------------

    def _checkpoint_is_due(self) -> bool:
        every = self.checkpointing.every_steps
        by_steps = every is not None and self.state.step % every == 0
        return by_steps or time.perf_counter() - self.saved_at >= self.checkpointing.every_seconds

    def _seconds(self) -> Seconds:
        """Return the seconds of this session and of those before it."""
        return self.seconds_before + (process_clock() - self.began)

    def _save(self) -> None:
        """Write a checkpoint of the current step."""
        self.state.epoch_totals = self.totals.sums()
        seconds = self._seconds()
        self.state.seconds, self.state.cpu_seconds = seconds.wall, seconds.cpu
        content = {
            "state": dict(vars(self.state)),
            "model": self.classifier.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.state if self.average is not None else None,
            "numerics": self.numerics.to_dict(),
            "identity": dict(self.checkpointing.identity),
            "torch": str(torch.__version__),
        }
        checkpoint.save(self.run.checkpoints, self.state.step, content)
        self.saved_at = time.perf_counter()


def _no_memory_for(batch_size: int) -> str:
    return (
        f"out of memory at batch size {batch_size}. Try hyperparameters.batch_size: {max(1, batch_size // 2)}, a smaller "
        "model.input_size_px, or a method that trains fewer stages."
    )

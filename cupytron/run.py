"""A whole run: train, evaluate, save, resume, stop when asked."""

import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cupytron import checkpoint, mesh_run, process, progress
from cupytron.agreement import check_shared
from cupytron.checkpoint import Checkpoint
from cupytron.comm import Communicator, ParallelContext, SelfCommunicator
from cupytron.config import RunConfig, resolve_run
from cupytron.course import short_of_rate, small_data
from cupytron.data import Dataset, Loader, evaluation_batches
from cupytron.durable import way_out
from cupytron.errors import CheckpointError, ConfigError, CupytronError
from cupytron.memory import explained
from cupytron.metrics import MetricsWriter, Speed, peak_memory_bytes, total_peak
from cupytron.parallel.drift import ReplicasDiffer
from cupytron.resume import (
    check_fits,
    check_tokens,
    mesh_changed,
    nothing_to_train,
    prepare_folder,
    settings_to_keep,
)
from cupytron.run_folder import RunFolder
from cupytron.source import Source
from cupytron.start import prepare_process
from cupytron.stop import StopRequest
from cupytron.terminal import Progress
from cupytron.together import together
from cupytron.trace import Trace
from cupytron.trainer import NotFinite, StepResult, Trainer

OnStep = Callable[[dict[str, Any]], Any]


@dataclasses.dataclass
class Outcome:
    """How a run ended: 0 finished or stopped by on_step, 75 or 130 stopped by a signal, and saved."""

    exit_code: int
    step: int
    val_loss: float | None


def train(
    config: RunConfig,
    out: str | Path,
    environment: dict[str, Any] | None = None,
    resume: str = "auto",
    init_from: str | Path | None = None,
    quiet: bool = False,
    world: Communicator | None = None,
    trace: tuple[int, int] | None = None,
    *,
    init_checkpoint: str | int = "best",
    on_step: OnStep | None = None,
) -> Outcome:
    """Train until train.max_steps, from the newest whole checkpoint in `out` if there is one.

    Collective over `world`. Rank 0 owns the run's folder and the terminal.

    Args:
        config: the run's settings; config.data.path names the data set.
        out: the run's folder.
        environment: process.prepare's record; None or empty: it is made here.
        resume: "auto", or "never": refuse a folder that holds checkpoints.
        init_from: a run whose weights this one starts from.
        init_checkpoint: which of that run's: "best" (the last if none was evaluated), "last" or a step.
        quiet: print nothing.
        world: all ranks of the run; None: this process alone.
        trace: (first, last): write what happens in steps first <= step < last to trace.json in `out`.
        on_step: called with each step's record on every rank; the run saves and stops if it returns False.

    Raises:
        CupytronError, DataError: settings, data or checkpoints that cannot be used.
        NotFinite: the loss is not finite; the last good checkpoint is named.
    """
    if not str(out):
        raise ConfigError("--out is empty; give the folder that the run is to have")
    if resume not in ("auto", "never"):
        raise ConfigError(f"resume={resume!r}: must be auto or never")
    if init_from is not None and not str(init_from):
        raise ConfigError("--init-from is empty; give a run's folder, or leave the option out")
    folder, world = RunFolder(out), world or SelfCommunicator()
    if init_from is not None and os.path.realpath(init_from) == os.path.realpath(out):
        raise ConfigError(
            f"--init-from {init_from}: is the run of --out itself; to go on with it leave --init-from out, "
            "for a new run from its weights choose another --out"
        )
    which = str(init_checkpoint)
    check_one_run(world, out, resume, init_from, which, trace)
    source = None if init_from is None else Source(RunFolder(init_from), which)
    shown = Progress(config.train.max_steps, quiet or world.rank > 0, live=world.size == 1)
    with mesh_run.watched(world, config.parallel.timeout), shown:
        return _train(config, folder, environment, resume, source, shown, world, trace, on_step)


def check_one_run(
    world: Communicator,
    out: str | Path,
    resume: str,
    init_from: str | Path | None,
    init_checkpoint: str,
    trace: tuple[int, int] | None,
) -> None:
    """Refuse ranks that were started differently, or see different checkpoints in `out`. Collective.

    This comes before settings are compared or found wrong: a rank that does not see the run has not read
    the run's own settings. The arguments are those of train.

    Raises:
        ConfigError, CheckpointError: how the ranks differ; the same on every rank.
    """
    # first of all, as in every command: ranks may have been started with different ones
    mesh_run.check_alike(
        world,
        out=str(out),
        resume=resume,
        init=str(init_from),
        init_checkpoint=init_checkpoint,
        trace=trace,
    )
    RunFolder(out).compare_steps(world)


def _train(
    config: RunConfig,
    folder: RunFolder,
    environment: dict[str, Any] | None,
    resume: str,
    source: Source | None,
    shown: Progress,
    world: Communicator,
    trace: tuple[int, int] | None,
    on_step: OnStep | None,
) -> Outcome:
    """As train, with all its arguments given, inside the watchdog's context."""
    if config.data.path is None:
        raise ConfigError(
            "data.path: is not set; give --data DIR, or from Python the override data.path=DIR; "
            "`cupytron data prepare` makes DIR"
        )
    environment = environment or prepare_process(config)
    own = ("parallel.threads", "parallel.blas_kernel", "parallel.malloc")  # a node's business
    mesh_run.check_alike(world, own, settings=config)
    tracing = Trace(*trace) if trace else None
    context = mesh_run.open_mesh(config, world)
    together(world, lambda: folder.check_new(resume == "auto") if world.rank == 0 else None)
    dataset = mesh_run.open_data(config.data.path, world)
    check_tokens(folder, source.folder if source else None, dataset, world)
    settings = resolve_run(config, dataset.vocab_size)
    # the path is kept absolute: the run may be resumed from another working folder
    data = settings.data.model_copy(update={"path": mesh_run.absolute(dataset.path)})
    settings = settings.model_copy(update={"data": data})
    try:
        progress.phase("building the model")
        run = _Run(settings, folder, dataset, environment, shown, context, tracing, on_step)
        if source:
            run.choose(source)
        if world.rank == 0:
            # not before the settings and the weights to start from have proved good
            folder.path.mkdir(parents=True, exist_ok=True)
        world.barrier()
        with folder.lock() if world.rank == 0 else contextlib.nullcontext(), run.stop:
            try:
                with explained(run.config, run.trainer.model.config, context):
                    run.start(source, resume == "auto")
                    return run.loop()
            except BaseException as error:
                error.add_note(run.where())
                raise
    except OSError as error:
        if error.filename is not None:
            raise
        raise CupytronError(
            f"{folder.path}: {error.strerror or error}; {way_out(error)} there"
        ) from error


class _Started(NamedTuple):
    """A step under way: its number, all tokens so far, when it began, and what waits for its numbers."""

    step: int
    tokens: int
    began: float
    numbers: Callable[[], StepResult]


class _Run:
    def __init__(
        self,
        config: RunConfig,
        folder: RunFolder,
        dataset: Dataset,
        environment: dict[str, Any],
        shown: Progress,
        context: ParallelContext,
        trace: Trace | None = None,
        on_step: OnStep | None = None,
    ) -> None:
        self.on_step = on_step
        self.config, self.folder, self.dataset = config, folder, dataset
        self.environment, self.progress = environment, shown
        self.context, self.world = context, context.world
        self.environment.update(context.device.versions())
        self._note_kernels()
        self.first = self.world.rank == 0  # the rank that writes what only one may
        self.trainer = Trainer(config, dataset.vocab_size, context)
        self._set_trace(trace)
        seq = config.train.sequence_length
        self.loader = Loader(dataset.train, seq, config.train.seed)
        self.speed = Speed(self.trainer.model.config, seq, total_peak(context, config))
        self.tokens = 0
        self.elapsed = 0.0
        self._started: _Started | None = None  # the step whose numbers have not been heard
        self._finished_at = 0.0
        self.val_loss: float | None = None  # of the current step, if it was evaluated
        self.stop = StopRequest(speaks=not shown.quiet)
        self.phase = "at the start"
        self.saved: int | None = None  # the step of the newest save
        self.idle = False  # whether the run is beyond its end, so that nothing of it may change
        self.best = math.inf
        self.metrics: MetricsWriter | None = None

    def choose(self, source: Source) -> None:
        """Find the weights that a new run starts from; a run that has begun needs none. Collective.

        Raises:
            ConfigError, CheckpointError: there are none, or they do not fit.
        """
        begun = bool(self.folder.steps()) or self.folder.has_saved()
        if not any(self.world.gather_objects(begun)):
            self.note("looking for the weights to start from")
            source.choose(self.trainer.model.config, self.dataset, self._warn, self.world)

    def start(self, source: Source | None, resume: bool) -> None:
        """Build or restore the state, and bring the folder in line with it.

        Args:
            source: where a new run's weights come from; None: initial ones.
            resume: whether checkpoints in the folder are resumed; if not, there must be none.
        """
        self.note("looking for a checkpoint")
        process.note_loaded_blas(self.environment)
        self.progress.line(process.describe(self.environment))
        exact = self.config.train.deterministic
        for line in mesh_run.check_arithmetic(self.world, self.environment, exact):
            self._warn(line)
        for line in mesh_run.describe(self.config, self.context):
            self.progress.line(line)
        self._alone(lambda: self._tidy(resume))
        check_shared(self.folder.checkpoints, self.world)
        found = self.folder.newest(self._warn, self.world)
        if found is None and self.folder.agreed_steps(self.world):
            raise CheckpointError(
                f"{self.folder.path}: none of its checkpoints is whole, so there is nothing to "
                "resume; choose another --out"
            )
        if found:
            model = self.trainer.model.config
            lines = check_fits(found, self.config, model, self.dataset, self.environment)
            lines += mesh_changed(found, self.config, self._mesh())
            if idle := nothing_to_train(found, self.config, self.dataset):
                self.idle, lines = True, [idle]
            for line in lines:
                self._warn(line)
            if source:
                self._warn("--init-from is not used: this run has begun, and is resumed")
        self.note("making the initial weights")
        self.trainer.materialize(initial=found is None and source is None)
        if found:
            self._restore(found)
        elif source:
            self.note("reading the weights to start from")
            self.progress.line(
                source.take_weights(self.trainer, self.dataset, self._warn, self.world)
            )
        self.note("preparing the run's folder")
        self._alone(lambda: self._prepare_folder(found))
        self.best = self.world.gather_objects(self.best)[0]
        model = self.trainer.model.config
        self.progress.line(
            f"{model.family}, {model.num_parameters():,} parameters; "
            f"{self.dataset.train.num_tokens:,} training tokens, {self.config.tokens_per_step:,} "
            f"a step, {self.loader.samples_per_epoch:,} sequences an epoch"
        )
        for line in small_data(self.config, self.dataset, self.loader.samples_per_epoch):
            self._warn(line)
        step, end = self.trainer.step, self.config.train.max_steps
        for line in short_of_rate(self.config) if step < end else ():
            self._warn(line)
        if self.trace and (self.trace.last <= step or self.trace.first >= end):
            reason = (
                f"this run begins at step {step} and ends at step {end}; choose steps between them"
            )
            if step >= end:
                reason = "no step is left to train; give --max-steps with more steps"
            self._warn(
                f"--trace {self.trace.first}:{self.trace.last}: nothing will be traced: {reason}"
            )
            self._set_trace(None)

    def _alone(self, work: Callable[[], None]) -> None:
        """Call `work` on rank 0 alone; if it fails, every rank raises the same. Collective."""
        together(self.world, work if self.first else lambda: None)

    def _tidy(self, resume: bool) -> None:
        if others := self.folder.others_files():
            names = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
            self._warn(
                f"{self.folder.path}: holds other files ({names}); they stay, and the run's are put "
                "beside them"
            )
        for line in self.folder.create():
            self._warn(line)
        self.folder.check_new(resume)  # again: a checkpoint may have been restored

    def _prepare_folder(self, found: Checkpoint | None) -> None:
        config = self.config
        if found and self.idle:
            config = settings_to_keep(found, config, self.dataset)
        self.metrics, self.best = prepare_folder(
            self.folder, found, config, self.environment, self.dataset, self._warn
        )

    def _mesh(self) -> dict[str, int]:
        """The mesh as checkpoints keep it."""
        return {**self.context.sizes, "zero": self.config.parallel.zero}

    def note(self, phase: str) -> None:
        """Say what comes next, for messages and the watchdog."""
        self.phase = phase
        progress.note(self.trainer.step, phase)

    def where(self) -> str:
        """Step and phase, for messages."""
        return f"step {self.trainer.step + 1}, {self.phase}"

    def _note_kernels(self) -> None:
        """Record which kernels are in use; the first step on a GPU chooses some."""
        if self.context.tuner is not None:
            self.environment["kernels"] = self.context.tuner.fingerprint()
        if refused := self.context.device.refusals():
            self.environment["cudnn_refused"] = refused

    def _warn(self, text: str) -> None:
        self.progress.line(f"warning: {text}")

    def _restore(self, found: Checkpoint) -> None:
        self.note("reading the checkpoint")
        self.trainer.load(found)
        position, counters = int(found.about["position"]), found.about.get("optimizer")
        # checkpoints from before there was a second order do not name theirs
        order = found.about.get("order", 1)
        seq, seed = self.config.train.sequence_length, self.config.train.seed
        self.loader = Loader(self.dataset.train, seq, seed, order)
        self.trainer.restore(found.step, position, counters)
        self.tokens = int(found.about["tokens"])
        self.elapsed = float(found.about["elapsed_seconds"])
        self.val_loss = found.about["val_loss"]
        self.saved = found.step
        self.progress.line(f"resuming from {found.folder} at step {found.step}")

    def loop(self) -> Outcome:
        """Train to the end or to a signal."""
        train = self.config.train
        # finiteness is checked at every step; NumPy's own warnings would only come before the error
        quiet = np.errstate(over="ignore", invalid="ignore", divide="ignore")
        stop = self.stop
        stop.steps_begin()
        began, more = self.trainer.step, ""
        with quiet:
            try:
                # at the start, and where a signal cut an evaluation short
                due = self._evaluation_due(self.trainer.step) and not self.idle
                if self.val_loss is None and due:
                    self._evaluate()
                    if self.saved is not None and self._is_best():
                        self._save(again=True)
                while self.trainer.step < train.max_steps and not stop.agree(self.world):
                    self._step()
                    if self.trace and self.trainer.step in (self.trace.last, train.max_steps):
                        self._write_trace(self.trace)
                    self._after_step()
                if stop.signal is not None:
                    self._save()
                    self.progress.line(
                        f"stopped by {stop.name} at step {self.trainer.step}, saved; "
                        "the same command goes on from here"
                    )
                elif self.saved == self.trainer.step:
                    if self.trainer.step == began and not self.idle:
                        more = "; to go on give --max-steps with more steps"
                    self.progress.line(
                        f"done: {self.trainer.step} steps, run in {self.folder.path}{more}"
                    )
                if self.trace:
                    self._write_trace(self.trace)
            except OSError as error:
                at = f"step {self.saved}" if self.saved is not None else "the beginning"
                raise CupytronError(
                    f"step {self.trainer.step}: {error.strerror or error}, writing to "
                    f"{self.folder.path}; {way_out(error)} there, and start the same command again: it "
                    f"goes on from {at}"
                ) from error
            finally:
                if self.metrics:
                    with contextlib.suppress(OSError):
                        self.metrics.close()
        return Outcome(stop.exit_code, self.trainer.step, self.val_loss)

    def _step(self) -> None:
        self.note("in the step")
        began = time.monotonic()
        inputs, targets = self._next_batch()
        tracing = self.trace.step(self.trainer.step, self.context) if self.trace else None
        self.val_loss = None
        # an evaluation may find the best weights, which are saved
        end = self.trainer.step + 1
        compare = self._save_due(end) or self._evaluation_due(end) or self._check_due(end)
        with tracing or contextlib.nullcontext(), self._last_good_named():
            started = self.trainer.start_step(inputs, targets, compare)
            self.tokens += self.config.tokens_per_step
            # a GPU works on this step while the host hears of the one before it
            self._finish_step()
            self._started = _Started(self.trainer.step, self.tokens, began, started)
            if not self.context.device.gpu or tracing:
                self._finish_step()

    def _finish_step(self) -> None:
        """Hear how the step went that was started last, and write it down."""
        if self._started is None:
            return
        (step, tokens, began, numbers), self._started = self._started, None
        with self._last_good_named():
            result = numbers()
        now = time.monotonic()
        seconds, self._finished_at = now - max(began, self._finished_at), now
        self.elapsed += seconds
        self.speed.add(self.config.tokens_per_step, seconds)
        rate = self.config.tokens_per_step / max(seconds, 1e-9)
        record = {
            "step": step,
            "loss": result.loss,
            "lr": result.lr,
            "grad_norm": result.grad_norm,
            "tokens": tokens,
            "tokens_per_second": rate,
            **self.speed.mfu(rate),
            "elapsed_seconds": self.elapsed,
        }
        if self.config.scales_loss:
            record["loss_scale"] = result.loss_scale
        if result.skipped:
            self.progress.line(
                f"step {step}: float16 gradients overflowed, nothing was updated; the loss scale is now "
                f"{result.loss_scale:g}"
            )
        train = self.config.train
        logged = step % train.log_interval == 0 or step in (1, train.max_steps)
        if logged:
            speed = self.speed.read()
            record |= {key: value for key, value in speed.items() if key not in record}
            record["peak_memory_bytes"] = peak_memory_bytes(self.context.device)
            self.progress.step(record | speed)
        self._record(record)
        if self.on_step and self.on_step(dict(record)) is False:
            self.stop.ask()

    def _set_trace(self, trace: Trace | None) -> None:
        self.trace = self.trainer.zero.pipeline.trace = trace

    def _write_trace(self, trace: Trace) -> None:
        """Write what has been traced; no more is. Collective."""
        self.note("writing the trace")
        self._set_trace(None)
        if not trace.steps:
            self._warn(f"nothing was traced: the run stopped before step {trace.first}")
            return
        micro_batches = len(self.trainer.local_sequences) // self.config.train.micro_batch
        schedule = self.trainer.zero.pipeline.schedule(micro_batches)
        path = self.folder.path / "trace.json"
        try:
            line = trace.write(path, self.context, schedule)
        except OSError as error:
            self._warn(f"{path}: {error.strerror or error}; the run goes on without the trace")
        else:
            self.progress.line(line)

    def _next_batch(self) -> tuple[np.ndarray, np.ndarray]:
        """This replica's part of the next global batch."""
        size = self.config.train.micro_batch
        parts = [
            self.loader.batch(self.trainer.position + int(first), size)
            for first in self.trainer.local_sequences[::size]
        ]
        inputs, targets = zip(*parts, strict=True)
        return np.concatenate(inputs), np.concatenate(targets)

    def _record(self, record: dict[str, Any]) -> None:
        if self.metrics:
            self.metrics.write(record)

    @contextlib.contextmanager
    def _last_good_named(self) -> Iterator[None]:
        """Add to a NotFinite or a ReplicasDiffer the step from which the run can go on."""
        try:
            yield
        except ReplicasDiffer as error:
            at = "the beginning" if self.saved is None else f"step {self.saved}"
            raise ReplicasDiffer(
                f"{error}; nothing was saved; start the same command again: it goes on from {at}; if it "
                "comes again at the same rank, suspect that machine's memory"
            ) from None
        except NotFinite as error:
            if "last good" in str(error):
                raise
            raise NotFinite(f"{error}; {self._last_good()}") from None

    def _last_good(self) -> str:
        steps = self.folder.steps()
        return f"last good checkpoint: {self.folder.place(steps[-1]) if steps else 'none'}"

    def _after_step(self) -> None:
        step = self.trainer.step
        due = self._save_due(step)
        if self._evaluation_due(step):
            self._evaluate()
            # the best weights are kept, so they are saved when they are found
            due |= self._is_best()
        if due and self.stop.signal is None:
            self._save()
        elif self._check_due(step):
            self._compare_replicas()

    def _save_due(self, step: int) -> bool:
        every = self.config.checkpoint.interval
        return step == self.config.train.max_steps or (every > 0 and step % every == 0)

    def _check_due(self, step: int) -> bool:
        every = self.config.train.check_replicas
        return every > 0 and step % every == 0

    def _compare_replicas(self) -> None:
        self._finish_step()
        with self._last_good_named():
            self.trainer.compare_replicas()

    def _evaluation_due(self, step: int) -> bool:
        train = self.config.train
        every = train.eval_interval
        return step in (0, train.max_steps) or (every > 0 and step % every == 0)

    def _is_best(self) -> bool:
        return self.val_loss is not None and self.val_loss < self.best

    def _evaluate(self) -> None:
        self._finish_step()
        if self.dataset.val.num_tokens < 2:
            return
        self.note("evaluating")
        config = self.config.train
        batches = evaluation_batches(
            self.dataset.val, config.sequence_length, config.micro_batch, config.eval_tokens
        )
        # a signal does not wait for the rest of a long evaluation
        total, counted = self.trainer.evaluate(self._until_stopped(batches))
        if self.stop.signal is not None:
            return
        loss = total / counted
        if not math.isfinite(loss):
            self._compare_replicas()  # a replica that has drifted may be the cause
            raise NotFinite(
                f"step {self.trainer.step}: validation loss {loss} is not finite; lower optim.lr; "
                f"{self._last_good()}"
            )
        self.val_loss = loss
        self._record({"step": self.trainer.step, "val_loss": loss, "val_tokens": counted})
        part = f" over the first {counted:,} tokens" if config.eval_tokens else ""
        self.progress.line(f"step {self.trainer.step}  validation loss {loss:.4f}{part}")

    def _until_stopped(self, batches: Iterable[Any]) -> Iterator[Any]:
        for number, batch in enumerate(batches):
            if number % self.context.dp.size == 0:  # all replicas do, or none
                self.note("evaluating")
                if self.stop.agree(self.world):
                    return
            yield batch

    def _save(self, again: bool = False) -> None:
        if self.saved == self.trainer.step and not again:
            return
        self.note("saving")
        self._compare_replicas()
        self._note_kernels()
        about = {
            "step": self.trainer.step,
            "position": self.trainer.position,
            "order": self.loader.order,
            "optimizer": self.trainer.counters(),
            "tokens": self.tokens,
            "elapsed_seconds": self.elapsed,
            "val_loss": self.val_loss,
            "model": self.trainer.model.config.model_dump(mode="json"),
            "settings": self.config.model_dump(mode="json"),
            "data": {
                "tokenizer_hash": self.dataset.tokenizer_hash,
                "train_sha256": self.dataset.train.sha256,
                "val_sha256": self.dataset.val.sha256,
            },
            "mesh": self._mesh(),
            "environment": self.environment,
            "metrics": self.metrics.seal() if self.metrics else None,  # rank 0's counts
        }
        place = self.folder.place(self.trainer.step)
        checkpoint.write(place, self.trainer.pieces(), about, self.world)
        self.saved = self.trainer.step
        if self.val_loss is not None:
            self.best = min(self.best, self.val_loss)
        if self.first:
            self.folder.note_saved(self.trainer.step)
            self.note("removing old checkpoints")
            self.folder.prune(self.config.checkpoint.keep)

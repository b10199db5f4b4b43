"""A whole run: train, evaluate, save, resume, stop when asked."""

import contextlib
import dataclasses
import itertools
import json
import math
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np

from cupytron import checkpoint, process
from cupytron.checkpoint import Checkpoint
from cupytron.config import RunConfig, resolve_run
from cupytron.data import DataError, Dataset, Loader, evaluation_batches, open_dataset
from cupytron.errors import CheckpointError, ConfigError, CupytronError
from cupytron.metrics import MetricsWriter, Progress, Speed, peak_memory_bytes
from cupytron.run_folder import RunFolder
from cupytron.stop import StopRequest
from cupytron.trainer import NotFinite, Trainer


@dataclasses.dataclass
class Outcome:
    """How a run ended: 0 finished, 75 or 130 stopped by a signal and saved."""

    exit_code: int
    step: int
    val_loss: float | None


def train(
    config: RunConfig,
    out: str | Path,
    environment: dict[str, Any],
    resume: str = "auto",
    init_from: str | Path | None = None,
    quiet: bool = False,
) -> Outcome:
    """Train until train.max_steps, from the newest whole checkpoint in `out` if there is one.

    Args:
        config: the run's settings; config.data.path names the data set.
        out: the run's folder.
        environment: process.prepare's record.
        resume: "auto", or "never": refuse a folder that holds checkpoints.
        init_from: a run whose best or last weights this one starts from.
        quiet: print nothing.

    Raises:
        CupytronError, DataError: settings, data or checkpoints that cannot be used.
        NotFinite: the loss is not finite; the last good checkpoint is named.
    """
    if not str(out):
        raise ConfigError("--out is empty; give the folder that the run is to have")
    folder = RunFolder(out)
    if config.data.path is None:
        raise ConfigError("data.path: is not set; give --data DIR, made by `cupytron data prepare`")
    folder.check_new()
    if folder.steps() and resume == "never":
        raise CupytronError(
            f"{folder.path}: holds a run at step {folder.steps()[-1]}; choose another --out, "
            "or --resume auto to go on with it"
        )
    dataset = open_data(config.data.path)
    settings = resolve_run(config, dataset.vocab_size)
    # the path is kept absolute: the run may be resumed from another working folder
    data = settings.data.model_copy(update={"path": _absolute(dataset.path)})
    settings = settings.model_copy(update={"data": data})
    progress = Progress(config.train.max_steps, quiet)
    try:
        run = _Run(settings, folder, dataset, environment, progress)
        folder.path.mkdir(parents=True, exist_ok=True)  # not before the settings have proved good
        with folder.lock(), run.stop:
            run.start(init_from)
            return run.loop()
    except OSError as error:
        if error.filename is not None:
            raise
        raise CupytronError(f"{folder.path}: {error.strerror or error}; make room there") from error
    finally:
        progress.close()


def open_data(path: str | Path) -> Dataset:
    """Open a data set that the settings name, and compare it with its hashes."""
    try:
        return open_dataset(path, verify=True)
    except DataError as error:
        raise DataError(f"{error} (if it stands elsewhere now, give --data DIR)") from None


def _absolute(path: Path) -> str:
    absolute = str(path.resolve())
    if not absolute.isprintable():
        raise ConfigError(f"data.path={absolute!r}: has characters that no settings file can hold")
    return absolute


class _Run:
    def __init__(
        self,
        config: RunConfig,
        folder: RunFolder,
        dataset: Dataset,
        environment: dict[str, Any],
        progress: Progress,
    ) -> None:
        self.config, self.folder, self.dataset = config, folder, dataset
        self.environment, self.progress = environment, progress
        self.trainer = Trainer(config, dataset.vocab_size)
        seq = config.train.sequence_length
        self.loader = Loader(dataset.train, seq, config.train.seed)
        self.speed = Speed(self.trainer.model.config, seq)
        self.tokens = 0
        self.elapsed = 0.0
        self.val_loss: float | None = None  # of the current step, if it was evaluated
        self.stop = StopRequest()
        self.saved: int | None = None  # the step of the newest save
        self.best = math.inf

    def start(self, init_from: str | Path | None) -> None:
        """Build or restore the state, and bring the folder in line with it."""
        process.note_loaded_blas(self.environment)
        self.progress.line(process.describe(self.environment))
        found = self.folder.newest(self._warn)
        if found is None and self.folder.steps():
            raise CheckpointError(
                f"{self.folder.path}: none of its checkpoints is whole, so there is nothing to "
                "resume; choose another --out"
            )
        source = self._init_source(init_from) if init_from and found is None else None
        if found:
            self._check_fits(found)
            if init_from:
                self._warn("--init-from is not used: this run has begun, and is resumed")
        elif source:
            self._check_model(source)
        self.trainer.materialize()
        if found:
            self._restore(found)
        elif source:
            self.trainer.load(source, weights_only=True)
            self.progress.line(f"weights from {source.folder}")
        self.folder.create()
        self.folder.set_aside_after(self.trainer.step if found else -1)
        if found and _validation_hash(found) == self.dataset.val.sha256:
            best = self.folder.best(self._warn)
            self.best = best.about["val_loss"] if best else math.inf
        self.folder.write(self.folder.config, self.config.to_toml())
        self.folder.write(self.folder.environment, json.dumps(self.environment, indent=1) + "\n")
        if self.dataset.tokenizer_hash:
            content = (self.dataset.path / "tokenizer.json").read_text(encoding="utf-8")
            self.folder.write(self.folder.tokenizer, content)
        self.metrics = MetricsWriter(self.folder.open_metrics(self.trainer.step if found else -1))
        model = self.trainer.model.config
        self.progress.line(
            f"{model.family}, {model.num_parameters():,} parameters; "
            f"{self.dataset.train.num_tokens:,} training tokens, {self.config.tokens_per_step:,} "
            f"a step, {self.loader.samples_per_epoch:,} sequences an epoch; "
            "GFLOP/s with attention counted whole/causal"
        )

    def _warn(self, text: str) -> None:
        self.progress.line(f"warning: {text}")

    def _init_source(self, path: str | Path) -> Checkpoint:
        folder = RunFolder(path).require()
        source = folder.best(self._warn) or folder.newest(self._warn)
        if source is None:
            raise CheckpointError(f"{folder.path}: no whole checkpoint to take weights from")
        return source

    def _check_model(self, found: Checkpoint) -> None:
        """Refuse weights that would mean something else here, whatever their shapes."""
        before, now = found.about["model"], self.trainer.model.config.model_dump()
        # dropout and recompute change no tensor
        free = {"dropout", "recompute", "init_std", "family"}
        pairs = [(f"model.{k}", before.get(k), now[k]) for k in now if k not in free]
        lines = "; ".join(f"{k}: {a} there, {b} asked for" for k, a, b in pairs if a != b)
        if lines:
            raise ConfigError(f"{found.folder} does not fit: {lines}; choose another --out")
        if found.about["data"]["tokenizer_hash"] != self.dataset.tokenizer_hash:
            raise ConfigError(
                f"{found.folder} was trained with another tokenizer than that of "
                f"{self.dataset.path}; prepare the data with --tokenizer RUN/tokenizer.json"
            )

    def _check_fits(self, found: Checkpoint) -> None:
        """Refuse what cannot be resumed; warn of what changes the result."""
        self._check_model(found)
        before, now = found.about["settings"]["optim"]["name"], self.config.optim.name
        if before != now:
            raise ConfigError(
                f"{found.folder} does not fit: optim.name: {before} there, {now} asked for; "
                "choose another --out"
            )
        if found.about["data"]["train_sha256"] != self.dataset.train.sha256:
            self._warn("the data set has changed: samples will not be those of an unbroken run")
        for line in _settings_changed(found.about["settings"], self.config.model_dump(mode="json")):
            self._warn(f"setting changed: {line}")
        for line in process.changes(found.about["environment"], self.environment):
            self._warn(f"environment changed, so the last bits may differ: {line}")

    def _restore(self, found: Checkpoint) -> None:
        self.trainer.load(found)
        self.trainer.step = found.step
        self.trainer.position = int(found.about["position"])
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
        with quiet:
            try:
                # at the start, and where a signal cut an evaluation short
                if self.val_loss is None and self._evaluation_due():
                    self._evaluate()
                    if self.saved is not None and self._is_best():
                        self._save(again=True)
                while self.trainer.step < train.max_steps and stop.signal is None:
                    self._step()
                    self._after_step()
                if stop.signal is not None:
                    self._save()
                    name = signal.Signals(stop.signal).name
                    self.progress.line(
                        f"stopped by {name} at step {self.trainer.step}, saved; "
                        "the same command goes on from here"
                    )
                elif self.saved == self.trainer.step:
                    self.progress.line(
                        f"done: {self.trainer.step} steps, run in {self.folder.path}"
                    )
            except OSError as error:
                at = f"step {self.saved}" if self.saved is not None else "the beginning"
                raise CupytronError(
                    f"step {self.trainer.step}: {error.strerror or error}, writing to "
                    f"{self.folder.path}; make room and start the same command again: it goes on "
                    f"from {at}"
                ) from error
            finally:
                with contextlib.suppress(OSError):
                    self.metrics.close()
        return Outcome(stop.exit_code, self.trainer.step, self.val_loss)

    def _step(self) -> None:
        began = time.monotonic()
        inputs, targets = self.loader.batch(self.trainer.position, self.config.global_batch)
        try:
            result = self.trainer.train_step(inputs, targets)
        except NotFinite as error:
            raise NotFinite(f"{error}; {self._last_good()}") from None
        seconds = time.monotonic() - began
        self.val_loss = None
        self.tokens += inputs.size
        self.elapsed += seconds
        self.speed.add(inputs.size, seconds)
        record = {
            "step": self.trainer.step,
            "loss": result.loss,
            "lr": result.lr,
            "grad_norm": result.grad_norm,
            "tokens": self.tokens,
            "tokens_per_second": inputs.size / max(seconds, 1e-9),
            "elapsed_seconds": self.elapsed,
        }
        self.metrics.write(record)
        step, train = self.trainer.step, self.config.train
        if step % train.log_interval == 0 or step in (1, train.max_steps):
            memory = {"peak_memory_bytes": peak_memory_bytes()}
            self.progress.step({**record, **self.speed.read(), **memory})

    def _last_good(self) -> str:
        steps = self.folder.steps()
        return f"last good checkpoint: {self.folder.place(steps[-1]) if steps else 'none'}"

    def _after_step(self) -> None:
        step, every = self.trainer.step, self.config.checkpoint.interval
        due = step == self.config.train.max_steps or (every > 0 and step % every == 0)
        if self._evaluation_due():
            self._evaluate()
            due |= (
                self._is_best()
            )  # the best weights are kept, so they are saved when they are found
        if due and self.stop.signal is None:
            self._save()

    def _evaluation_due(self) -> bool:
        step, train = self.trainer.step, self.config.train
        every = train.eval_interval
        return step in (0, train.max_steps) or (every > 0 and step % every == 0)

    def _is_best(self) -> bool:
        return self.val_loss is not None and self.val_loss < self.best

    def _evaluate(self) -> None:
        if self.dataset.val.num_tokens < 2:
            return
        config = self.config.train
        batches = evaluation_batches(self.dataset.val, config.sequence_length, config.micro_batch)
        # a signal does not wait for the rest of a long evaluation
        wanted = itertools.takewhile(lambda batch: self.stop.signal is None, batches)
        total, counted = self.trainer.evaluate(wanted)
        if self.stop.signal is not None:
            return
        loss = total / counted
        if not math.isfinite(loss):
            raise NotFinite(
                f"step {self.trainer.step}: validation loss {loss} is not finite; lower optim.lr; "
                f"{self._last_good()}"
            )
        self.val_loss = loss
        self.metrics.write({"step": self.trainer.step, "val_loss": loss, "val_tokens": counted})
        self.progress.line(f"step {self.trainer.step}  validation loss {loss:.4f}")

    def _save(self, again: bool = False) -> None:
        if self.saved == self.trainer.step and not again:
            return
        self.metrics.flush()
        about = {
            "step": self.trainer.step,
            "position": self.trainer.position,
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
            "environment": self.environment,
        }
        checkpoint.write(self.folder.place(self.trainer.step), self.trainer.pieces(), about)
        self.saved = self.trainer.step
        if self.val_loss is not None:
            self.best = min(self.best, self.val_loss)
        self.folder.prune(self.config.checkpoint.keep)


def _validation_hash(found: Checkpoint) -> str | None:
    return found.about["data"]["val_sha256"]


def _settings_changed(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    quiet = {"data", "checkpoint", "parallel"}  # these change no number
    lines = []
    for section in now:
        if section in quiet:
            continue
        for key, value in now[section].items():
            old = before.get(section, {}).get(key)
            if old != value and key not in ("log_interval", "eval_interval"):
                lines.append(f"{section}.{key}: {old} before, {value} now")
    return lines

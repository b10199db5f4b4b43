"""A training step on a GPU that the host only starts: nothing here waits for the GPU.

Whatever changes from step to step (tokens, learning rate, loss scale, addresses of the dropout masks)
lies in device memory, so that a step can be recorded as CUDA graphs once and replayed. Loss and norm are
copied to the host behind the step's work; whoever asks for them waits.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from cupytron import progress
from cupytron.config import RunConfig
from cupytron.graph import Graph
from cupytron.kernels import optimizer as update
from cupytron.kernels.optimizer import Control
from cupytron.kernels.sums import sum_rows
from cupytron.optim import LossScale
from cupytron.parallel.pipeline import Work
from cupytron.parallel.zero import Zero
from cupytron.stash import MicroBatch

_SLOTS = 3  # steps whose tokens may be on their way to the GPU at once


class Numbers(NamedTuple):
    """What the GPU tells of a step; loss_scale: of the next one."""

    loss: float
    norm: float
    failed: bool
    loss_scale: float


class GPUStep:
    """Runs steps of a model on its GPU.

    Args:
        zero: the model, materialised. optimizer: optim.AdamW or optim.SGD. config: the run's settings.
    """

    def __init__(self, zero: Zero, optimizer: Any, config: RunConfig) -> None:
        self.zero, self.optimizer, self.config = zero, optimizer, config
        self.context = zero.context
        self.device: Any = zero.context.device
        self.scaling = config.scales_loss
        scale = config.train.loss_scale if self.scaling else 1.0
        xp = self.device.xp
        self.control = update.new_control(scale, config.optim.clip)
        self._given = xp.zeros(2)  # learning rate; 1 / targets of the step
        self._scale = xp.zeros(1)  # of the loss: 1 / targets, times the loss scale
        loss = slice(Control.LOSS, Control.LOSS + 1)
        self._loss = self.control[loss]  # shape (1,), for collectives
        self._ring = [_Slot() for _ in range(_SLOTS)]
        self._started = 0
        self._tokens: Any = None  # the step's tokens and addresses, on the GPU
        self._memo: dict[Any, Any] = {}  # tables that all micro-batches share
        self._parts = [
            (bucket, bucket.local(part))
            for bucket in filter(zero.counts_here, zero.buckets)
            for part in bucket.ranges(zero.counts, bucket.owned)
        ]
        self._micro_graph = Graph(self.device) if self._records_micro_steps() else None
        alone = self.context.world.size == 1 and not zero.deterministic
        self._update_graph = Graph(self.device) if config.parallel.graphs and alone else None
        self._static: Any = None  # the recorded micro-step's tokens
        self._marks: list[Any] = []  # events after the micro-batches of the step under way

    def _records_micro_steps(self) -> bool:
        # a micro-step is recorded where it talks to nobody: reductions follow the last one
        alone = self.context.tp.size == 1 and self.zero.pipeline.placement.parts == 1
        return self.config.parallel.graphs and alone and not self.zero.parts_at_once

    def start_gradients(self, work: Sequence[Work], counted: int, lr: float) -> None:
        """Start forward and backward of all micro-batches.

        Args:
            work: this replica's micro-batches, on the host.
            counted: targets that count, on all replicas.
            lr: learning rate.
        """
        zero, xp = self.zero, self.device.xp
        rows = self._upload(work, counted, lr)
        self.control[Control.LR] = self._given[0]
        xp.multiply(
            self._given[1:],
            self.control[Control.LOSS_SCALE : Control.LOSS_SCALE + 1],
            out=self._scale,
        )
        update.begin(self.control)
        self._marks = []
        recorded = self._micro_graph is not None and zero.pipeline.trace is None
        zero.begin_step(len(work), held=recorded)
        if recorded:
            for number, (batch, row) in enumerate(rows):
                with self.device.range(f"micro-batch {number}"):
                    self._replay(batch, row)
                self._marks.append(self._event())
        else:
            self._micro_step([self._on_device(*one) for one in rows])
        zero.finish_gradients()
        self._share_loss()

    def start_update(self) -> Callable[[], Numbers]:
        """Start the update; the function returned waits for the step's numbers."""
        with self.device.range("update"):
            if self._update_graph is not None:
                self._update_graph.run(self._update)
            else:
                self._update()
        self.zero.updated()
        return self._tell()

    def loss(self) -> float:
        """The mean loss of the step under way; waits for the GPU."""
        return float(self._loss[0])

    def forget_graphs(self) -> None:
        """Record anew: other kernels have taken their places in ops."""
        for graph in (self._micro_graph, self._update_graph):
            if graph is not None:
                graph.forget()

    # tokens

    def _upload(
        self, work: Sequence[Work], counted: int, lr: float
    ) -> list[tuple[MicroBatch, Any]]:
        """Send the step's tokens and numbers on their way; each micro-batch with its row of `_tokens`.

        A row holds ids, targets, the step, and the index of the first token.
        """
        sizes = [w.ids.size for w in work]
        total = sum(2 * size + 2 for size in sizes)
        slot = self._ring[self._started % _SLOTS]
        self._started += 1
        slot.make_room(total)
        at = 0
        places = []
        for one, size in zip(work, sizes, strict=True):
            slot.integers[at : at + size] = one.ids
            slot.integers[at + size : at + 2 * size] = one.targets
            slot.integers[at + 2 * size : at + 2 * size + 2] = one.batch.step, one.batch.first_token
            places.append(slice(at, at + 2 * size + 2))
            at = places[-1].stop
        slot.floats[:] = lr, 1 / max(1, counted)
        if self._tokens is None or len(self._tokens) < total:
            self._tokens = self.device.xp.empty(total, np.int64)
        self._tokens[:total].set(slot.integers[:total])
        self._given.set(slot.floats)
        slot.sent.record()
        return [(one.batch, self._tokens[place]) for one, place in zip(work, places, strict=True)]

    def _on_device(self, batch: MicroBatch, row: Any) -> Work:
        """A micro-batch whose tokens and addresses are those of a row, whatever it will hold."""
        size = (len(row) - 2) // 2
        moved = MicroBatch(
            batch.batch_size,
            batch.sequence_length,
            batch.positions,
            step=row[2 * size : 2 * size + 1].reshape(()),
            first_token=row[2 * size + 1 :].reshape(()),
            training=True,
            seed=batch.seed,
            memo=self._memo.setdefault((batch.batch_size, batch.sequence_length), {}),
        )
        return Work(moved, row[:size], row[size : 2 * size])

    # micro-steps

    def _replay(self, batch: MicroBatch, row: Any) -> None:
        """Run a micro-step on the recorded one's arrays."""
        assert self._micro_graph is not None
        shape = batch.batch_size, batch.sequence_length
        if self._static is None or self._static.shape != shape:
            tokens = self.device.xp.empty(len(row), np.int64)
            self._static = _Static(shape, tokens, self._on_device(batch, tokens))
            self._micro_graph.forget()
        static = self._static
        static.tokens[...] = row
        self._micro_graph.run(lambda: self._micro_step([static.work]))

    def _micro_step(self, works: list[Work]) -> None:
        for loss in self.zero.pipeline.losses(works, self._scale.reshape(())):
            update.add_loss(self.control, loss)

    # the update

    def _share_loss(self) -> None:
        """The step's loss on every rank, in `_loss`."""
        pipeline = self.zero.pipeline
        if pipeline.pp.rank == pipeline.last_stage:
            self.context.dp.all_reduce(self._loss)
        pipeline.pp.broadcast(self._loss, pipeline.last_stage)

    def _update(self) -> None:
        control, interval = self.control, LossScale.INTERVAL
        update.decide(control, self._square_sum(), scaling=self.scaling, growth_interval=interval)
        c = self.config.optim
        for bucket in self.zero.buckets:
            weights, gradient = bucket.weights, bucket.gradient
            copy = None if bucket.shard is weights else bucket.shard
            if gradient.dtype != weights.dtype:
                gradient = gradient.astype(weights.dtype)
                bucket.gradient[...] = 0
            common: dict[str, Any] = {"weight_decay": c.weight_decay, **bucket.state}
            common.update(decayed=bucket.decayed_here, control=control)
            if c.name == "adamw":
                common.update(beta1=c.beta1, beta2=c.beta2, eps=c.eps)
                update.adamw(weights, copy, gradient, **common)
            else:
                update.sgd(weights, copy, gradient, **common, momentum_factor=c.momentum)
        update.finish(control)

    def _square_sum(self) -> Any:
        """(1,) float64: the sum of squares of the whole gradient, on every rank."""
        xp, context = self.device.xp, self.context
        if self.zero.deterministic:  # its sums are rounded once, on the host
            return self.device.put(np.array([self.zero.global_norm() ** 2]))
        sums = xp.zeros(len(self._parts))  # a concatenation could not be recorded
        for i, (bucket, part) in enumerate(self._parts):
            sums[i : i + 1] = update.squares(bucket.gradient[part], 1)
        total = sum_rows(sums[:, None])
        if self.zero.stage >= 1:
            context.dp.all_reduce(total)
        context.tp.all_reduce(total)
        context.pp.all_reduce(total)
        return total

    # what the host hears

    def _event(self) -> Any:
        done = self.device.xp.cuda.Event(disable_timing=True)
        done.record()
        return done

    def _tell(self) -> Callable[[], Numbers]:
        """Copy the control block to the host, behind the step's work."""
        import cupyx

        host = cupyx.empty_pinned(len(self.control), np.float64)
        self.control.get(out=host, blocking=False)
        marks, self._marks = [*self._marks, self._event()], []
        slot = self._ring[(self._started - 1) % _SLOTS]

        def wait() -> Numbers:
            # the GPU may be slow, or wait for other ranks: each micro-batch that it has done is a beat
            for done in marks:
                with progress.waiting("the GPU's work"):
                    done.synchronize()
            slot.busy = False
            return Numbers(
                float(host[Control.LOSS]),
                float(host[Control.NORM]),
                bool(host[Control.FAILED]),
                float(host[Control.LOSS_SCALE]),
            )

        return wait

    def read(self) -> dict[str, float]:
        """Counters that a checkpoint needs; waits for the GPU."""
        values = self.control.get()
        return {
            "updates": int(values[Control.STEP]),
            "loss_scale": float(values[Control.LOSS_SCALE]),
            "good_steps": int(values[Control.GOOD_STEPS]),
        }

    def write(self, counters: dict[str, float]) -> None:
        """Take a checkpoint's counters."""
        self.control[Control.STEP] = counters["updates"]
        if self.scaling:
            self.control[Control.LOSS_SCALE] = counters["loss_scale"]
            self.control[Control.GOOD_STEPS] = counters["good_steps"]


class _Static(NamedTuple):
    """The arrays that a recorded micro-step reads: its tokens and addresses, and views of them."""

    shape: tuple[int, int]
    tokens: Any
    work: Work


class _Slot:
    """Pinned memory of one step, and when it has been read."""

    def __init__(self) -> None:
        import cupy
        import cupyx

        self._pinned = cupyx.empty_pinned
        self.integers = self._pinned(0, np.int64)
        self.floats = self._pinned(2, np.float64)
        self.sent = cupy.cuda.Event(disable_timing=True)
        self.busy = False  # until the step's numbers have come, which are sent after it

    def make_room(self, count: int) -> None:
        """Wait until the last copy from here is done; have room for so many integers."""
        if self.busy:
            # the host is more than _SLOTS - 1 steps ahead, and has asked for none of them
            self.sent.synchronize()
        self.busy = True
        if len(self.integers) < count:
            self.integers = self._pinned(count, np.int64)

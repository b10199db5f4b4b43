"""Data parallelism and ZeRO, one implementation with a stage.

    stage  weights  gradient  state   a bucket's gradient is reduced
    0      all      all       all     once a step: all-reduce
    1      all      all       share   once a step: reduce-scatter; the new weights are gathered
    2      all      share     share   after each micro-batch: reduce-scatter; the new weights are gathered
    3      share    share     share   after each micro-batch; weights are gathered where a layer runs

A share is 1 / dp of every bucket. Nothing here asks for the number of replicas: alone, a share is all. On a
pipeline's stage the buckets are those of its layers; a table that two stages share is a bucket on both.

Reference: Rajbhandari et al. 2020, "ZeRO", arXiv:1910.02054.
"""

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from cupytron import backend, optim, progress
from cupytron.comm import Communicator, ParallelContext
from cupytron.config_checks import MOST_REPLICAS, divisors
from cupytron.errors import CupytronError
from cupytron.layer import Layer, Parameter, Wrapper, expect_gradients, warn_of_unreached
from cupytron.parallel.buffer import Bucket, make_buckets, share
from cupytron.parallel.data import TreeSum, tree_reduce_scatter
from cupytron.parallel.pipeline import Pipeline, Work
from cupytron.stash import Stash

_IN_FLIGHT = 2  # reductions whose full gradients may be in memory at once, under stages 2 and 3


class Zero:
    """A model's weights, gradients and optimizer state, spread over the replicas.

    Args:
        model: parallelized, not materialised; its top-level layers are wrapped in place. It makes logits
            of token ids and has a `loss`, as Transformer does, if `compute_gradients` is to run it.
        context: the mesh.
        stage: 0 to 3.
        deterministic: the same bits on any number of replicas and at any stage; needs more memory.
        training: allocate gradients.
        pipeline: the stage that the model has been cut to; None: all of it is here.

    Attributes:
        buckets: in the order of the model.
    """

    def __init__(
        self,
        model: Layer,
        context: ParallelContext,
        stage: int = 0,
        deterministic: bool = False,
        training: bool = True,
        pipeline: Pipeline | None = None,
    ) -> None:
        if pipeline is None and context.pp.size > 1:
            raise CupytronError(
                f"the mesh has pp={context.pp.size} stages, and the model is not cut: make a Pipeline of "
                "it, and give that as pipeline="
            )
        # names the model's parts: initial values depend on names
        self.pipeline = pipeline or Pipeline(model, device=context.device)
        self.model, self.context, self.dp, self.stage = model, context, context.dp, stage
        self.deterministic, self.training = deterministic, training
        self.parts_at_once = stage >= 2 or deterministic  # reduced after each micro-batch
        pieces = MOST_REPLICAS if deterministic else self.dp.size
        if deterministic and MOST_REPLICAS % self.dp.size:
            fits = ", ".join(map(str, divisors(MOST_REPLICAS)))
            raise CupytronError(
                f"deterministic training with dp={self.dp.size}: replicas are the levels of a binary "
                f"tree; choose dp from {fits}"
            )
        if deterministic and (many := [n for n, u in self.pipeline.users.items() if u > 2]):
            raise CupytronError(
                f"deterministic training: {many[0]} is used by {self.pipeline.users[many[0]]} layers on "
                "two stages, and their sum has one order only if there are two of them; put these layers "
                "on one stage"
            )
        by_layer = make_buckets(model, pieces)
        self.buckets = list(dict.fromkeys(by_layer.values()))
        for bucket in self.buckets:
            if stage >= 1:
                bucket.owned = share(bucket.size, self.dp.rank, self.dp.size)
        # who of a bucket's owners completes a micro-batch's gradient: the last one in backward; each for
        # itself where they may stand on different stages, so that sums have one order on every mesh, or in
        # different chunks
        self.apart = deterministic or self.pipeline.placement.chunks > 1
        self._wrap(model, by_layer)
        self.reduce_dtype: Any = None  # of gradients, once they are allocated
        self._expected = 0  # micro-batches of a step
        self._held = False
        self._finished: dict[str, int] = {}  # micro-batches that each of them has completed
        self._used_up = True  # whether the last step's gradients have gone into an update
        self._pending: list[tuple[Bucket, str, Any]] = []
        self._trees = {who: TreeSum() for bucket in self.buckets for who in self.completers(bucket)}
        self._gathers: dict[str, Any] = {}
        self._told = False  # whether parameters without a gradient have been looked for

    def completers(self, bucket: Bucket) -> tuple[str, ...]:
        """Names of what adds to a bucket's gradient in reductions of its own."""
        return bucket.owners if self.apart else (bucket.name,)

    def copies(self, bucket: Bucket) -> Communicator | None:
        """The stages that have this bucket, too; None: no other."""
        return self.pipeline.copies.get(bucket.segments[0].parameter.name)

    def _wrap(self, model: Layer, by_layer: dict[str, Bucket]) -> None:
        layers: list[BucketLayer] = []

        def change(name: str, layer: Layer) -> Layer:
            if name not in by_layer:
                return layer
            layers.append(BucketLayer(name, layer, by_layer[name], self))
            return layers[-1]

        model.replace(change)
        for first, second in itertools.pairwise(layers):
            first.following, second.preceding = second, first

    def materialize(
        self,
        seed: int | None,
        dtype: Any,
        state: tuple[str, ...] = (),
        compute_dtype: Any = None,
        reduce_dtype: Any = None,
    ) -> None:
        """Allocate what this rank holds, on its device.

        Args:
            seed: of the initial weights; None: zeros, since a checkpoint's are to be read.
            dtype: of the weights that the optimizer updates, and of its state.
            state: names of the optimizer's arrays, zeros at first.
            compute_dtype: of the weights that layers see. reduce_dtype: of gradients. None: dtype;
                gradients have at least float32.
        """
        xp, put = self.context.device.xp, self.context.device.put
        dtype = np.dtype(dtype)
        compute_dtype = dtype if compute_dtype is None else compute_dtype
        self.reduce_dtype = backend.at_least_float32(reduce_dtype or dtype)
        for bucket in self.buckets:
            values = bucket.initial_weights(seed, dtype)
            rounded = values.astype(compute_dtype, copy=False)
            if self.stage < 3:
                bucket.set_data(put(rounded))
                bucket.shard = bucket.data[bucket.owned]
            else:
                bucket.set_data(None)
                bucket.shard = put(rounded[bucket.owned].copy())
            alike = compute_dtype == dtype
            bucket.weights = bucket.shard if alike else put(values[bucket.owned].copy())
            if not self.training:
                continue
            if self.parts_at_once:
                bucket.set_grad(None)
                bucket.gradient = xp.zeros(bucket.weights.shape, self.reduce_dtype)
            else:
                bucket.set_grad(xp.zeros(bucket.size, self.reduce_dtype))
                bucket.gradient = bucket.grad[bucket.owned]
            bucket.state = {name: xp.zeros_like(bucket.weights) for name in state}
            progress.beat()

    @property
    def persistent_bytes(self) -> int:
        """Bytes of weights, gradients and optimizer state that this rank holds between steps."""
        total = 0
        for bucket in self.buckets:
            weights = bucket.shard if bucket.data is None else bucket.data
            gradient = bucket.gradient if bucket.grad is None else bucket.grad
            total += sum(a.nbytes for a in (weights, gradient, *bucket.state.values()))
            if bucket.weights is not bucket.shard:
                total += bucket.weights.nbytes
        return total

    # a step

    def compute_gradients(self, work: Sequence[Work], scale: float) -> float:
        """Forward and backward of this replica's micro-batches; every `gradient` is then the step's.

        Args:
            work: pipeline.cut's; equally many on every replica, and the same on every stage.
            scale: of the loss: 1 / (targets that count on all replicas) makes it their mean.

        Returns: the loss, added up over the replicas.
        """
        self.begin_step(len(work))
        # OpenBLAS gives other bits with other numbers of threads
        threads = backend.one_blas_thread() if self.deterministic else contextlib.nullcontext()
        with threads:
            losses = self.pipeline.losses(work, scale)
        self.finish_gradients()
        return self.pipeline.total(self.dp, losses)

    def update(self, optimizer: Any, lr: float, step: int, scale: float = 1.0) -> None:
        """Let the optimizer change the weights, and give them to whoever needs them.

        Args:
            optimizer: optim.AdamW or optim.SGD. lr: learning rate. step: from 0.
            scale: what gradients are multiplied by, to clip them.
        """
        optim.apply(optimizer, self.buckets, lr, step, scale)
        self.updated()

    def updated(self) -> None:
        """The weights have been updated, and the gradients used up: give the others this rank's share."""
        self._used_up = True
        self.publish()

    # gradients

    def begin_step(self, micro_batches: int, held: bool = False) -> None:
        """Say how many micro-batches this replica will run backward.

        Args:
            held: all reductions wait for finish_gradients, and who has completed what is not counted.

        Raises:
            CupytronError: it is not the number of the other replicas and stages, which would wait for each
                other; or the last step's gradients are still there.
        """
        if not self._used_up:
            raise CupytronError(
                "the last step's gradients are still there; call update or clear_gradients before the "
                "next one, or give all micro-batches to one step"
            )
        for group, kind in ((self.dp, "replicas"), (self.pipeline.pp, "stages")):
            counts = group.all_gather(np.array([micro_batches])).tolist()
            if len(set(counts)) > 1:
                raise CupytronError(
                    f"the {kind} have {', '.join(map(str, counts))} micro-batches; give each as many"
                )
        assert not (held and self.parts_at_once), "there is a reduction after each micro-batch"
        if not self._told:
            expect_gradients(self._parameters())
        self._expected, self._held = micro_batches, held
        self._finished = dict.fromkeys(self._trees, 0)

    def open_gradient(self, bucket: Bucket) -> None:
        """Make room for a full gradient, where there is none between micro-batches."""
        if bucket.grad is None:
            while len(self._pending) >= _IN_FLIGHT:
                self._complete(*self._pending.pop(0))
            bucket.set_grad(self.context.device.xp.zeros(bucket.size, self.reduce_dtype))

    def gradient_ready(self, bucket: Bucket, who: str) -> None:
        """A micro-batch's gradient of this bucket is complete; start the reduction if it is due.

        Args:
            who: of the bucket's completers.
        """
        if self._held:
            return
        self._finished[who] += 1
        counts = {self._finished[name] for name in self.completers(bucket)}
        if self.parts_at_once or counts == {self._expected}:
            self._reduce(bucket, who)

    def _reduce(self, bucket: Bucket, who: str) -> None:
        """Start a reduction."""
        with self.context.device.range(f"reduce {bucket.name}"):
            if self.deterministic:
                handle = tree_reduce_scatter(self.dp, bucket.grad)
            elif self.stage == 0:
                handle = self.dp.all_reduce(bucket.grad, async_op=True)
            else:
                handle = self.dp.reduce_scatter(bucket.grad, async_op=True)
        if self.parts_at_once:
            bucket.set_grad(None)
        self._pending.append((bucket, who, handle))

    def _complete(self, bucket: Bucket, who: str, handle: Any) -> None:
        reduced = handle.wait()
        if self.deterministic:
            self._trees[who].add(reduced)
        elif self.stage >= 2:
            bucket.gradient += reduced
        elif self.stage == 1:
            bucket.grad[...] = 0  # the other shares are others' business
            bucket.gradient[...] = reduced

    def finish_gradients(self) -> None:
        """Wait for the reductions; afterwards every bucket's `gradient` is the whole step's.

        Raises:
            CupytronError: a layer did not take part in every micro-batch.
        """
        if self._held:
            self._held = False
            self._finished = dict.fromkeys(self._finished, self._expected)
            for bucket in reversed(self.buckets):
                for who in self.completers(bucket):
                    self._reduce(bucket, who)
        for name, count in self._finished.items():
            if count != self._expected:
                raise CupytronError(
                    f"{name}: took part in {count} of {self._expected} micro-batches; replicas can add up "
                    "the gradients of top-level layers that run in each of them only"
                )
        self._tell_of_unreached()
        self._used_up = False
        while self._pending:
            self._complete(*self._pending.pop(0))
        for bucket in self.buckets:
            if self.deterministic:
                mine, *others = (self._trees[who].take() for who in self.completers(bucket))
                for other in others:
                    mine += other
                if self.stage == 0:
                    self.dp.all_gather(mine, out=bucket.gradient)
                else:
                    bucket.gradient[...] = mine
            for part in bucket.ranges(lambda p: p.partial, bucket.owned):
                self.context.tp.all_reduce(bucket.gradient[bucket.local(part)])
            if copies := self.copies(bucket):
                copies.all_reduce(bucket.gradient)

    def _parameters(self) -> Iterator[Parameter]:
        return (segment.parameter for bucket in self.buckets for segment in bucket.segments)

    def _tell_of_unreached(self) -> None:
        """After the first step: name the parameters that no layer has given a gradient."""
        if not self._told and self.dp.rank == 0 and self.context.tp.rank == 0:
            warn_of_unreached(self._parameters(), "step")
        self._told = True

    def global_norm(self) -> float:
        """Root of the sum of squares of the whole gradient, each logical element counted once.

        Communication: one all-reduce of a float64 for each piece of each bucket, over dp (from stage 1
        on) and tp; the sums of all stages are gathered over pp.
        """
        tp = self.context.tp
        chosen = self.counts if tp.rank else None
        sums = np.array(
            [bucket.squares(chosen) for bucket in self.buckets if self.counts_here(bucket)]
        )
        if self.stage >= 1:
            self.dp.all_reduce(sums)  # others add zeros to a piece: no order of them changes a bit
        tp.all_reduce(sums)
        stages = self.pipeline.pp.gather_objects(sums.reshape(-1).tolist())
        return math.sqrt(math.fsum(itertools.chain.from_iterable(stages)))

    def counts(self, parameter: Parameter) -> bool:
        """Whether a parameter is counted here: what all tensor ranks have is counted by the first."""
        return not (parameter.whole and self.context.tp.rank)

    def counts_here(self, bucket: Bucket) -> bool:
        """Whether a bucket is counted, and written to checkpoints, here: by the first that has it."""
        copies = self.copies(bucket)
        return copies is None or copies.rank == 0

    def clear_gradients(self) -> None:
        """Set all gradients to zero, for the next step."""
        for bucket in self.buckets:
            whole = bucket.gradient if bucket.grad is None else bucket.grad
            whole[...] = 0
        self._used_up = True

    # weights

    def publish(self) -> None:
        """After an update: give the other replicas this one's share of the weights."""
        if self.stage in (1, 2):
            handles = [
                self.dp.all_gather(bucket.shard, out=bucket.data, async_op=True)
                for bucket in self.buckets
            ]
            for handle in handles:
                handle.wait()
        if self.stage == 3:
            # whatever was gathered, or kept for a backward that did not come, is old now
            for handle in self._gathers.values():
                handle.wait()
            self._gathers.clear()
            for bucket in self.buckets:
                bucket.set_data(None)

    def gather(self, bucket: Bucket) -> None:
        """Start to gather a bucket's weights, unless they are here."""
        if bucket.data is None and bucket.name not in self._gathers:
            full = self.context.device.xp.empty(bucket.size, bucket.shard.dtype)
            self._gathers[bucket.name] = self.dp.all_gather(bucket.shard, full, async_op=True)

    def open_weights(self, bucket: Bucket) -> None:
        """Have a bucket's weights here."""
        self.gather(bucket)
        if bucket.name in self._gathers:
            bucket.set_data(self._gathers.pop(bucket.name).wait())

    def close_weights(self, bucket: Bucket) -> None:
        """Let them go, under stage 3."""
        if self.stage == 3:
            bucket.set_data(None)


class BucketLayer(Wrapper):
    """A top-level layer with its bucket: weights gathered before it runs, gradients reduced after.

    While one layer runs, the weights of the next one in this direction are on their way. Which one that
    is, is guessed from the order of the model's attributes; a wrong guess costs time only.
    """

    def __init__(self, name: str, inner: Layer, bucket: Bucket, zero: Zero) -> None:
        super().__init__(inner)
        self.name = name
        self.bucket, self.zero = bucket, zero
        self.preceding: BucketLayer | None = None
        self.following: BucketLayer | None = None

    @property
    def completes(self) -> str:
        """In whose name this layer completes its bucket's gradient."""
        return self.name if self.zero.apart else self.bucket.name

    def forward(self, x: Any, stash: Stash) -> Any:
        zero = self.zero
        stash.use(self.completes)
        zero.open_weights(self.bucket)
        if self.following:
            zero.gather(self.following.bucket)
        y = self.inner.forward(x, stash)
        progress.beat()
        # the last layer's backward comes next, with the same weights
        if self.following or not stash.keeps:
            zero.close_weights(self.bucket)
        return y

    def backward(self, dy: Any, stash: Stash) -> Any:
        zero = self.zero
        if self.inner.backward_reads_weights:
            zero.open_weights(self.bucket)
        if self.preceding and self.preceding.inner.backward_reads_weights:
            zero.gather(self.preceding.bucket)
        stash.then(lambda: zero.open_gradient(self.bucket))
        dx = self.inner.backward(dy, stash)
        progress.beat()
        zero.close_weights(self.bucket)
        stash.then(lambda: self._finish(stash))
        return dx

    def _finish(self, stash: Stash) -> None:
        # a tied table's other user, or another call of this layer, may still add to the gradient
        if stash.used(self.completes):
            self.zero.gradient_ready(self.bucket, self.completes)

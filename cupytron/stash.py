"""What goes through the layers with a micro-batch: what they may know of it, and what backward needs."""

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cupytron import ops
from cupytron.layer_checks import check_gradient_shape, check_product, check_sum

if TYPE_CHECKING:
    from cupytron.layer import Layer, Parameter


@dataclass
class MicroBatch:
    """What the layers may know about the tokens that they work on.

    Attributes:
        batch_size: B, sequences; sequence_length: S, tokens of each.
        positions: (S,), place of each token in its sequence; on the host.
        step: of training, counted from 0; with first_token it addresses the dropout masks. Both may be
            arrays of shape () on a GPU.
        first_token: index of token 0 in the whole step's batch.
        training: whether dropout drops.
        seed: of the run.
        kv_cache: keys and values of earlier tokens, when generating.
        memo: what `once` remembers; micro-batches of the same shape and positions may share one.
    """

    batch_size: int
    sequence_length: int
    positions: Any = None
    step: Any = 0
    first_token: Any = 0
    training: bool = False
    seed: int = 0
    kv_cache: Any = None
    memo: dict[Any, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.positions is None:
            self.positions = np.arange(self.sequence_length)

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """make(), remembered under `key`: for tables that all layers share, such as rotary angles."""
        if key not in self.memo:
            self.memo[key] = make()
        return self.memo[key]


class Stash:
    """The values that backward needs, last in, first out; one for each micro-batch in flight.

    Args:
        defer_weight_grads: gradients of parameters wait for run_weight_grads (a schedule's W).
    """

    def __init__(self, batch: MicroBatch, defer_weight_grads: bool = False) -> None:
        self.batch = batch
        self._entries: list[tuple[Layer, tuple[Any, ...]]] = []
        self._defer = defer_weight_grads
        self._deferred: deque[tuple[Callable[[], None], tuple[Any, ...]]] = deque()
        self._remade: dict[int, tuple[_Remade, int]] = {}
        self._uses: dict[Any, int] = {}
        self._inputs: list[tuple[Layer, Any, Any]] = []

    def push(self, owner: "Layer", *arrays: Any) -> None:
        """Keep `arrays` until `owner` pops them."""
        self._entries.append((owner, tuple(self._or_remade(array) for array in arrays)))

    def pop(self, owner: "Layer") -> tuple[Any, ...]:
        """Hand back what `owner` pushed last; it is freed as soon as the layer lets go of it."""
        if not self._entries:
            raise RuntimeError(f"backward of {owner.describe()} found an empty stash")
        saved_by, arrays = self._entries.pop()
        if saved_by is not owner:
            raise RuntimeError(
                f"backward of {owner.describe()} found values saved by {saved_by.describe()}"
            )
        return tuple(a.make() if isinstance(a, _Remade.Part) else a for a in arrays)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays kept for B and for W; an array kept by two layers counts once."""
        kept: dict[int, int] = {}
        for arrays in [arrays for _, arrays in (*self._entries, *self._deferred)]:
            for a in arrays:
                for array in a.made_of.inputs if isinstance(a, _Remade.Part) else (a,):
                    if hasattr(array, "nbytes"):
                        kept[id(_root(array))] = _root(array).nbytes
        return sum(kept.values())

    @property
    def keeps(self) -> bool:
        """Whether a backward will follow."""
        return True

    @property
    def defers(self) -> bool:
        """Whether gradients of parameters wait for run_weight_grads."""
        return self._defer

    def discarding(self) -> "Stash":
        """A stash for the same batch that keeps nothing: inference, and Recompute's first forward."""
        return _DiscardingStash(self.batch)

    def fresh(self) -> "Stash":
        """An empty stash for the same batch: Recompute's second forward and its backward."""
        stash = Stash(self.batch, self._defer)
        stash._deferred = self._deferred  # W runs through the outer stash
        return stash

    @contextlib.contextmanager
    def remaking(
        self, wanted: bool, arrays: tuple[Any, ...], function: Callable[..., Any], *inputs: Any
    ) -> Iterator[None]:
        """Where layers push one of `arrays` meanwhile, keep the inputs: function(*inputs) makes them again.

        Args:
            wanted: otherwise nothing is changed.
        """
        if wanted:
            remade = _Remade(function, inputs)
            self._remade = {id(_root(array)): (remade, i) for i, array in enumerate(arrays)}
        yield
        self._remade = {}

    def _or_remade(self, array: Any) -> Any:
        found = self._remade.get(id(_root(array)))
        return array if found is None else _Remade.Part(*found, array.shape)

    def weight_grad(self, parameter: "Parameter", x: Any, dy: Any) -> None:
        """parameter.grad += x.T @ dy, now or at run_weight_grads."""
        check_product(parameter, x, dy)
        # a shard's padding rows come last, and get no gradient
        self.then(lambda: ops.add_product(parameter.grad[: x.shape[1]], x, dy), x, dy)

    def bias_grad(self, parameter: "Parameter", dy: Any) -> None:
        """parameter.grad += the sum of dy's rows, now or at run_weight_grads."""
        check_sum(parameter, dy)
        self.then(lambda: ops.add_to(parameter.grad, ops.sum_rows(dy)), dy)

    def add_grad(self, parameter: "Parameter", gradient: Any) -> None:
        """parameter.grad += gradient, of the same shape, now or at run_weight_grads."""
        check_gradient_shape(parameter, gradient)
        self.then(lambda: ops.add_to(parameter.grad, gradient), gradient)

    def then(self, work: Callable[[], Any], *arrays: Any) -> None:
        """Do something for the parameters' gradients: now, or in its turn at run_weight_grads.

        Args:
            arrays: what the work keeps in memory until then.
        """
        if self._defer:
            self._deferred.append((work, arrays))
        else:
            work()

    def use(self, key: Any) -> None:
        """Count a forward of something that several layers, or several calls of one, may share."""
        self._uses[key] = self._uses.get(key, 0) + 1

    def used(self, key: Any) -> bool:
        """Count its backward; whether that was the last one of this micro-batch."""
        self._uses[key] -= 1
        return self._uses[key] == 0

    def note_input(self, layer: "Layer", x: Any) -> None:
        """Remember shape and dtype of a layer's x, which its gradient will have."""
        self._inputs.append((layer, x.shape, x.dtype))

    def noted_input(self, layer: "Layer") -> tuple[Any, Any] | None:
        """Hand back what was noted last, if it is this layer's."""
        if self._inputs and self._inputs[-1][0] is layer:
            return self._inputs.pop()[1:]
        return None

    def run_weight_grads(self) -> None:
        """Do what was put off, in the order in which backward met it; frees as it goes."""
        while self._deferred:
            work, _ = self._deferred.popleft()
            work()


class _Remade:
    """Arrays that are made again in backward, when the first of them is asked for."""

    def __init__(self, function: Callable[..., Any], inputs: tuple[Any, ...]) -> None:
        self.function, self.inputs = function, inputs
        self.arrays: tuple[Any, ...] | None = None

    class Part(NamedTuple):
        """One of them, in the place of the array."""

        made_of: "_Remade"
        number: int
        shape: tuple[int, ...]

        def make(self) -> Any:
            remade = self.made_of
            if remade.arrays is None:
                remade.arrays, remade.inputs = remade.function(*remade.inputs), ()
            return remade.arrays[self.number].reshape(self.shape)


def _root(array: Any) -> Any:
    """The array that a view is a view of: as long as the view is kept, so is all of that."""
    base = getattr(array, "base", None)
    return base if hasattr(base, "nbytes") else array


class _DiscardingStash(Stash):
    @property
    def keeps(self) -> bool:
        return False

    def push(self, owner: "Layer", *arrays: Any) -> None:
        pass

    def use(self, key: Any) -> None:
        pass

    def note_input(self, layer: "Layer", x: Any) -> None:
        pass

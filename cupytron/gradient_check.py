"""Is a layer's backward the derivative of its forward? Directional derivatives in float64.

The number that is differentiated is sum(y * dy), with a random dy. For x and for each parameter alone, its
slope along random directions is compared with central differences. If one is wrong, gradient_kinds.py looks
for the kind of mistake. A Chain that is wrong is checked again layer by layer: the report names the layer.
"""

import copy
import math
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np

from cupytron import ops
from cupytron.errors import CupytronError
from cupytron.gradient_kinds import kind_of
from cupytron.layer import Chain, Layer
from cupytron.layer_checks import check_input_gradient, check_output
from cupytron.stash import MicroBatch, Stash

TOLERANCE = 1e-6
# Where forward bends sharply a step must be short. Where it is nearly straight, rounding asks for a long
# one. A gradient that is right agrees with one of them.
LENGTHS = (1e-5, 1e-4, 1e-6, 1e-7)
DIRECTIONS = 1  # for each tensor
MOST_EXPLAINED = 4  # tensors of a layer, the worst
MORE_DIRECTIONS = 6  # where one is wrong
MOST_ENTRIES = 64  # of a wrong tensor, looked at one by one
ROUNDING = 8 * np.finfo(np.float64).eps  # of the sum of |y * dy|
# Parameters are moved so far off their initial values, since biases of zero would hide mistakes.
MOVE = 0.1
STEP, FIRST_TOKEN = 2, 77  # addresses of dropout masks that are not zero


class WrongGradient(CupytronError):
    """A layer's backward is not the derivative of its forward."""


class Finding(NamedTuple):
    """The mistake in one tensor's gradient.

    Attributes:
        tensor: "x", or a parameter's name; in a chain with the layer's.
        error: relative to the gradient's norm; 1 for a mistake without a size.
        kind: a word, such as "factor".
        text: a sentence about the mistake.
        entry: the worst of the entries that were looked at; None if none was.
        given: the value from backward there.
        wanted: the value from finite differences there.
    """

    tensor: str
    error: float
    kind: str
    text: str
    entry: tuple[int, ...] | None = None
    given: float = math.nan
    wanted: float = math.nan

    def __str__(self) -> str:
        where = ""
        if self.entry is not None:
            at = ", ".join(map(str, self.entry))
            where = f" (at [{at}] it gives {self.given:.6g}, finite differences {self.wanted:.6g})"
        return f"{self.tensor}: {self.text}{where}"


class Report(NamedTuple):
    """The result of check_gradient.

    Attributes:
        layer: class and name.
        errors: the relative error of each tensor's gradient, by name.
        findings: the mistakes, the worst first.
    """

    layer: str
    errors: dict[str, float]
    findings: list[Finding]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.findings

    @property
    def worst(self) -> Finding | None:
        """The worst finding."""
        return self.findings[0] if self.findings else None

    def raise_if_wrong(self) -> None:
        """Raise WrongGradient with this report, unless it is ok."""
        if not self.ok:
            raise WrongGradient(str(self))

    def __str__(self) -> str:
        if self.ok:
            largest = max(self.errors.values(), default=0.0)
            count = f"{len(self.errors)} gradient{'s' * (len(self.errors) != 1)}"
            return f"{self.layer}: backward is right, {count}, largest error {largest:.0e}"
        lines = "".join(f"\n  {finding}" for finding in self.findings)
        return f"{self.layer}: backward is not the derivative of forward{lines}"


def check_gradient(
    layer: Layer,
    shape: tuple[int, ...],
    *,
    vocab_size: int | None = None,
    batch_size: int | None = None,
    training: bool = True,
    seed: int = 0,
    tolerance: float = TOLERANCE,
) -> Report:
    """Compare the gradients of a layer's backward with finite differences of its forward.

    The layer is copied, and stays as it is. The copy gets its initial values, moved a little, in float64.

    Args:
        layer: any layer, or a whole model. If x is ids and it has a `loss`, that is checked, too.
        shape: of x: (T, D), (B, S, D), or (T,) for ids.
        vocab_size: x is ids, integers below it; None: x is real numbers.
        batch_size: sequences in x, whose T tokens it divides; None: B of a shape (B, S, D), or else 1.
        training: whether dropout drops; the masks are the same in each call.
        seed: of weights, x, dy and masks.
        tolerance: largest error of a gradient, relative to its norm.

    Raises:
        CupytronError: the arguments do not fit each other or the layer's table, or a layer returned an
            array of another shape.
    """
    _check_arguments(layer, shape, vocab_size, batch_size, seed)
    sequences = batch_size or (shape[0] if len(shape) == 3 else 1)
    tokens = math.prod(shape[:2]) if len(shape) == 3 else shape[0]
    if tokens % sequences:
        raise CupytronError(
            f"batch_size={sequences}: does not divide the {tokens} tokens of shape {shape}"
        )
    batch = MicroBatch(
        sequences,
        tokens // sequences,
        step=STEP,
        first_token=FIRST_TOKEN,
        training=training,
        seed=seed,
    )
    rng = np.random.default_rng([seed, 6])
    layer = copy.deepcopy(layer)
    layer.materialize(seed, np.float64)
    if isinstance(layer, Chain):
        layer.unwatch()  # the report names the parameters without a gradient
    for _, parameter in layer.named_parameters():
        parameter.data += MOVE * rng.normal(size=parameter.data.shape)
    x = rng.normal(size=shape) if vocab_size is None else rng.integers(0, vocab_size, shape)
    if vocab_size is not None:
        try:
            layer.forward(x, Stash(batch).discarding())
        except IndexError as error:
            raise CupytronError(
                f"vocab_size={vocab_size}: {layer.describe()} has no row for an id below it ({error}); "
                "give the size that the layer was made with"
            ) from error
    is_chain = isinstance(layer, Chain)
    if not is_chain:
        _require_arrays(layer, x, batch)
    errors, findings = _check(layer, x, batch, rng, tolerance, explain=not is_chain)
    if findings and isinstance(layer, Chain):
        findings = _by_layer(layer, x, batch, rng, tolerance)
        findings = findings or _check(layer, x, batch, rng, tolerance)[1]
    if vocab_size is not None and hasattr(layer, "loss"):
        loss = _Loss(layer, rng.integers(0, vocab_size, tokens), sequences)
        logits = layer.forward(x, Stash(batch).discarding())
        more, wrong = _check(loss, logits, batch, rng, tolerance)
        errors["logits, of loss"] = more["x"]
        findings += [finding._replace(tensor="logits, of loss") for finding in wrong]
    return Report(layer.describe(), errors, sorted(findings, key=lambda f: -f.error))


def _check_arguments(
    layer: Any, shape: Any, vocab_size: int | None, batch_size: int | None, seed: Any
) -> None:
    if not isinstance(layer, Layer):
        of = layer.__name__ if isinstance(layer, type) else type(layer).__name__
        made = "; give an object of the class" if isinstance(layer, type) else ""
        raise CupytronError(f"layer: {of} is no Layer{made}")
    sizes = shape if isinstance(shape, tuple | list) else ()
    if not (1 <= len(sizes) <= 3 and all(_is_whole(n, 1) for n in sizes)):
        raise CupytronError(
            f"shape={shape!r}: must be that of x, one to three whole numbers from 1, such as (T, D)"
        )
    for name, value in (("vocab_size", vocab_size), ("batch_size", batch_size)):
        if value is not None and not _is_whole(value, 1):
            raise CupytronError(f"{name}={value!r}: must be a whole number from 1")
    if not _is_whole(seed, 0):
        raise CupytronError(f"seed={seed!r}: must be a whole number from 0")


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, Integral) and int(value) >= least


def _require_arrays(layer: Layer, x: Any, batch: MicroBatch) -> None:
    """Refuse what forward and backward of a lone layer return where a Chain would refuse it.

    An x of three axes is no layer's in a Chain, so its rows are not counted. A dx that is no array, or has
    another shape, becomes a finding.
    """
    stash = Stash(batch)
    y = layer.forward(x.copy(), stash)
    check_output(layer, x, y, rows=x.ndim < 3)
    dx = layer.backward(np.ones_like(y), stash)
    if getattr(dx, "shape", None) == x.shape:
        check_input_gradient(layer, x.shape, x.dtype, dx)


class Case:
    """A layer with one x, and its derivatives along directions.

    Attributes:
        tensors: x, if it has a gradient, and the parameters' arrays, by name.
        dy: the gradient of y.
    """

    def __init__(self, layer: Any, x: Any, batch: MicroBatch, rng: np.random.Generator) -> None:
        self.layer, self.x, self.batch, self.rng = layer, x.copy(), batch, rng
        self.parameters = dict(layer.named_parameters())
        self.tensors = {name: p.data for name, p in self.parameters.items()}
        if x.dtype.kind == "f":
            self.tensors = {"x": self.x, **self.tensors}
        self.y = self.forward()
        self.dy = rng.normal(size=self.y.shape)

    def forward(self) -> Any:
        """y, of a copy of x."""
        return self.layer.forward(self.x.copy(), Stash(self.batch).discarding())

    def gradients(self, dy: Any, again: bool = False) -> dict[str, Any]:
        """The gradients that backward gives, by tensor.

        Args:
            again: add to the parameters' gradients of the last call.
        """
        for parameter in self.parameters.values():
            if not again:
                parameter.grad[...] = 0
        stash = Stash(self.batch)
        self.layer.forward(self.x.copy(), stash)
        dx = self.layer.backward(dy.copy(), stash)
        found = {name: parameter.grad.copy() for name, parameter in self.parameters.items()}
        return {"x": dx, **found} if "x" in self.tensors else found

    def slope(self, tensor: str, direction: Any, dy: Any, length: float) -> tuple[float, float]:
        """The derivative along a direction, and how far two estimates of it are apart."""
        array = self.tensors[tensor]
        before = array.copy()

        def at(t: float) -> float:
            array[...] = before + t * direction
            return float((self.forward() * dy).sum())

        # Richardson's combination of two central differences: error O(length^4)
        fine, coarse = ((at(h) - at(-h)) / (2 * h) for h in (length, 2 * length))
        array[...] = before
        return (4 * fine - coarse) / 3, abs(fine - coarse)

    def best_slope(self, tensor: str, direction: Any, dy: Any) -> float:
        """The derivative along a direction, with the step whose two estimates agree best."""
        size = float(abs(self.y * dy).sum())
        found = []
        for length in LENGTHS:
            found.append(self.slope(tensor, direction, dy, length))
            value, apart = found[-1]
            if apart <= TOLERANCE * abs(value) + ROUNDING * size / length:
                break
        return min(found, key=lambda pair: pair[1])[0]

    def error(self, tensor: str, gradient: Any) -> float:
        """The error of a gradient along random directions, relative to its norm."""
        array = self.tensors[tensor]
        directions = [self.rng.normal(size=array.shape) for _ in range(DIRECTIONS)]
        size = float(abs(self.y * self.dy).sum())
        least = math.inf
        for length in LENGTHS:
            wants = [self.slope(tensor, v, self.dy, length)[0] for v in directions]
            gives = [float((gradient * v).sum()) for v in directions]
            scale = max(float(np.linalg.norm(gradient)), *map(abs, wants), 1e-300)
            apart = max(abs(a - b) for a, b in zip(gives, wants, strict=True))
            if math.isnan(apart):
                return math.inf
            if apart > TOLERANCE * scale:  # a gradient of zero is known up to rounding only
                apart = max(0.0, apart - ROUNDING * size / length)
            least = min(least, apart / scale)
            if least < TOLERANCE / 10:
                break
        return least


def _check(
    layer: Any,
    x: Any,
    batch: MicroBatch,
    rng: np.random.Generator,
    tolerance: float,
    explain: bool = True,
) -> tuple[dict[str, float], list[Finding]]:
    """The errors of a layer's gradients, and the findings.

    Args:
        explain: look for the kind of mistake; otherwise it is "other".
    """
    case = Case(layer, x, batch, rng)
    if (case.forward() != case.y).any():
        text = (
            "forward gives another y when it is called again; draw random numbers from seed, step and "
            "first_token of stash.batch"
        )
        return {"x": math.nan}, [Finding("y", 1.0, "random", text)]
    findings, wrong = list(_manners(case)), []
    if "x" in case.tensors and _no_gradient(case):
        text = "backward returned no array; return the gradient of x"
        return {"x": math.inf}, [Finding("x", 1.0, "nothing", text)]
    gradients = case.gradients(case.dy)
    twice = case.gradients(case.dy, again=True)
    errors: dict[str, float] = {}
    for tensor, gradient in gradients.items():
        if gradient.shape != case.tensors[tensor].shape:
            text = (
                f"its gradient has shape {gradient.shape}, its own is {case.tensors[tensor].shape}"
            )
            findings.append(Finding(tensor, 1.0, "shape", text))
            errors[tensor] = math.inf
            continue
        errors[tensor] = case.error(tensor, gradient)
        if errors[tensor] > tolerance:
            wrong.append(Finding(tensor, errors[tensor], "other", "its gradient is wrong"))
        elif tensor != "x" and not np.allclose(twice[tensor], 2 * gradient, rtol=1e-6, atol=1e-9):
            text = (
                "backward overwrites its gradient; add to it, since a step has several micro-batches, and "
                "several layers may share it"
            )
            findings.append(Finding(tensor, 1.0, "overwritten", text))
    wrong.sort(key=lambda finding: -finding.error)
    if explain:
        first, others = wrong[:MOST_EXPLAINED], wrong[MOST_EXPLAINED:]
        wrong = [_explained(case, finding, gradients[finding.tensor]) for finding in first] + others
    return errors, findings + wrong


def _manners(case: Case) -> Any:
    """The rules that forward and backward break, apart from wrong numbers."""
    stash, x, dy = Stash(case.batch), case.x.copy(), case.dy.copy()
    case.layer.forward(x, stash)
    if (x != case.x).any():
        yield Finding("x", 1.0, "x changed", "forward writes over its x; copy it first")
    case.layer.backward(dy, stash)
    if (dy != case.dy).any():
        yield Finding("x", 1.0, "dy changed", "backward writes over its dy; copy it first")
    if len(stash):
        text = f"backward leaves {len(stash)} entries in the stash; pop all that forward pushes"
        yield Finding("x", 1.0, "stash", text)


def _no_gradient(case: Case) -> bool:
    stash = Stash(case.batch)
    case.layer.forward(case.x.copy(), stash)
    return not hasattr(case.layer.backward(case.dy.copy(), stash), "shape")


def _explained(case: Case, finding: Finding, gradient: Any) -> Finding:
    """With the worst entry of a wrong gradient, and with the kind of mistake that it looks like."""
    size, rng, tensor = gradient.size, case.rng, finding.tensor
    chosen = np.arange(size) if size <= MOST_ENTRIES else rng.choice(size, MOST_ENTRIES, False)
    entries = [tuple(int(i) for i in np.unravel_index(n, gradient.shape)) for n in chosen]
    wants = np.zeros(len(entries))
    for i, entry in enumerate(entries):
        direction = np.zeros(gradient.shape)
        direction[entry] = 1
        wants[i] = case.best_slope(tensor, direction, case.dy)
    gives = np.array([gradient[entry] for entry in entries])
    worst = int(np.argmax(np.abs(gives - wants)))
    directions = [rng.normal(size=gradient.shape) for _ in range(MORE_DIRECTIONS)]
    slopes = np.array([case.best_slope(tensor, v, case.dy) for v in directions])
    kind, text = kind_of(case, tensor, gradient, directions, slopes, gives, wants)
    numbers = entries[worst], float(gives[worst]), float(wants[worst])
    return Finding(tensor, finding.error, kind, text, *numbers)


def _by_layer(
    chain: Chain, x: Any, batch: MicroBatch, rng: np.random.Generator, tolerance: float
) -> list[Finding]:
    """The findings of each layer of a chain, checked alone with the x that the layers before it make."""
    findings: list[Finding] = []
    for layer in chain.chain().values():
        _, wrong = _check(layer, x, batch, rng, tolerance, explain=not isinstance(layer, Chain))
        if wrong and isinstance(layer, Chain):
            wrong = _by_layer(layer, x, batch, rng, tolerance)
            wrong = wrong or _check(layer, x, batch, rng, tolerance)[1]
        findings += [f._replace(tensor=f"{layer.describe()}, {f.tensor}") for f in wrong]
        x = layer.forward(x.copy(), Stash(batch).discarding())
    return findings


class _Loss(Layer):
    """A model's loss as a layer: logits (T, V) -> (1, 1). Some targets do not count."""

    def __init__(self, model: Any, targets: Any, sequences: int) -> None:
        self._loss, self.targets = model.loss, targets
        self.targets[1 :: max(3, len(targets) // 4)] = ops.IGNORE

    def forward(self, x: Any, stash: Stash) -> Any:
        stash.push(self, x)
        return np.array([[self._loss(x.copy(), self.targets, 0.1)]])

    def backward(self, dy: Any, stash: Stash) -> Any:
        (logits,) = stash.pop(self)
        gradient = logits.copy()
        self._loss(gradient, self.targets, 0.1)
        return gradient * dy

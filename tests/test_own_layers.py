"""Layers of a user's own: mistakes of shapes and gradients are told under the name of the layer."""

import warnings

import numpy as np
import pytest

from cupytron import AdamW, ParallelContext, Pipeline, Zero, cut
from cupytron.comm import run_ranks
from cupytron.layer import Chain, Layer, Parameter, constant, normal
from cupytron.layer_checks import NoGradient, ShapeError
from cupytron.nn import Embedding, Head, LayerNorm, Linear
from cupytron.stash import MicroBatch, Stash

B, S, D, V = 2, 5, 6, 7
IDS = np.arange(B * S) % V


class Scale(Layer):
    """y = x * weight + bias. What it returns and how it adds gradients is changed by each test."""

    def __init__(self):
        self.weight = Parameter((D,), constant(1.0))
        self.bias = Parameter((D,), constant(0.0))

    def forward(self, x, stash):
        stash.push(self, x)
        return x * self.weight.data + self.bias.data

    def backward(self, dy, stash):
        (x,) = stash.pop(self)
        self.add(dy, x, stash)
        return dy * self.weight.data

    def add(self, dy, x, stash):
        stash.add_grad(self.weight, (dy * x).sum(axis=0))
        stash.bias_grad(self.bias, dy)


class Model(Chain):
    def __init__(self, own=None):
        self.embedding = Embedding(V, D)
        self.own = own or Scale()
        self.up = Linear(D, D)
        self.norm = LayerNorm(D)
        self.head = Head(Parameter((V, D), normal(0.1)))

    def loss(self, logits, targets, scale):
        return self.head.loss(logits, targets, scale)


def step(own, dtype=np.float32, defer=False):
    model = Model(own)
    model.materialize(1, dtype)
    stash = Stash(MicroBatch(B, S, training=True), defer_weight_grads=defer)
    logits = model.forward(IDS, stash)
    model.loss(logits, IDS, 1.0)
    model.backward(logits, stash)
    return model


def changed(**methods):
    return type("Own", (Scale,), methods)()


OUTPUTS = {
    "nothing": (lambda y: None, r"forward returned None; return one array"),
    "a tuple": (lambda y: (y, y), r"forward returned a tuple; return one array"),
    "sequences": (lambda y: y.reshape(B, S, D), r"forward returned shape \(2, 5, 6\) .* \(10, 6\)"),
    "too few": (lambda y: y[:-1], r"forward returned shape \(9, 6\) for x of shape \(10, 6\)"),
    "float64": (lambda y: y.astype(np.float64), r"forward returned float64 for x of float32"),
    "another width": (
        lambda y: y[:, :4],
        r"Linear up: takes 6 features and was given 4; Linear up was given its x, of shape \(10, 4\), "
        "by Own own$",
    ),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_a_layer_that_returns_something_else_is_named(kind):
    change, message = OUTPUTS[kind]
    own = changed(forward=lambda self, x, stash: change(Scale.forward(self, x, stash)))
    with pytest.raises(ShapeError, match=message) as caught:
        step(own)
    assert "Own own" in str(caught.value) and "parallel" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda dx: None, r"backward returned None; .* shape \(10, 6\)"),
        (lambda dx: dx[0], r"backward returned shape \(6,\); the gradient of x .* \(10, 6\)"),
        (lambda dx: dx[:, :1], r"backward returned shape \(10, 1\)"),
        (lambda dx: dx.astype(np.float64), r"backward returned float64 for x of float32"),
    ],
)
def test_a_layer_whose_gradient_of_x_is_no_such_thing_is_named(change, message):
    own = changed(backward=lambda self, dy, stash: change(Scale.backward(self, dy, stash)))
    with pytest.raises(ShapeError, match=f"Own own: {message}"):
        step(own)


def test_a_layer_that_fails_on_what_another_gave_it_tells_who_did():
    class Narrow(Linear):
        def check_width(self, x, weight):
            pass

    model = Model()
    model.up = Narrow(D, D + 2)
    model.materialize(1)
    with pytest.raises(ValueError, match="broadcast") as caught:
        model.forward(IDS, Stash(MicroBatch(B, S)))
    (note,) = caught.value.__notes__
    assert note == "LayerNorm norm was given its x, of shape (10, 8), by Narrow up"


def test_a_layer_whose_rows_are_no_tokens_may_say_so():
    class Last(Scale):
        """The last token of each sequence."""

        row_for_row = False

        def forward(self, x, stash):
            return super().forward(x, stash).reshape(B, S, D)[:, -1]

        def backward(self, dy, stash):
            whole = np.zeros((B, S, D), dy.dtype)
            whole[:, -1] = dy
            return super().backward(whole.reshape(-1, D), stash)

    model = Model(Last())
    model.materialize(1)
    stash = Stash(MicroBatch(B, S))
    logits = model.forward(IDS, stash)
    assert logits.shape == (B, V)
    model.backward(logits, stash)


@pytest.mark.parametrize("method", ["forward", "backward"])
def test_a_missing_method_is_told_with_what_to_write(method):
    class Own(Layer):
        def forward(self, x, stash):
            return x.copy()

        def backward(self, dy, stash):
            return dy.copy()

    delattr(Own, method)
    with pytest.raises(ValueError, match=f"Own own: has no {method}; write {method}"):
        step(Own())


@pytest.mark.parametrize("defer", [False, True])
@pytest.mark.parametrize(
    ("add", "message"),
    [
        (lambda s, dy, x, k: k.add_grad(s.weight, (dy * x).sum()), r"own.weight: .* shape \(\);"),
        (lambda s, dy, x, k: k.add_grad(s.weight, 0.5), "own.weight: .* given as a float;"),
        (
            lambda s, dy, x, k: k.add_grad(s.weight, dy[:1]),
            r"own.weight: .* shape \(1, 6\); .*\(6,\)",
        ),
        (
            lambda s, dy, x, k: k.bias_grad(s.bias, dy[:, :1]),
            r"own.bias: .* dy \(10, 1\); .* \(6,\)",
        ),
        (
            lambda s, dy, x, k: k.weight_grad(s.bias, x, dy),
            r"own.bias: .* \(10, 6\) and dy \(10, 6\)",
        ),
    ],
)
def test_gradients_of_another_shape_are_refused_where_they_are_added(add, message, defer):
    own = changed(add=lambda self, dy, x, stash: add(self, dy, x, stash))
    with pytest.raises(ShapeError, match=message) as caught:
        step(own, defer=defer)
    frames = [entry.name for entry in caught.traceback]
    assert "backward" in frames and "run_weight_grads" not in frames


@pytest.mark.parametrize(("x", "dy"), [((10, 3), (10, 4)), ((10, 6), (10, 1)), ((9, 6), (10, 4))])
def test_products_of_another_shape_are_refused(x, dy):
    """A narrow x would train some rows only, and a narrow dy would be stretched."""
    layer = Linear(6, 4)
    layer.materialize(1)
    with pytest.raises(ShapeError, match=r"weight: weight_grad .* \(6, 4\)"):
        Stash(MicroBatch(B, S)).weight_grad(layer.weight, np.zeros(x), np.zeros(dy))
    assert not layer.weight.grad.any()


def replace_grad(self, dy, x, stash):
    self.weight.grad = (dy * x).sum(axis=0)


def test_a_gradient_that_is_replaced_is_refused_and_one_that_is_added_to_in_place_is_not():
    with pytest.raises(ValueError, match=r"own.weight.grad: cannot be replaced, .*add_grad"):
        step(changed(add=replace_grad))

    def in_place(self, dy, x, stash):
        self.weight.grad += (dy * x).sum(axis=0)
        self.bias.grad += dy.sum(axis=0)

    model, right = step(changed(add=in_place), np.float64), step(Scale(), np.float64)
    np.testing.assert_allclose(model.own.weight.grad, right.own.weight.grad, rtol=1e-12)


# parameters that get nothing


def train(world, own, pp=1, stage=0, schedule="1f1b", counts=None, deterministic=False):
    context, model = ParallelContext(pp=pp, world=world), Model(own())
    pipeline = Pipeline(model, context.pp, schedule=schedule, counts=counts)
    zero = Zero(model, context, stage, deterministic, pipeline=pipeline)
    optimizer = AdamW()
    zero.materialize(1, "float64", optimizer.STATE)
    ids = np.arange(4 * S).reshape(4, S) % (V - 1)
    for number in range(2):
        work = cut(ids, ids, 1, step=number)[context.dp.rank :: context.dp.size]
        zero.compute_gradients(work, 1 / ids.size)
        zero.update(optimizer, 0.1, number)


def forgetful():
    return changed(add=lambda self, dy, x, stash: stash.bias_grad(self.bias, dy))


MESHES = [
    (1, {}),
    (2, {"stage": 1}),
    (2, {"stage": 3}),
    (2, {"deterministic": True}),
    (2, {"pp": 2}),
    (2, {"pp": 2, "schedule": "zb-h1"}),
    (2, {"pp": 2, "schedule": "interleaved", "counts": [1, 1, 1, 2]}),
]


@pytest.mark.parametrize(("ranks", "mesh"), MESHES)
def test_a_parameter_that_got_nothing_is_named_once_after_the_first_step(ranks, mesh):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run_ranks(ranks, lambda world: train(world, forgetful, **mesh))
    (warning,) = caught
    assert warning.category is NoGradient
    assert str(warning.message).startswith("the first step gave no gradient to own.weight, so")


@pytest.mark.parametrize(("ranks", "mesh"), MESHES)
def test_no_parameter_is_named_where_all_got_something(ranks, mesh):
    """Though some rows of the table got zeros."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run_ranks(ranks, lambda world: train(world, Scale, **mesh))


def test_in_a_loop_without_zero_it_is_named_after_the_first_backward():
    with pytest.warns(NoGradient, match="the first backward gave no gradient to own.weight, so"):
        model = step(forgetful())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stash = Stash(MicroBatch(B, S))
        model.backward(model.forward(IDS, stash), stash)  # once is enough
        step(Scale())
        step(forgetful(), defer=True)  # not before they have been run


def test_zeros_are_a_gradient_too():
    zeros = changed(
        add=lambda self, dy, x, k: [k.add_grad(p, np.zeros(D)) for _, p in self.parts()]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(zeros)

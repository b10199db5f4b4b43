"""check_gradient: what is right passes, and twelve planted mistakes are each named."""

import numpy as np
import pytest

import cupytron
from cupytron import nn, ops
from cupytron.gradient_check import WrongGradient
from cupytron.layer import Chain, Layer, Parameter, constant, normal

B, S, D, V = 3, 4, 6, 11


def sequences(x, stash):
    return x.reshape(stash.batch.batch_size, -1, x.shape[1])


class Right(Layer):
    """y = x @ weight + bias."""

    def __init__(self):
        self.weight = Parameter((D, D), normal(1.0))
        self.bias = Parameter((D,), constant(0.0))

    def forward(self, x, stash):
        stash.push(self, x)
        return x @ self.weight.data + self.bias.data

    def backward(self, dy, stash):
        (x,) = stash.pop(self)
        self.add(x, dy, stash)
        return dy @ self.weight.data.T

    def add(self, x, dy, stash):
        stash.weight_grad(self.weight, x, dy)
        stash.bias_grad(self.bias, dy)


class MissingSum(Right):
    def add(self, x, dy, stash):
        stash.weight_grad(self.weight, x, dy)
        stash.add_grad(self.bias, sequences(dy, stash).sum(axis=1)[0])


class MissingSumOverTokens(Right):
    def add(self, x, dy, stash):
        stash.add_grad(self.weight, np.outer(x[0], dy[0]))
        stash.bias_grad(self.bias, dy)


class Mean(Right):
    def add(self, x, dy, stash):
        stash.weight_grad(self.weight, x, dy)
        stash.add_grad(self.bias, dy.mean(axis=0))


class Transposed(Right):
    def add(self, x, dy, stash):
        stash.weight_grad(self.weight, dy, x)
        stash.bias_grad(self.bias, dy)


class Sign(Right):
    def backward(self, dy, stash):
        return -super().backward(dy, stash)


class NoBias(Right):
    def add(self, x, dy, stash):
        stash.weight_grad(self.weight, x, dy)


class Overwritten(Right):
    def add(self, x, dy, stash):
        stash.weight_grad(self.weight, x, dy)
        self.bias.grad[...] = dy.sum(axis=0)


class Nothing(Right):
    def backward(self, dy, stash):
        stash.pop(self)
        return np.zeros_like(dy)


class Memory(Layer):
    """m[t] = x[t] + m[t - 1] / 2; backward has 1 / 3."""

    def forward(self, x, stash):
        m = sequences(x, stash).copy()
        for t in range(1, m.shape[1]):
            m[:, t] += m[:, t - 1] / 2
        return m.reshape(x.shape)

    def backward(self, dm, stash):
        dx = sequences(dm, stash).copy()
        for t in reversed(range(dx.shape[1] - 1)):
            dx[:, t] += dx[:, t + 1] / 3
        return dx.reshape(dm.shape)


class Residual(Right):
    """y = x + x @ weight + bias; backward drops dy itself."""

    def forward(self, x, stash):
        return x + super().forward(x, stash)


class Tanh(Layer):
    """y = tanh(x); backward has no derivative."""

    def forward(self, x, stash):
        return np.tanh(x)

    def backward(self, dy, stash):
        return dy.copy()


class Square(Layer):
    """y = x^2; backward takes y for x."""

    def forward(self, x, stash):
        y = x * x
        stash.push(self, y)
        return y

    def backward(self, dy, stash):
        (y,) = stash.pop(self)
        return 2 * y * dy


class WrongSaved(Right):
    """The product's gradient with y in the place of x."""

    def forward(self, x, stash):
        y = x @ self.weight.data + self.bias.data
        stash.push(self, y)
        return y


class Mask(Layer):
    """Every second feature is dropped, the others doubled; backward doubles all."""

    def forward(self, x, stash):
        return x * (np.arange(D) % 2) * 2

    def backward(self, dy, stash):
        return dy * 2


class Centred(Layer):
    """x less the mean of each token; backward has the mean of each feature."""

    def forward(self, x, stash):
        return x - x.mean(axis=1, keepdims=True)

    def backward(self, dy, stash):
        return dy - dy.mean(axis=0, keepdims=True)


PLANTED = {
    "a factor from token to token": (Memory, "x", "between tokens", "2/3 times"),
    "a sum over sequences": (MissingSum, "bias", "missing sum", "over sequences is missing"),
    "a sum over tokens": (MissingSumOverTokens, "weight", "missing sum", "over tokens is missing"),
    "a mean for a sum": (Mean, "bias", "factor", "1/12 of what it should be: a mean over tokens"),
    "a residual": (Residual, "x", "residual", "a residual is dropped"),
    "a transpose": (Transposed, "weight", "transpose", "is transposed"),
    "a sign": (Sign, "x", "sign", "wrong sign"),
    "a bias without": (NoBias, "bias", "nothing", "no gradient at all"),
    "overwritten": (Overwritten, "bias", "overwritten", "overwrites its gradient; add to it"),
    "an activation": (Tanh, "x", "derivative", "derivative of an activation is missing"),
    "a saved array": (Square, "x", "elementwise", "a wrong array in the stash"),
    "a saved array of a product": (
        WrongSaved,
        "weight",
        "other",
        "compare the arrays that forward pushes",
    ),
    "a mask": (Mask, "x", "mask", "a mask .* is missing"),
    "an axis": (Centred, "x", "wrong axis", "mixes tokens that forward keeps apart"),
    "nothing": (Nothing, "x", "nothing", "no gradient at all"),
}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_mistake_is_named(name, seed):
    kind, tensor, word, text = PLANTED[name]
    report = cupytron.check_gradient(kind(), (B * S, D), batch_size=B, seed=seed)
    assert not report.ok
    found = {finding.tensor: finding for finding in report.findings}
    assert found[tensor].kind == word
    if kind is not Nothing:
        assert list(found) == [tensor]  # and nothing else is blamed
    else:
        assert set(found) == {"x", "weight", "bias"}
    with pytest.raises(WrongGradient, match=f"{kind.__name__}: .*\n(.*\n)*  {tensor}: .*{text}"):
        report.raise_if_wrong()
    if word != "overwritten":
        given, wanted = found[tensor].given, found[tensor].wanted
        assert f"it gives {given:.6g}, finite differences {wanted:.6g}" in str(report)


class Model(Chain):
    def __init__(self, own, tied=False, loss=None):
        self.embedding = nn.Embedding(V, D, std=1.0)
        self.first = nn.Linear(D, D, std=0.5)
        self.own = own
        self.second = nn.Linear(D, D, std=0.5)
        self.head = nn.Head(self.embedding.weight if tied else Parameter((V, D), normal(1.0)))
        self.given = loss or self.head.loss

    def loss(self, logits, targets, scale):
        return self.given(logits, targets, scale)


@pytest.mark.parametrize("tied", [False, True])
def test_a_whole_model_that_is_right_passes(tied):
    report = cupytron.check_gradient(Model(Right(), tied), (B * S,), vocab_size=V, batch_size=B)
    assert report.ok and report.worst is None
    assert {"embedding.weight", "own.bias", "logits, of loss"} <= set(report.errors)
    assert "Model: backward is right" in str(report)
    report.raise_if_wrong()


@pytest.mark.parametrize("name", ["a sign", "a factor from token to token", "an axis", "nothing"])
def test_in_a_model_the_layer_is_named_and_those_below_it_are_not(name):
    kind, tensor, word, _ = PLANTED[name]
    report = cupytron.check_gradient(Model(kind()), (B * S,), vocab_size=V, batch_size=B)
    assert (f"{kind.__name__} own, {tensor}", word) in [(f.tensor, f.kind) for f in report.findings]
    assert all(f.tensor.startswith(kind.__name__) for f in report.findings)


def test_a_wrong_loss_is_named():
    def loss(logits, targets, scale):
        value = ops.cross_entropy(logits, targets, scale)
        logits *= 2
        return value

    report = cupytron.check_gradient(
        Model(Right(), loss=loss), (B * S,), vocab_size=V, batch_size=B
    )
    assert [(f.tensor, f.kind) for f in report.findings] == [("logits, of loss", "factor")]
    assert "2 times what it should be" in str(report)


def test_shapes_of_sequences_and_the_layer_itself_stays_as_it_is():
    class Shifted(Layer):
        """Takes (B, S, D)."""

        def forward(self, x, stash):
            assert stash.batch.batch_size == B and stash.batch.sequence_length == S
            return np.roll(x, 1, axis=1)

        def backward(self, dy, stash):
            return np.roll(dy, -1, axis=1)

    assert cupytron.check_gradient(Shifted(), (B, S, D)).ok
    layer = Right()
    layer.materialize(5)
    before = layer.weight.data.copy()
    assert cupytron.check_gradient(layer, (B * S, D)).ok
    assert layer.weight.data.dtype == np.float32 and (layer.weight.data == before).all()
    with pytest.raises(ValueError, match="batch_size=5: does not divide the 12 tokens"):
        cupytron.check_gradient(layer, (B * S, D), batch_size=5)


class Writes(Layer):
    def forward(self, x, stash):
        x *= 2
        return x

    def backward(self, dy, stash):
        return 2 * dy


class WritesDy(Layer):
    def forward(self, x, stash):
        return 2 * x

    def backward(self, dy, stash):
        dy *= 2
        return dy


class Leaves(WritesDy):
    def forward(self, x, stash):
        stash.push(self, x)
        return 2 * x

    def backward(self, dy, stash):
        return 2 * dy


class Random(Layer):
    def forward(self, x, stash):
        return x * np.random.default_rng().integers(0, 2, x.shape)

    def backward(self, dy, stash):
        return dy


class ReturnsNone(WritesDy):
    def backward(self, dy, stash):
        pass


@pytest.mark.parametrize(
    ("kind", "word", "text"),
    [
        (Writes, "x changed", "forward writes over its x"),
        (WritesDy, "dy changed", "backward writes over its dy"),
        (Leaves, "stash", "leaves 1 entries in the stash"),
        (Random, "random", "draw random numbers from seed, step and first_token"),
        (ReturnsNone, "nothing", "backward returned no array"),
    ],
)
def test_bad_manners_are_named(kind, word, text):
    report = cupytron.check_gradient(kind(), (B * S, D))
    assert [finding.kind for finding in report.findings] == [word] and text in str(report)


def test_a_gradient_that_is_truly_zero_is_right():
    """Of a key's bias alone: softmax does not see it. Here a bias that a norm takes away."""

    class Centred(nn.LayerNorm):
        def __init__(self):
            super().__init__(D)
            self.shift = Parameter((1,), constant(0.0))

        def forward(self, x, stash):
            return super().forward(x + self.shift.data, stash)

        def backward(self, dy, stash):
            dx = super().backward(dy, stash)
            stash.add_grad(self.shift, dx.sum().reshape(1))
            return dx

    assert cupytron.check_gradient(Centred(), (B * S, D)).ok


def test_ids_outside_the_table_are_told():
    with pytest.raises(
        cupytron.CupytronError, match=r"vocab_size=12: Embedding.* no row for an id"
    ):
        cupytron.check_gradient(nn.Embedding(V, D), (100,), vocab_size=V + 1)


class Returns(Right):
    """Right, but for what `of_y` makes of y and `of_dx` of dx."""

    def __init__(self, of_y, of_dx=lambda dx: dx):
        super().__init__()
        self.of_y, self.of_dx = of_y, of_dx

    def forward(self, x, stash):
        return self.of_y(super().forward(x, stash))

    def backward(self, dy, stash):
        return self.of_dx(super().backward(dy, stash))


@pytest.mark.parametrize(
    "changes, text",
    [
        ([lambda y: y.astype(np.float32)], "forward returned float32 for x of float64"),
        ([lambda y: None], "forward returned None; return one array"),
        ([lambda y: y[1:]], "forward returned shape .* a row for each token"),
        (
            [lambda y: y, lambda dx: dx.astype(np.float32)],
            "backward returned float32 for x of float64",
        ),
    ],
)
def test_what_a_lone_layer_returns_is_refused_as_in_a_chain(changes, text):
    with pytest.raises(cupytron.CupytronError, match=f"^Returns.*: {text}"):
        cupytron.check_gradient(Returns(*changes), (B * S, D), batch_size=B)


@pytest.mark.parametrize(
    "layer, shape, more, text",
    [
        (None, (3, D), {}, "layer: NoneType is no Layer"),
        (Right, (3, D), {}, "layer: Right is no Layer; give an object of the class"),
        (Right(), (), {}, r"shape=\(\): must be that of x"),
        (Right(), (0, D), {}, r"shape=\(0, 6\): must be"),
        (Right(), 5, {}, "shape=5: must be"),
        (Right(), (3.0, D), {}, "must be that of x, one to three whole numbers from 1"),
        (Right(), (3, D), {"batch_size": 0}, "batch_size=0: must be a whole number from 1"),
        (Right(), (3,), {"vocab_size": 2.5}, "vocab_size=2.5: must be"),
        (Right(), (3, D), {"seed": -1}, "seed=-1: must be a whole number from 0"),
    ],
)
def test_arguments_that_check_nothing_are_refused(layer, shape, more, text):
    with pytest.raises(cupytron.CupytronError, match=text):
        cupytron.check_gradient(layer, shape, **more)

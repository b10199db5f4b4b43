"""A model that is not the library's Transformer: each token sees a fading memory of those before it.

Is every backward the derivative of its forward? python examples/own_model.py
On a mesh: cupytron verify --model examples/own_model.py:OwnModel --tp 2 --dp 2
"""

import numpy as np

from cupytron import check_gradient, ops
from cupytron.layer import Chain, Layer, Parameter, normal
from cupytron.nn import Embedding, Head, LayerNorm, Linear

TEXT = "she sells sea shells by the sea shore; the shells she sells are sea shells for sure. " * 9
LETTERS = sorted(set(TEXT))
IDS = np.array([LETTERS.index(letter) for letter in TEXT])
SEQUENCES, LENGTH = 8, 32
TARGETS = SEQUENCES * LENGTH  # of a step; the loss is the mean over all of them, on any mesh


def batch(step):
    """Token ids and the ids that follow them, both (SEQUENCES, LENGTH): the same on every rank."""
    starts = np.random.default_rng(step).integers(0, len(IDS) - LENGTH, (SEQUENCES, 1))
    at = starts + np.arange(LENGTH)
    return IDS[at], IDS[at + 1]


class Memory(Layer):
    """m[t] = x[t] + m[t - 1] / 2 in each sequence. Shapes: x, m (T, D), T = B * S tokens."""

    def forward(self, x, stash):
        m = x.reshape(stash.batch.batch_size, -1, x.shape[1]).copy()
        for t in range(1, m.shape[1]):
            m[:, t] += m[:, t - 1] / 2
        return m.reshape(x.shape)

    def backward(self, dm, stash):  # the same sum, from the last token to the first
        dx = dm.reshape(stash.batch.batch_size, -1, dm.shape[1]).copy()
        for t in reversed(range(dx.shape[1] - 1)):
            dx[:, t] += dx[:, t + 1] / 2
        return dx.reshape(dm.shape)


class Relu(Layer):
    """y = max(x, 0). Shapes: x, y (T, F)."""

    per_token = True

    def forward(self, x, stash):
        y, saved = ops.relu(x.copy())  # ops.relu overwrites its argument
        stash.push(self, saved)
        return y

    def backward(self, dy, stash):
        (saved,) = stash.pop(self)
        return ops.relu_backward(dy.copy(), saved)


class OwnModel(Chain):
    """ids (T,) -> embedding -> memory -> up -> relu -> down -> norm -> head -> logits (T, V)."""

    # the layers that parallelize may cut
    tensor_plan = {"column": ["up"], "row": ["down"], "vocabulary": ["embedding", "head"]}

    def __init__(self, width=32):
        self.embedding = Embedding(len(LETTERS), width, std=1.0)
        self.memory = Memory()
        self.up = Linear(width, 4 * width, std=0.2)
        self.relu = Relu()
        self.down = Linear(4 * width, width, std=0.1)
        self.norm = LayerNorm(width)
        self.head = Head(Parameter((len(LETTERS), width), normal(0.1)))

    def loss(self, logits, targets, scale):
        return self.head.loss(logits, targets, scale)


if __name__ == "__main__":
    report = check_gradient(OwnModel(), (4 * 8,), vocab_size=len(LETTERS), batch_size=4)
    report.raise_if_wrong()
    print(report)

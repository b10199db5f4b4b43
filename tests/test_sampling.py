"""The choice of a token: on any number of ranks that of a plain implementation of its definition."""

from fractions import Fraction

import numpy as np
import pytest
from conftest import small_model

from cupytron import sampling
from cupytron.comm import SelfCommunicator, run_ranks
from cupytron.generate import choose, generate
from cupytron.layer import Layer
from cupytron.ops import philox

KEY = philox.key_of(1, "sample", "0")
SIZES = [1, 2, 3, 4, 8]
VOCABULARIES = [1, 2, 3, 7, 65, 1500]


def share(vocab, rank, size):
    n = -(-vocab // size)
    return slice(min(rank * n, vocab), min((rank + 1) * n, vocab))


def kinds(vocab):
    rng = np.random.default_rng(vocab)
    normal = rng.normal(size=vocab)
    yield "random", (3 * normal).astype(np.float32)
    yield "flat", 1e-4 * normal
    yield "tied", np.round(normal)
    yield "constant", np.full(vocab, -7.5)
    yield "spread", normal * 10.0 ** rng.uniform(-300, 300, vocab)
    yield "neighbours", 1 + rng.integers(0, 3, vocab) * 2.0**-52


def options(vocab):
    for top_k in (None, 1, 2, max(1, vocab // 2), vocab, vocab + 1, 10**30):
        for top_p in (None, 1.0, 0.9, 0.3, 1e-300):
            for temperature in (1.0, 0.7, 1e-300, 1e300):
                yield temperature, top_k, top_p
    yield 0, None, None


def plain_kept(scores, top_k, top_p):
    """Ids that may be chosen: straight from the definition, in whole numbers and fractions."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    if top_k is not None:
        order = order[:top_k]
    if top_p is not None:
        mass = [int(m) for m in np.rint(np.exp(scores) * 2.0**40)]
        limit = Fraction(top_p) * sum(mass[i] for i in order)
        kept, before = [], 0
        for i in order:
            if before >= limit:
                break
            kept.append(i)
            before += mass[i]
        order = kept
    return sorted(order)


def plain_scores(logits, temperature):
    scores = np.asarray(logits, np.float64)
    with np.errstate(over="ignore"):
        return (scores - scores.max()) / temperature


def plain_choice(logits, temperature, top_k, top_p, position):
    if temperature == 0:
        return int(np.argmax(logits))
    scores = plain_scores(logits, temperature)
    kept = plain_kept(scores, top_k, top_p)
    words = philox.philox(np, (np.arange(len(scores), dtype=np.uint64), position, 0, 0), KEY)
    noise = -np.log(-np.log((words[0] + 0.5) * 2.0**-32))
    return max(kept, key=lambda i: (scores[i] + noise[i], -i))


@pytest.mark.parametrize("few", [2, 64, 1024])
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_any_number_of_ranks_chooses_as_the_definition_says(monkeypatch, vocab, few):
    monkeypatch.setattr(sampling, "_FEW", few)
    cases = [(name, logits, *o) for name, logits in kinds(vocab) for o in options(vocab)]
    cases = cases[few % 11 :: 11]  # shares no factor with the numbers of options
    wants = [plain_choice(*case[1:], position=i) for i, case in enumerate(cases)]

    def body(comm):
        mine = share(vocab, comm.rank, comm.size)
        return [
            choose(logits[mine], *rest, KEY, i, comm, mine.start)
            for i, (_, logits, *rest) in enumerate(cases)
        ]

    for size in SIZES:
        for rank, found in enumerate(run_ranks(size, body)):
            for case, got, want in zip(cases, found, wants, strict=True):
                assert got == want, (case[0], case[2:], f"rank {rank} of {size}")


@pytest.mark.parametrize("few", [1, 16, 1024])
@pytest.mark.parametrize("vocab", [1, 5, 65, 1500])
def test_what_is_kept_is_exact_at_the_boundary(monkeypatch, vocab, few):
    """Each limit by itself: a draw would seldom fall on the last token that is kept."""
    monkeypatch.setattr(sampling, "_FEW", few)
    cases = [
        (plain_scores(logits, temperature), k, p)
        for _, logits in kinds(vocab)
        for temperature in (1.0, 1e-300)
        for k, p in ((1, None), (vocab - 1, None), (vocab // 3, None), (None, 0.5), (None, 1.0))
        if k is None or k >= 1
    ]
    wants = [plain_kept(*case) for case in cases]

    def body(comm):
        mine, found = share(vocab, comm.rank, comm.size), []
        sizes = sampling._Sizes(vocab, -(-vocab // comm.size))
        for scores, k, p in cases:
            costs = np.minimum(np.abs(scores[mine]), sampling._FAR)
            if k is not None:
                keep = sampling._kept(costs, sampling._ones, lambda _, k=k: k, sizes, comm)
            else:
                keep = sampling._kept(
                    costs, sampling._mass, lambda m, p=p: -(-int(2 * p) * m // 2), sizes, comm
                )
            found.append((np.flatnonzero(keep) + mine.start).tolist())
        return found

    for size in SIZES:
        ranks = run_ranks(size, body)
        for number, want in enumerate(wants):
            got = [i for found in ranks for i in found[number]]
            assert got == want, (number, f"{size} ranks")


def test_top_p_is_compared_exactly():
    """The float nearest to a third is below it; the next one is above it by 2^-54."""
    third = 1 / 3
    for top_p, kept in ((third, {0}), (np.nextafter(third, 1), {0, 1})):
        assert {choose(np.zeros(3), 1.0, None, top_p, KEY, i) for i in range(50)} == kept


def test_a_large_vocabulary_is_not_gathered(rng):
    """Ranks say no more than histograms and what is left in one bin of them."""
    logits = rng.normal(size=50_000)

    def body(comm):
        mine = share(50_000, comm.rank, comm.size)
        token = choose(logits[mine], 1.0, 1000, 0.9, KEY, 3, comm, mine.start)
        return token, sum(comm.bytes.values())

    (alone, _), *_ = run_ranks(1, body)
    for token, sent in run_ranks(4, body):
        assert token == alone
        assert sent < 120_000  # a quarter of the logits is 100,000 bytes to each of three others


@pytest.mark.parametrize("size", SIZES)
def test_text_is_the_same_on_shards(size):
    """The model's table has 37 rows, and only 30 are tokens."""

    class Shard(Layer):
        def __init__(self, comm):
            self.model = small_model(np.random.default_rng(5), context=10)
            self.config, self.mine = self.model.config, share(37, comm.rank, comm.size)

        def forward(self, ids, stash):
            return self.model.forward(ids, stash)[:, self.mine]

    settings = [
        {"temperature": 0},
        {"seed": 2},
        {"top_k": 4, "temperature": 1.5},
        {"top_p": 0.8, "use_cache": False},
        {"vocab_size": 30, "temperature": 9.0, "top_k": 29},
        {"stop": 3, "temperature": 9.0},
    ]

    def texts(comm, make=Shard):
        return [list(generate(make(comm), [1, 2], 25, tp=comm, **s)) for s in settings]

    whole = small_model(np.random.default_rng(5), context=10)
    want = [list(generate(whole, [1, 2], 25, **s)) for s in settings]
    assert max(want[4]) == 29
    assert all(found == want for found in run_ranks(size, texts))
    assert texts(SelfCommunicator(), lambda comm: whole) == want

"""The autotuner: right and fast candidates are chosen, kept and shared, and nothing else is disturbed.

Where a time has to decide, a candidate sleeps: nothing here depends on how fast the machine is.
"""

import contextlib
import importlib
import inspect
import json
import re
import time
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from runs import TINY
from simulated import simulated_gpu
from simulated_libraries import simulated_libraries

from cupytron import kernels, ops
from cupytron.cli.main import _run
from cupytron.comm.thread import run_ranks
from cupytron.config import load_config
from cupytron.kernels import candidates, tables, trial
from cupytron.kernels.autotune import RuntimeAutoTuner
from cupytron.kernels.operation import Operation
from cupytron.trainer import Trainer
from cupytron.tune import tune

SLEEP = 0.02
X = np.arange(12.0).reshape(3, 4)
PROBLEM = "x 3x4 float64"


def double(x, times=2):
    """The one that is right."""
    return x * times


def slow(x, times=2):
    time.sleep(SLEEP)
    return x * times


def wrong(x, times=2):
    return x * times + 1e-3


def failing(x, times=2):
    raise MemoryError("no room for\nthis")


def a_tuner(**options):
    return RuntimeAutoTuner(warmup_iterations=1, measure_iterations=3, **options)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield
    ops.use(None)


# choosing


@pytest.mark.parametrize("default", ["slow", "fast"])
def test_the_faster_one_is_chosen_whatever_the_default(default):
    calls = []

    def noted(x, times=2):
        calls.append(x)
        return slow(x, times)

    tuner = a_tuner()
    call = tuner.wrap("double", {"slow": noted, "fast": double}, default)
    with tuner.tuning():
        assert (call(X) == 2 * X).all()
    found = tuner.found()["double", PROBLEM]
    assert found.choice == "fast" and found.times["slow"] >= SLEEP and not found.refused
    assert tuner.choices() == ({f"double: {PROBLEM}": "fast"} if default == "slow" else {})
    before = len(calls)
    assert (call(X) == 2 * X).all() and len(calls) == before


def test_wrong_and_failing_ones_are_refused_and_say_why():
    tuner = a_tuner()
    given = {"slow": slow, "wrong": wrong, "failing": failing}
    call = tuner.wrap("double", given, "slow")
    with tuner.tuning():
        call(X)
    found = tuner.found()["double", PROBLEM]
    assert found.choice == "slow"
    assert found.refused["failing"] == "MemoryError: no room for"
    assert "differs from the reference's by 4.5e-05 of its largest value" in found.refused["wrong"]


def test_a_reference_of_its_own_decides_what_is_right():
    tuner = a_tuner()
    tuner.wrap("double", {"wrong": wrong, "right": slow}, "wrong", reference=double)
    with tuner.tuning():
        # what cannot be right is not used while tuning either
        assert (tuner.functions["double"](X) == 2 * X).all()
    assert tuner.found()["double", PROBLEM].choice == "right"


def test_the_default_stays_unless_another_one_is_clearly_faster():
    operation = Operation("f", {"f": None}, {"a": (), "b": ()}, "a", None, double, str)
    assert operation.fastest({"a": 1.0, "b": 0.97}) == "a"
    assert operation.fastest({"a": 1.0, "b": 0.9}) == "b"
    assert operation.fastest({"b": 3.0, "c": 2.0}) == "c"
    assert operation.fastest({}) == "a"


def test_nothing_is_tried_outside_tuning():
    calls = []
    tuner = a_tuner()
    other = lambda x, times=2: calls.append(1) or double(x)  # noqa: E731
    call = tuner.wrap("double", {"slow": slow, "other": other}, "slow")
    assert tuner.frozen
    call(X)
    assert not calls and not tuner.found()
    with tuner.tuning():
        assert not tuner.frozen
        call(X)
        tried = len(calls)
        assert tried == 5  # checked, warmed up, measured
        call(X)  # known: not tried again, and not in force yet
        assert len(calls) == tried
    assert tuner.frozen
    call(X)
    assert len(calls) == tried + 1
    call(X[:2])  # another problem
    assert len(calls) == tried + 1 and len(tuner.found()) == 1


def test_after_an_error_nothing_new_is_in_force():
    tuner = a_tuner()
    call = tuner.wrap("double", {"slow": slow, "fast": double}, "slow")
    with pytest.raises(KeyError), tuner.tuning():
        call(X)
        raise KeyError
    assert tuner.frozen and not tuner.choices() and not list(cached())


def test_shape_dtype_and_layout_make_a_problem_numbers_do_not():
    tuner = a_tuner()
    call = tuner.wrap("double", {"slow": slow, "fast": double}, "slow")
    with tuner.tuning():
        for x in (X, X.T, X[:, :2], X[::2, ::2], X.astype(np.float32)):
            call(x, 3)
            call(x, times=4)
    assert {problem for _, problem in tuner.found()} == {
        PROBLEM,
        "x 4x3 float64:T",
        "x 3x2 float64:rows",
        "x 2x2 float64:strided",
        "x 3x4 float32",
    }


def test_a_candidate_that_calls_the_operation_is_tried_once():
    tuner = a_tuner()
    nested = lambda x, times=2: tuner.functions["double"](x)  # noqa: E731
    call = tuner.wrap("double", {"slow": slow, "nested": nested}, "slow")
    with tuner.tuning():
        call(X)
    assert set(tuner.found()["double", PROBLEM].times) == {"slow", "nested"}


def test_a_problem_that_cannot_be_copied_is_left_to_the_default():
    tuner = a_tuner()
    call = tuner.wrap("double", {"a": double, "b": slow}, "a", reference=failing)
    with tuner.tuning():
        assert (call(X) == 2 * X).all()
    assert tuner.undecided == {("double", PROBLEM): "MemoryError: no room for"}
    assert not tuner.found()


def test_wrappers_keep_the_signature():
    tuner = candidates.make()
    for name, function in tuner.functions.items():
        assert inspect.signature(function) == inspect.signature(ops.REFERENCE[name]), name
        assert function.__doc__ == ops.REFERENCE[name].__doc__


# in place


def test_a_running_sum_is_added_to_once():
    def add(total, x, dy):
        total += x.T @ dy

    def add_slowly(total, x, dy):
        time.sleep(SLEEP)
        total += x.T @ dy

    tuner = a_tuner()
    call = tuner.wrap("add", {"slow": add_slowly, "fast": add}, "slow", writes=("total",))
    total = np.ones((4, 4))
    with tuner.tuning():
        call(total, X, X)
    assert (total == 1 + X.T @ X).all()
    assert tuner.found()["add", "total 4x4 float64, x 3x4 float64, dy 3x4 float64"].choice == "fast"


def test_what_is_written_is_compared():
    def add(total, x):
        total += x

    def forget(total, x):
        pass

    tuner = a_tuner()
    call = tuner.wrap("add", {"slow": add, "forget": forget}, "slow", writes=("total",))
    with tuner.tuning():
        call(np.ones((3, 4)), X)
    (found,) = tuner.found().values()
    assert "differs" in found.refused["forget"]


@pytest.mark.parametrize("dtype", [np.float64, np.float32, ml_dtypes.bfloat16])
def test_copies_lie_in_memory_as_the_originals(rng, dtype):
    packed = rng.normal(size=(2, 8, 3, 4, 5)).astype(dtype)
    q, k, v = packed[:, :, :, :2], packed[:, :, :, 2], packed[:, :, :, 3]
    alone, transposed = packed[0].copy(), rng.normal(size=(6, 7)).astype(dtype).T
    arguments = (q, k, (v, transposed), alone, 3, None, np.float32(2), alone)
    copies = trial.copied(arguments)
    flat, flat_copies = (list(trial.leaves(a)) for a in (arguments, copies))
    for a, b in zip(flat, flat_copies, strict=True):
        if isinstance(a, np.ndarray):
            assert not np.shares_memory(a, b) and a.strides == b.strides and a.dtype == b.dtype
            assert (a == b).all()
    addresses = [x.__array_interface__["data"][0] for x in (q, k, v)]
    copied = [x.__array_interface__["data"][0] for x in (copies[0], copies[1], copies[2][0])]
    assert [a - addresses[0] for a in addresses] == [a - copied[0] for a in copied]
    assert copies[3] is copies[7] and copies[4:6] == (3, None)
    copies[1][...] = 0
    assert (copies[0] == q).all() and (k != 0).all()


def test_packed_gradients_are_written_where_they_are(rng):
    tuner = candidates.make()
    qkv, packed = rng.normal(size=(2, 2, 9, 2, 3, 4))
    parts = lambda x: (x[:, :, :, :1], x[:, :, :, 1], x[:, :, :, 2])  # noqa: E731
    o, lse = ops.attention(*parts(qkv))
    wanted = np.empty_like(packed)
    ops.REFERENCE["attention_backward"](o, *parts(qkv), o, lse, parts(wanted))
    before = qkv.copy()
    with tuner.tuning():
        tuner.functions["attention_backward"](o, *parts(qkv), o, lse, parts(packed))
    assert (packed == wanted).all() and (qkv == before).all()
    (found,) = tuner.found().values()
    assert not found.refused and len(found.times) == 3


# comparing


@pytest.mark.parametrize(
    ("found", "wanted", "words"),
    [
        ((X, 1.0), (X, 1.0), None),
        (X * (1 + 1e-11), X, None),
        (X * (1 + 1e-9), X, "by 1.0e-09"),
        (X.astype(np.float32), X, "is float32, the reference's float64"),
        (X[0], X, r"has shape \(4,\), the reference's \(3, 4\)"),
        ((X, None), (X, X), "returns 1 results, the reference 2"),
        ((X, X + 1), (X, X), "result 1 differs"),
        (X * np.nan, X, "by inf"),
        (X * np.nan, X * np.nan, None),
        (np.array([-np.inf, 1]), np.array([-np.inf, 1]), None),
        (np.array([np.inf, 1]), np.array([-np.inf, 1]), "by inf"),
        (np.array([1e-30]), np.array([0.0]), "by inf"),
        (np.zeros(0), np.zeros(0), None),
        (X > 3, X > 4, "differs"),
        (np.float64(2.0), 2.0, None),
    ],
)
def test_disagreement(found, wanted, words):
    said = trial.disagreement(found, wanted, 1e-10)
    assert said is None if words is None else re.search(words, said), said


def test_tolerance_is_that_of_the_coarsest_dtype():
    half = np.zeros(2, ml_dtypes.bfloat16)
    assert trial.tolerance((X, 3)) == 1e-10
    assert trial.tolerance((X, (np.zeros(2, np.float32),))) == 1e-4
    assert trial.tolerance((half, X)) == trial.tolerance((X, half.astype(np.float16))) == 2e-2
    assert trial.tolerance((np.zeros(2, np.int64),)) == 0
    assert trial.tolerance((np.zeros(2, np.float32),), tf32=True) == 5e-3
    assert trial.tolerance((X,), tf32=True) == 1e-10


def test_slices_do_not_hide_an_error(monkeypatch):
    monkeypatch.setattr(trial, "_SLICE", 5)
    a = X.copy()
    a[2, 3] += 1e-3
    assert "differs" in trial.disagreement(a, X, 1e-10)
    a[2, 3], a[0, 1] = X[2, 3], 2
    assert "differs" in trial.disagreement(a, X, 1e-10)


# forward and backward together


def by_slope(x):
    return np.tanh(x), 1 - np.tanh(x) ** 2


def by_slope_backward(dy, saved):
    return dy * saved


def by_input(x):
    time.sleep(SLEEP)
    return np.tanh(x), x


def by_input_backward(dy, saved):
    return dy * (1 - np.tanh(saved) ** 2)


def test_backward_reads_what_its_own_forward_saved():
    def attempt(functions, x):
        y, saved = functions[0](x)
        return y, functions[1](x, saved)

    tuner = a_tuner()
    forward, backward = tuner.wrap_together(
        "tanh",
        {"tanh": lambda x: (x,), "tanh_backward": None},
        {"input": (by_input, by_input_backward), "slope": (by_slope, by_slope_backward)},
        "input",
        attempt,
    )
    slope = 1 - np.tanh(X) ** 2
    with tuner.tuning():
        backward(X, X)  # no occasion to try
        assert not tuner.found()
        _, saved = forward(X)
        assert saved is X
        assert np.allclose(backward(X, saved), X * slope)
    assert tuner.choices() == {"tanh: 3x4 float64": "slope"}
    _, saved = forward(X)
    assert (saved == slope).all() and np.allclose(backward(dy=X, saved=saved), X * slope)


# on disk


def cached():
    base = tables.path({}).parent
    return base.glob("autotune-*.json") if base.is_dir() else iter(())


def tuned(name="double", **functions):
    tuner = a_tuner()
    tuner.wrap(name, {"slow": slow, "fast": double, **functions}, "slow")
    return tuner


@pytest.fixture
def table():
    """The file that a tuned process has left."""
    tuner = tuned()
    with tuner.tuning():
        tuner.functions["double"](X)
    (file,) = cached()
    return file


def reloaded(file=None, **functions):
    tuner = tuned(**functions)
    there = tuner.load(file)
    tuner.synchronise()
    return there, tuner.choices()


def test_choices_outlive_the_process(table):
    assert reloaded() == (True, {f"double: {PROBLEM}": "fast"})
    environment = {**tables.environment(), "graphs": False, "tf32": False}
    assert tables.path(environment) == table


def test_other_problems_in_the_file_stay(table):
    tuner = tuned()
    with tuner.tuning():
        tuner.functions["double"](X[:2])
    assert list(cached()) == [table]
    _, choices = reloaded()
    assert choices == {f"double: {PROBLEM}": "fast", "double: x 2x4 float64": "fast"}


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: '{"format": 1}',
        lambda text: text.replace('"format": 1', '"format": 99'),
        lambda text: text.replace('"times"', '"time"'),
        lambda text: text.replace('"fast": ', '"fast": "quick", "x": '),
        lambda text: text.replace('"numpy": "', '"numpy": "0.'),
        lambda text: text.replace('"format": 1', '"format": 1, "products": {"a": Infinity}'),
        lambda text: "[" * 100_000,
    ],
)
def test_a_damaged_or_foreign_file_counts_as_empty(table, damage):
    text = table.read_text()
    assert damage(text) != text
    table.write_text(damage(text))
    assert reloaded() == (False, {})


def test_other_versions_have_a_file_of_their_own(table, monkeypatch):
    now = tables.environment()
    assert {"cupytron", "numpy", "sources", "device", "processor", "blas"} <= now.keys()
    monkeypatch.setattr(tables, "environment", lambda device: {**now, "numpy": "9.9"})
    assert reloaded() == (False, {})
    # nor is it taken when it is named
    assert reloaded(table) == (False, {})


def test_what_was_chosen_without_graphs_is_no_choice_with_them(table):
    for options in ({"graphs": True}, {"tf32": True}):
        assert not a_tuner(**options).load() and not a_tuner(**options).load(table)


def test_a_candidate_that_is_not_there_any_more_is_not_chosen(table):
    tuner = a_tuner()
    tuner.wrap("double", {"slow": slow, "another": double}, "slow")
    assert tuner.load()
    tuner.synchronise()
    assert tuner.choices() == {}


def test_a_cache_that_cannot_be_written_stops_nothing(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    tuner = tuned()
    with tuner.tuning():
        tuner.functions["double"](X)
    assert tuner.choices()
    with pytest.raises(OSError):
        tuner.save()


def test_fingerprints_tell_choices_not_times(table):
    tuner = tuned()
    assert tuner.fingerprint() == "defaults"
    tuner.load()
    assert tuner.fingerprint() == "defaults"  # not in force yet
    tuner.synchronise()
    first = tuner.fingerprint()
    table.write_text(table.read_text().replace('"fast": 0.', '"fast": 1.'))
    other = tuned()
    other.load()
    other.synchronise()
    assert other.fingerprint() == first != "defaults"
    with tuner.tuning():
        tuner.functions["double"](X[:1])
    assert tuner.fingerprint() != first


class Algorithms:
    """Something else that chooses, as products.py does."""

    def __init__(self, **chosen):
        self.chosen, self.may = chosen, None

    def attach(self, tuner):
        tuner.attach("products", lambda: dict(self.chosen), self.chosen.update, self.switch)

    def switch(self, on):
        self.may = on


def test_another_chooser_is_kept_shared_and_switched():
    tuner, algorithms = a_tuner(), Algorithms(small=3)
    algorithms.attach(tuner)
    assert algorithms.may is False
    with tuner.tuning():
        assert algorithms.may is True
        algorithms.chosen["large"] = 1
    assert algorithms.may is False
    (file,) = cached()
    assert json.loads(file.read_text())["products"] == {"small": 3, "large": 1}
    again, restored = a_tuner(), Algorithms()
    restored.attach(again)
    assert again.load() and restored.chosen == {"small": 3, "large": 1}
    assert again.fingerprint() == tuner.fingerprint() != "defaults"


# ranks


def quick_on(rank):
    """Two candidates; the one that is named like the rank does not sleep there."""

    def make(number):
        def function(x):
            if number != rank:
                time.sleep(SLEEP)
            return x * 2

        return function

    return {f"of rank {number}": make(number) for number in range(2)}


def test_rank_0_chooses_for_all():
    def body(world):
        tuner = a_tuner()
        call = tuner.wrap("double", quick_on(world.rank), "of rank 1")
        with tuner.tuning(world):
            call(X)
            mine = tuner.found()["double", PROBLEM].choice
        return mine, tuner.choices(), tuner.fingerprint()

    (first, *one), (second, *other) = run_ranks(2, body)
    assert (first, second) == ("of rank 0", "of rank 1")
    assert one == other and one[0] == {f"double: {PROBLEM}": "of rank 0"}


def test_what_only_one_stage_meets_is_known_to_all_and_nobody_waits_for_it():
    def body(world):
        tuner = a_tuner()
        call = tuner.wrap("double", {"slow": slow, "fast": double}, "slow")
        with tuner.tuning(world):
            for length in range(1, 1 + world.rank * 2):
                call(X[:length])
        return sorted(tuner.choices())

    one, other = run_ranks(2, body)
    assert one == other == ["double: x 1x4 float64", "double: x 2x4 float64"]


def test_what_any_rank_refuses_is_out():
    def body(world):
        tuner = a_tuner()
        fast = failing if world.rank else double
        call = tuner.wrap("double", {"slow": slow, "fast": fast}, "slow")
        with tuner.tuning(world):
            call(X)
        return tuner.choices(), tuner.found()["double", PROBLEM]

    (none, found), other = run_ranks(2, body)
    assert none == {} and (none, found) == other
    assert found.choice == "slow" and found.refused["fast"] == "rank 1: MemoryError: no room for"


def test_a_table_that_only_rank_0_has_is_used_by_all(table):
    def body(world):
        tuner = tuned()
        algorithms = Algorithms(**{"both": world.rank, f"only {world.rank}": 5})
        algorithms.attach(tuner)
        if world.rank == 0:
            tuner.load()
        tuner.synchronise(world)
        return tuner.choices(), algorithms.chosen

    one, other = run_ranks(2, body)
    assert one == other
    assert one == ({f"double: {PROBLEM}": "fast"}, {"both": 0, "only 0": 5, "only 1": 5})


def test_ranks_as_threads_may_share_a_tuner():
    tuner = tuned()

    def body(world):
        with tuner.tuning(world):
            result = tuner.functions["double"](X)
        return (result == 2 * X).all() and tuner.choices()

    assert run_ranks(3, body) == [{f"double: {PROBLEM}": "fast"}] * 3
    assert tuner.frozen


# the CPU's candidates


@pytest.fixture(params=["float64", "float32", "bfloat16"])
def dtype(request):
    return np.dtype(getattr(ml_dtypes, request.param, request.param))


def test_all_candidates_of_the_cpu_agree(rng, dtype):
    tuner = candidates.make()
    tuner.warmup_iterations, tuner.measure_iterations = 0, 1
    wide = np.float32 if dtype.itemsize == 2 else dtype

    def normal(*shape):
        return rng.normal(size=shape).astype(dtype)

    with tuner.tuning():
        ops.use(tuner.functions)
        ops.sum_rows(normal(33, 8))
        for rows, first in ((9, None), (700, None), (5, 3)):
            ids = rng.integers(0, rows, 40)
            ops.embedding_backward(normal(40, 8), ids, np.ones((rows, 8), wide), first)
        q, k, v = normal(2, 150, 2, 3, 4), normal(2, 150, 2, 4), normal(2, 150, 2, 4)
        for dropout in (None, ops.AttentionDropout(0.2, (1, 2), 3, 4, 5)):
            o, lse = ops.attention(q, k, v, dropout)
            out = tuple(np.empty_like(x) for x in (q, k, v))
            ops.attention_backward(o, q, k, v, o, lse, out, dropout)
        ops.gelu(normal(300, 200))
        ops.gelu_exact(normal(300, 200))
        ops.cross_entropy(normal(300, 200), rng.integers(-1, 200, 300), 0.5)
    found = tuner.found()
    assert {operation for operation, _ in found} == set(tuner.functions)
    assert not tuner.undecided and len(found) == 11
    for place, entry in found.items():
        assert not entry.refused, place
        assert len(entry.times) > 1


def test_variants_differ_in_their_constants_and_leave_the_module_alone():
    embedding = importlib.import_module("cupytron.ops.embedding")
    before = embedding._ONE_HOT_UP_TO
    sorting = candidates.variant("ops.embedding", _ONE_HOT_UP_TO=-1)
    assert sorting._ONE_HOT_UP_TO == -1 and embedding._ONE_HOT_UP_TO == before
    assert importlib.import_module("cupytron.ops.embedding") is embedding
    assert sorting is candidates.variant("ops.embedding", _ONE_HOT_UP_TO=-1)
    with pytest.raises(AssertionError, match="has no NOTHING"):
        candidates.variant("ops.embedding", NOTHING=1)


def test_a_one_hot_matrix_of_any_size_is_not_made(monkeypatch):
    monkeypatch.setattr(candidates, "_ONE_HOT_AT_MOST", 100)
    tuner = candidates.make()
    ids = np.zeros(2, np.int64)
    with tuner.tuning():
        table = np.zeros((51, 1), np.float32)
        tuner.functions["embedding_backward"](np.ones((2, 1), np.float32), ids, table)
    (found,) = tuner.found().values()
    assert "too large to be worth it" in found.refused["one-hot"]
    assert found.choice != "one-hot" and table[0, 0] == 2


# a GPU's candidates, on the simulated GPU


def a_device(cupy):
    return SimpleNamespace(gpu=True, xp=cupy, number=0, model="simulated", versions=lambda: {})


@pytest.fixture
def gpu(monkeypatch):
    with simulated_libraries(), simulated_gpu() as cupy:
        cupy.cuda.Stream(non_blocking=True).use()
        yield cupy


def test_on_a_gpu_only_what_can_be_captured_is_chosen(gpu):
    def waits(x):
        x.sum().item()
        return x * 2

    for graphs, refused in ((True, {"waits"}), (False, set())):
        tuner = a_tuner(graphs=graphs, device=a_device(gpu))
        call = tuner.wrap("double", {"waits": waits, "quick": lambda x: x * 2}, "quick")
        x = gpu.asarray(np.arange(24.0).reshape(2, 3, 4))[:, 1]
        used = gpu.get_default_memory_pool().total_bytes()
        with tuner.tuning():
            assert (call(x).get() == 2 * x.get()).all()
        found = tuner.found()["double", "x 2x4 float64:rows"]
        assert found.refused.keys() == refused
        assert bool(found.times) == (not graphs)  # one that is left alone needs no measurement
        for why in found.refused.values():
            assert why.startswith("it cannot be captured into a graph: ")
        # what was needed for trying came from elsewhere: this pool may be a graph's
        assert gpu.get_default_memory_pool().total_bytes() <= used + 512


def test_on_a_gpu_what_is_far_slower_is_not_measured_to_the_end(gpu, monkeypatch):
    """The reference's attention is thousands of launches, and a first step should not take minutes."""
    monkeypatch.setattr(trial, "HOPELESS", 20)
    calls = []

    def slow(x):
        calls.append("slow")
        time.sleep(SLEEP * 5)
        return x * 2

    tuner = a_tuner(graphs=True, device=a_device(gpu))
    call = tuner.wrap("double", {"quick": lambda x: x * 2, "slow": slow}, "slow")
    with tuner.tuning():
        call(gpu.ones((2, 3)))
    found = tuner.found()["double", "x 2x3 float64"]
    assert found.choice == "quick" and found.refused["slow"].startswith("it takes ")
    # compared, roughly timed twice; not captured, nor timed 1 + 3 times
    assert 3 <= len(calls) <= 4


def test_what_is_slow_is_tried_where_nothing_else_can_be_captured(gpu, monkeypatch):
    monkeypatch.setattr(trial, "HOPELESS", 20)

    def waits(x):
        x.sum().item()
        return x * 2

    def slow(x):
        time.sleep(SLEEP * 5)
        return x * 2

    def slow_and_waits(x):
        time.sleep(SLEEP * 4)
        return waits(x)

    tuner = a_tuner(graphs=True, device=a_device(gpu))
    candidates = {"waits": waits, "slow": slow, "slow and waits": slow_and_waits}
    call = tuner.wrap("double", candidates, "waits")
    with tuner.tuning():
        call(gpu.ones((2, 3)))
    found = tuner.found()["double", "x 2x3 float64"]
    assert found.choice == "slow" and found.refused.keys() == {"waits", "slow and waits"}
    assert all("cannot be captured" in why for why in found.refused.values())


def test_too_little_memory_is_no_reason_to_refuse_a_kernel_for_ever(gpu):
    """The first step is where a run has least, and what it finds is kept on disk."""

    def fast(x):
        gpu.empty(1 << 20, np.uint8)
        return x * 2

    def wrapped():
        tuner = a_tuner(graphs=True, device=a_device(gpu))
        return tuner, tuner.wrap("double", {"slow": lambda x: x * 2, "fast": fast}, "fast")

    x = gpu.ones((2, 3))
    tuner, call = wrapped()
    held = gpu.sim.device_bytes
    with gpu.sim.limited(1 << 18), tuner.tuning(), contextlib.suppress(MemoryError):
        call(x)
    assert not tuner.found() and "Out of memory" in tuner.undecided["double", "x 2x3 float64"]
    assert gpu.sim.device_bytes <= held + 512
    tuner, call = wrapped()
    tuner.load()
    with tuner.tuning():
        call(x)
    assert not tuner.found()["double", "x 2x3 float64"].refused


def test_while_a_graph_is_captured_nothing_is_tried(gpu):
    tuner = a_tuner(graphs=True, device=a_device(gpu))
    call = tuner.wrap("double", {"a": lambda x: x * 2, "b": lambda x: x + x}, "a")
    stream, x = gpu.cuda.get_current_stream(), gpu.ones((2, 3))
    with tuner.tuning():
        stream.begin_capture()
        call(x)
        stream.end_capture()
        assert not tuner.found() and not tuner.undecided
    with tuner.tuning():
        call(x)
    assert len(tuner.found()) == 1


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_kernels_and_the_reference_agree_on_what_layers_call_them_with(gpu, rng, name):
    """Each operation in the table is tried, and no kernel is refused where it has to work."""
    kernels.install()
    config = settings("parallel.graphs=false")
    tuner = candidates.make(config, a_device(gpu))
    tuner.warmup_iterations, tuner.measure_iterations = 0, 1
    candidates.install(tuner)
    with tuner.tuning():
        call_all(gpu, rng, np.dtype(getattr(ml_dtypes, name, name)))
    found = tuner.found()
    # a backward that reads what a forward has saved is tried with it
    lone = {
        "add_layer_norm",
        "add_rms_norm",
        *(n for n in ops.REFERENCE if n.endswith("_backward")),
    }
    lone -= {"swiglu_backward", "attention_backward", "embedding_backward", "dropout_backward"}
    lone.add("cached_attention")  # of generation
    assert {operation for operation, _ in found} == kernels.table().keys() - lone
    assert not tuner.undecided
    for (operation, problem), entry in found.items():
        wanted, refused = {"cuda", "reference"}, set()
        if operation.startswith("attention"):
            wanted |= {"usual", "cudnn"}
            refused = {"cudnn"} if name == "float32" else set()
            assert "dropout" not in problem  # left to the usual kernel
        elif operation in ("matmul", "linear", "add_product"):
            wanted = {"cublaslt", "reference"}
        assert entry.refused.keys() == refused, (operation, problem, entry.refused)
        assert entry.times.keys() == wanted - refused


def test_a_library_that_is_missing_is_refused(gpu, rng, monkeypatch):
    monkeypatch.setitem(candidates._KERNELS["attention"], "cudnn", "not_there")
    kernels.install()
    tuner = candidates.make(None, a_device(gpu))
    q, k, v = (gpu.asarray(rng.normal(size=(1, 4, 1, 8))) for _ in range(3))
    with tuner.tuning():
        tuner.functions["attention"](q[:, :, :, None], k, v)
    (found,) = tuner.found().values()
    assert "No module named 'cupytron.kernels.not_there'" in found.refused["cudnn"]
    assert "cannot be captured" in found.refused["reference"]
    assert found.choice in found.times and found.times.keys() == {"usual", "cuda"}


@pytest.mark.parametrize("flag", ["on", "off"])
def test_a_run_on_a_gpu_measures_products_where_it_may(gpu, monkeypatch, flag):
    said = []
    products = SimpleNamespace(choices=dict, set_choices=said.append, set_timing=said.append)
    monkeypatch.setattr(candidates, "_optional", lambda module: products)
    ops.use({"gelu": kernels.table()["gelu"], "gelu_backward": kernels.table()["gelu_backward"]})
    installed = ops.gelu
    config = settings(f"parallel.autotune={flag}")
    tuner = candidates.start(config, None, a_device(gpu))
    assert said[-1] is False  # outside of tuning nothing may
    if flag == "off":
        assert tuner is None and ops.gelu is installed
        return
    assert tuner.functions.keys() == {"gelu", "gelu_backward"} and tuner.graphs
    assert ops.gelu is tuner.functions["gelu"] and ops.gelu.untuned is installed
    with tuner.tuning():
        assert said[-1] is True
    assert said[-1] is False


def call_all(xp, rng, dtype):
    wide = np.float32 if dtype.itemsize == 2 else dtype

    def normal(*shape, dtype=dtype):
        return xp.asarray(rng.normal(size=shape).astype(dtype))

    def integers(end):
        return xp.asarray(rng.integers(0, end, 8))

    for name in ("gelu", "gelu_exact", "relu"):
        _, saved = getattr(ops, name)(normal(8, 16))
        getattr(ops, f"{name}_backward")(normal(8, 16), saved)
    gate, up = normal(8, 16), normal(8, 16)
    ops.swiglu_backward(ops.swiglu(gate, up), gate, up)
    x, weight = normal(8, 16), normal(16)
    total, y, saved = ops.add_layer_norm(x, normal(8, 16), weight, weight, 1e-5)
    ops.layer_norm_backward(y, saved, weight, total)
    total, y, saved = ops.add_rms_norm(x, normal(8, 16), weight, 1e-5)
    ops.rms_norm_backward(y, saved, weight, total)
    ops.sum_rows(x)
    ops.add_to(normal(8, 16, dtype=wide), x)
    ops.matmul(x, normal(4, 16).T)
    ops.linear(x, normal(16, 4), normal(4))
    ops.add_product(normal(16, 4, dtype=wide), x, normal(8, 4))
    qkv = normal(2, 8, 2, 3, 16)
    cos, sin = ops.rotary_table(xp.arange(8), 16, 1e4, wide)
    ops.rotary(qkv[:, :, :, :2], cos, sin)
    for dropout in (None, ops.AttentionDropout(0.1, (1, 2), 3, 4, 5)):
        q, k, v = qkv[:, :, :, :1], qkv[:, :, :, 1], qkv[:, :, :, 2]
        o, lse = ops.attention(q, k, v, dropout)
        out = xp.empty_like(qkv)
        parts = out[:, :, :, :1], out[:, :, :, 1], out[:, :, :, 2]
        ops.attention_backward(o, q, k, v, o, lse, parts, dropout)
    targets = integers(9)
    ops.cross_entropy(normal(8, 9), targets, 0.5)
    logits = normal(8, 9)
    own = ops.shard_exponentials(logits, targets, 0)
    ops.shard_cross_entropy(logits, targets, own, own[None], 0.5, 0)
    ops.embedding(integers(9), normal(9, 16))
    ops.embedding_backward(x, integers(9), normal(9, 16, dtype=wide))
    _, mask = ops.dropout(x, 0.1, (1, 2), 3, 4)
    ops.dropout_backward(x, mask, 0.1)


# runs


def settings(*overrides):
    return load_config(overrides=[*TINY, "model.vocab_size=65", "parallel.device=cpu", *overrides])


def a_table(config):
    """A table in the cache in which another candidate than the default is chosen everywhere."""
    tuner = tune(config)
    found = {
        place: tables.Choice(next(n for n in entry.times if n != default), entry.times, {})
        for place, entry in tuner.found().items()
        for default in [next(iter(tuner._operations[place[0]].candidates))]
    }
    assert len(found) >= 5
    environment = tuner._environment()
    tables.write(tables.path(environment), environment, found, {})


def test_a_run_has_choices_only_where_they_were_asked_for_and_are_allowed():
    config = settings()
    assert candidates.start(config) is None
    assert ops.gelu is ops.REFERENCE["gelu"]
    a_table(config)
    ops.use(None)
    assert candidates.start(settings("parallel.autotune=off")) is None
    assert candidates.start(settings("train.deterministic=true")) is None
    assert ops.gelu is ops.REFERENCE["gelu"]
    tuner = candidates.start(config)
    assert ops.gelu is tuner.functions["gelu"] and ops.layer_norm is ops.REFERENCE["layer_norm"]
    assert tuner.frozen and tuner.fingerprint() != "defaults"
    # one that comes later takes the places of the functions, not of the choices before them
    again = candidates.start(config)
    assert again.fingerprint() == tuner.fingerprint()
    assert candidates._installed()["gelu"] is ops.REFERENCE["gelu"]


def test_training_with_choices_gives_the_same_losses():
    config = settings()
    a_table(config)
    used = set()
    losses = {}
    for label in ("default", "chosen"):
        ops.use(None)
        if label == "chosen":
            tuner = candidates.start(config)
            ops.use({name: noting(name, f, used) for name, f in tuner.functions.items()})
        trainer = Trainer(config)
        trainer.materialize()
        rng = np.random.default_rng(0)
        losses[label] = [
            trainer.train_step(*rng.integers(0, 65, (2, 8, 16))).loss for _ in range(3)
        ]
    assert used >= {"attention", "attention_backward", "gelu", "cross_entropy", "sum_rows"}
    assert losses["chosen"] == pytest.approx(losses["default"], rel=1e-5)


def noting(name, function, used):
    def noted(*arguments, **named):
        used.add(name)
        return function(*arguments, **named)

    return noted


def test_the_command_prints_and_keeps_a_table(tmp_path, capsys):
    flags = ["--preset", "shakespeare-char-cpu", "--device", "cpu", "--micro-batch", "1"]
    for override in ("model.vocab_size=65", "model.num_layers=1", "train.sequence_length=16"):
        flags += ["--set", override]
    copy = tmp_path / "copy.json"
    assert _run(["autotune", *flags, "--out", str(copy)]) == 0
    out = capsys.readouterr().out
    (file,) = cached()
    assert json.loads(file.read_text()) == json.loads(copy.read_text())
    assert out.endswith(f"kept in {file}\nand in {copy}\n")
    lines = out.splitlines()
    assert "embedding_backward: dy 16x128 float32, ids 16 int64, dtable 65x128 float32" in lines
    operations = json.loads(copy.read_text())["operations"]
    assert operations.keys() >= {"attention", "attention_backward", "gelu", "cross_entropy"}
    problems = [entry for problems in operations.values() for entry in problems.values()]
    assert sum(line.startswith("  -> ") for line in lines) == len(problems)
    assert sum(line.endswith(" us") for line in lines) == sum(len(p["times"]) for p in problems)


def test_the_page_says_what_was_refused_and_what_was_not_tried(capsys, monkeypatch):
    def tune(config, vocab_size, world, note):
        tuner = a_tuner()
        tuner.wrap("double", {"right": double, "wrong": wrong}, "right")
        tuner.wrap("triple", {"a": slow, "b": slow}, "a", reference=failing)
        with tuner.tuning():
            tuner.functions["double"](X)
            tuner.functions["triple"](X)
        return tuner

    monkeypatch.setattr("cupytron.tune.tune", tune)
    assert _run(["autotune", "--set", "model.vocab_size=9"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [f"double: {PROBLEM}", "  -> right"]
    assert lines[2].startswith("     wrong        refused: its result differs")
    assert lines[3:5] == [f"triple: {PROBLEM}", "     not tried: MemoryError: no room for"]


def test_the_command_refuses_settings_that_use_no_table(capsys):
    for flag in (["--deterministic"], ["--autotune", "off"]):
        assert _run(["autotune", "--set", "model.vocab_size=9", *flag]) == 2
        assert "use no choices" in capsys.readouterr().err

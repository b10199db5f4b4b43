"""Arithmetic per second beside the peak: which cards are known, and how shares and ranks are counted."""

import pytest

from cupytron import bench
from cupytron.comm import ParallelContext, run_ranks
from cupytron.config import flops_per_token, load_config, resolve_model
from cupytron.metrics import (
    Speed,
    card_peak,
    gflops_text,
    mfu,
    mfu_text,
    peak_memory_bytes,
    total_peak,
)

HALF = ["train.compute_dtype=bfloat16"]


@pytest.mark.parametrize(
    ("name", "settings", "tflops"),
    [
        ("NVIDIA H200", HALF, 989.4),
        ("NVIDIA H100 80GB HBM3", ["train.compute_dtype=float16"], 989.4),
        ("NVIDIA H100 PCIe", HALF, 756),
        ("NVIDIA H200", ["train.tf32=true"], 494.7),
        ("NVIDIA A100-SXM4-80GB", [], 19.5),
        ("NVIDIA A100 80GB PCIe", HALF, 312),
        ("NVIDIA B200", HALF, 2250),
        ("NVIDIA L4", HALF, 121),
        ("NVIDIA L40S", HALF, 362),
        ("NVIDIA GeForce RTX 4090", HALF, 165.2),
    ],
)
def test_a_card_s_peak_is_that_of_its_data_sheet(name, settings, tflops):
    assert card_peak(name, load_config(overrides=settings)) == tflops * 1e12


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA A10G",
        "NVIDIA GeForce RTX 4090 D",
        "Simulated GPU",
    ],
)
def test_what_is_not_quite_a_known_card_has_no_peak(name):
    assert card_peak(name, load_config(overrides=HALF)) is None


def test_no_card_is_known_in_float64():
    assert card_peak("NVIDIA H200", load_config(overrides=["train.dtype=float64"])) is None


def test_both_shares_by_hand():
    model = resolve_model(load_config().model, 100, 64)
    flops = tuple(flops_per_token(model, 64, causal) for causal in (False, True))
    shares = mfu(1000.0, flops, peak=flops[0] * 4000)
    assert shares["mfu"] == pytest.approx(0.25)
    assert shares["mfu_causal"] == pytest.approx(0.25 * flops[1] / flops[0])
    assert mfu(1000.0, flops, None) == {"mfu": None, "mfu_causal": None}
    speed = Speed(model, 64, peak=flops[0] * 4000)
    speed.add(500, 0.5)
    assert speed.read()["mfu"] == pytest.approx(0.25)
    assert speed.read()["mfu"] == 0  # counted anew
    assert "mfu" not in Speed(model, 64).read()


class Card:
    """A GPU, as far as metrics asks."""

    gpu, name = True, "cuda:0"

    def __init__(self, bus, model):
        self.bus, self.model = bus, model

    def used_bytes(self):
        return 123


def peaks(models, buses, tflops=None):
    """total_peak on ranks that have these cards."""
    config = load_config(overrides=HALF)

    def body(world):
        card = Card(buses[world.rank], models[world.rank])
        return total_peak(ParallelContext(dp=world.size, world=world, device=card), config, tflops)

    found = run_ranks(len(models), body)
    assert found.count(found[0]) == len(found)
    return found[0]


def test_cards_count_and_ranks_that_share_one_do_not():
    h200, l4 = "NVIDIA H200", "NVIDIA L4"
    assert peaks([h200, h200], ["a", "b"]) == 2 * 989.4e12
    assert peaks([h200, h200], ["a", "a"]) == 989.4e12
    assert peaks([h200, l4], ["a", "b"]) == pytest.approx(1110.4e12)
    assert peaks([h200, "another"], ["a", "b"]) is None
    assert peaks([h200, "another"], ["a", "b"], tflops=2.5) == 5e12


def test_a_cpu_has_a_peak_only_if_one_is_given():
    context, config = ParallelContext(), load_config()
    assert total_peak(context, config) is None
    assert total_peak(context, config, 0.5) == 5e11
    assert run_ranks(2, lambda w: total_peak(ParallelContext(world=w), config, 0.5)) == [1e12] * 2


def test_memory_is_the_gpu_s_where_there_is_one():
    assert peak_memory_bytes(Card("a", "b")) == 123
    assert peak_memory_bytes() > 2**20


def test_a_line_shows_the_share_only_if_it_is_known():
    assert mfu_text({"mfu": 0.4123, "mfu_causal": 0.38}) == "  MFU 41.2%/38.0%"
    assert mfu_text({"mfu": None, "mfu_causal": None}) == ""


def test_arithmetic_of_small_models_is_not_rounded_to_nothing():
    record = {"gflops_per_second": 0.01234, "gflops_per_second_causal": 1234.5}
    found = "0.0123 GFLOP/s with attention counted whole, 1,234 with its causal half"
    assert gflops_text(record) == found


# bench


class Steps:
    """A trainer whose steps take set times; on a GPU their ends are waited for, and the clock is theirs."""

    def __init__(self, clock, host, device):
        self.clock, self.host, self.device, self.free, self.started = clock, host, device, 0.0, 0
        self.most_ahead = 0

    def start_step(self, inputs, targets):
        self.clock.now += self.host
        self.free = end = max(self.free, self.clock.now) + self.device
        self.started += 1

        def numbers():
            self.started -= 1
            self.most_ahead = max(self.most_ahead, self.started)
            self.clock.now = max(self.clock.now, end)

        return numbers


class Clock:
    now = 100.0

    def perf_counter(self):
        return self.now


@pytest.mark.parametrize(
    ("host", "device", "ahead", "wanted"),
    [(1.0, 5.0, True, 5.0), (5.0, 1.0, True, 5.0), (1.0, 5.0, False, 6.0), (5.0, 0.0, False, 5.0)],
)
def test_a_step_s_time_is_from_end_to_end(monkeypatch, host, device, ahead, wanted):
    """While a GPU works on a step the host starts the next one; what takes longer counts."""
    clock = Clock()
    monkeypatch.setattr(bench, "time", clock)
    steps = Steps(clock, host, device)
    seconds = list(bench._seconds(steps, [(0, 0)] * 6, ahead))
    assert len(seconds) == 6 and steps.started == 0
    assert steps.most_ahead == (1 if ahead else 0)
    assert seconds[1:-1] == [wanted] * 4


def test_bench_says_shares_of_a_given_peak():
    config = load_config(
        overrides=[
            "model.num_layers=1",
            "model.d_model=16",
            "model.vocab_size=20",
            "train.sequence_length=8",
            "train.micro_batch=2",
            "parallel.device=cpu",
        ]
    )
    found = bench.measure(config, 2, {}, peak_tflops=0.001)
    assert found["mfu"] == pytest.approx(found["gflops_per_second"] / 1)
    assert found["mfu_causal"] == pytest.approx(found["gflops_per_second_causal"] / 1)
    assert found["steps"] == 2 and found["device"] == "cpu"
    assert bench.measure(config, 1, {})["mfu"] is None

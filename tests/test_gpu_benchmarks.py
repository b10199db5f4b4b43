"""What measures on a GPU, on the simulated one: checks run, and see mistakes; all figures are there."""

import functools
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cupytron import kernels, ops
from cupytron.config import load_config, resolve_model
from cupytron.gpu import present
from cupytron.kernels import activation, attention, optimizer, products

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks"
TINY_GPT2 = ["model.num_layers=1", "model.num_heads=2", "model.d_model=16", "model.vocab_size=65"]
TINY_GPT2 += ["model.context_length=8", "train.sequence_length=8", "parallel.autotune=off"]


def module(name):
    """A script of benchmarks/, which import each other by their names."""
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    return importlib.import_module(name)


@pytest.fixture
def gpu():
    with module("gpu_report").open_gpu(simulated=True) as found:
        yield found


def run(check):
    return module("gpu_children").run_one(check)


def holds(check):
    outcome = run(check)
    assert outcome["status"] == "ok", outcome
    return outcome["found"]


def why_it_fails(check):
    outcome = run(check)
    assert outcome["status"] == "FAILED", outcome
    return outcome["why"]


# children

CHILD = """
import atexit, os, signal, sys, time
sys.path.insert(0, sys.argv[1])
from gpu_children import Failed, Skipped, main_of_child

def raised(error):
    raise error

ill = []
checks = {
    "right": lambda: {"n": 1},
    "crash": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "wrong": lambda: raised(Failed("n is 3", {"n": 3})),
    "error": lambda: raised(ValueError("no such thing")),
    "hang": lambda: time.sleep(60),
    "none": lambda: raised(Skipped("not here")),
    "ill": lambda: ill.append(1) or raised(Failed("the device is lost")),
    "after": lambda: {"ill": len(ill)},
    "last": lambda: atexit.register(os._exit, 3) and None,
}
sys.exit(main_of_child(checks, sys.argv[2:], lambda: not ill))
"""


def test_checks_that_crash_or_hang_hide_no_other(tmp_path):
    children = module("gpu_children")
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    command = [sys.executable, str(script), str(FOLDER)]
    names = ["right", "crash", "wrong", "error", "hang", "none", "ill", "after", "last"]
    told = []
    outcomes = children.run_groups(
        [children.Group("a", command, names, limit=4), children.Group("b", command, ["x"], 4)],
        jobs=2,
        tell=lambda name, outcome: told.append(name),
    )
    found = {name: (outcome["status"], outcome.get("why")) for name, outcome in outcomes.items()}
    assert found == {
        "a/right": ("ok", None),
        "a/crash": ("FAILED", "its process died of signal SIGSEGV"),
        "a/wrong": ("FAILED", "n is 3"),
        "a/error": ("FAILED", "ValueError: no such thing"),
        "a/hang": ("FAILED", "its process took longer than 4 s"),
        "a/none": ("skipped", "not here"),
        "a/ill": ("FAILED", "the device is lost"),
        "a/after": ("ok", None),
        "a/last": ("ok", None),
        "a/process": ("FAILED", "its process died of exit code 3"),
        "b/process": ("FAILED", "its process died of exit code 2"),
        "b/x": ("FAILED", "its process ended before this check began"),
    }
    assert outcomes["a/wrong"]["found"] == {"n": 3} and sorted(told) == sorted(outcomes)
    assert outcomes["a/after"]["found"] == {"ill": 0}, "the process that is ill went on"
    assert "unknown checks: x" in outcomes["b/process"]["output"]


@pytest.mark.timeout(300)
def test_a_message_is_heard_through_noise():
    children = module("gpu_children")
    said = f'warning{children.MARK}{{"end": "a", "status": "ok"}}NCCL version 2'
    assert children.heard(said) == {"end": "a", "status": "ok"}
    for noise in ("", "text", f"{children.MARK}text", f"{children.MARK}7"):
        assert children.heard(noise) is None


def test_gpu_check_writes_a_record_and_says_what_failed(tmp_path):
    """The script itself, with its children; memory is so short in one of them that a check fails."""
    command = [sys.executable, FOLDER / "gpu_check.py", "facts", "--simulated", "--jobs", "1"]
    done = subprocess.run([*command, "--out", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "9 checks hold, 0 failed, 2 skipped" in done.stdout
    (record,) = (json.loads(path.read_text()) for path in tmp_path.glob("gpu-check-*.json"))
    facts = module("gpu_facts").FACTS
    assert set(record["checks"]) == {f"facts/{name}" for name in facts}
    assert {"machine", "versions", "gpu_before", "gpu_after", "seconds", "date"} <= set(record)


def test_every_group_names_its_checks_without_a_gpu():
    check = module("gpu_check")
    groups = {group.name: group for group in check.groups_of(list(check.GROUPS), simulated=False)}
    assert list(groups)[:4] == ["processes", "threads", "models", "runs"] and set(groups) == set(
        check.GROUPS
    )
    cases = {group.name: len(group.names) for group in groups.values()}
    assert min(cases.values()) > 0 and cases["bfloat16-1"] == cases["float64-1"] > 10
    assert "--simulated" not in groups["facts"].command


@pytest.mark.skipif(present(), reason="there is a GPU here")
@pytest.mark.parametrize("script", [("gpu_check",), ("gpu_facts",), ("gpu_bench", "kernels")])
def test_without_a_gpu_there_is_one_message(script, capsys, tmp_path):
    name, *words = script
    assert module(name).main([*words, "--out", str(tmp_path)]) == 1
    assert "there is no GPU here" in capsys.readouterr().err and not list(tmp_path.iterdir())


# facts and kernels


def test_facts_see_a_wrong_product(gpu, monkeypatch):
    facts = module("gpu_facts").FACTS
    right = products.matmul
    monkeypatch.setattr(products, "matmul", lambda a, b, out=None: right(a, b, out) * 1.1)
    assert "product" in why_it_fails(functools.partial(facts["cublaslt_in_a_graph"], gpu))


def test_facts_see_attention_that_differs(gpu, monkeypatch):
    facts = module("gpu_facts").FACTS
    right = attention.attention
    monkeypatch.setattr(attention, "attention", lambda q, k, v: right(q, k, v * 2))
    assert "attention" in why_it_fails(functools.partial(facts["cudnn_in_a_graph"], gpu))


def test_cases_of_kernels_hold(gpu):
    checks = module("gpu_kernel_checks")
    for name in checks.MODULES:
        for case in checks.checks(gpu, "bfloat16", name).values():
            found = holds(case)
            assert found["error"] <= found["limit"]


def test_what_cudnn_refuses_is_no_success(gpu, monkeypatch):
    def refuse(self):
        raise simulated_cudnn.cudnnGraphNotSupportedError("no engine")

    simulated_cudnn = module("simulated_cudnn")
    checks = module("gpu_kernel_checks").checks
    monkeypatch.setattr(kernels, "_refusals", {})
    monkeypatch.setattr(simulated_cudnn.Graph, "check_support", refuse)
    halves = checks(gpu, "bfloat16", "kernel_cases_3")
    for name in [name for name in halves if name.startswith("cudnn")]:
        assert "refused at sizes that need it: wide: cuDNN 91900 refuses it" in why_it_fails(
            halves[name]
        )
    for name in ("cudnn_packed", "half_sums"):
        outcome = run(checks(gpu, "float32", "kernel_cases_3")[name])
        assert outcome["status"] == "skipped" and "float32" in outcome["why"]
    measure, cases = module("gpu_kernels").measure, module("gpu_kernels").cases(gpu)
    with pytest.warns(RuntimeWarning, match="no engine"):
        for name in ("gpt2 attention", "gpt2 attention, backward"):
            assert "no engine" in measure(gpu, cases[name])["refused"]
    assert "refused" not in measure(gpu, cases["gpt2 up"])


def test_a_kernel_that_forgets_an_element_is_seen(gpu, monkeypatch):
    checks = module("gpu_kernel_checks").checks(gpu, "float32", "kernel_cases")
    right = activation.gelu

    def forgetful(x):
        y, saved = right(x)
        other = gpu.cupy.empty_like(y)
        other.reshape(-1)[:-1] = y.reshape(-1)[:-1]
        return other, saved

    monkeypatch.setattr(activation, "gelu", forgetful)
    assert "error inf" in why_it_fails(checks["gelu"])


def test_other_bits_the_second_time_are_seen(gpu, monkeypatch):
    checks = module("gpu_kernel_checks").checks(gpu, "float32", "kernel_cases")
    right, calls = activation.relu, []

    def moody(x):
        calls.append(x)
        y, saved = right(x)
        return y * (1 + 1e-7 * len(calls)), saved

    monkeypatch.setattr(activation, "relu", moody)
    assert "other bits the second time" in why_it_fails(checks["relu"])
    cases = module("kernel_cases")
    monkeypatch.setattr(cases, "ANY_ORDER", {"relu"}, raising=False)
    holds(checks["relu"])
    libraries = module("kernel_cases_3")
    assert libraries.ANY_ORDER < set(libraries.CASES) - {"cudnn_deterministic"}


# models


@pytest.mark.parametrize("name", ["gradients", "derivative", "curves", "replay"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_checks_of_models_hold(gpu, family, name):
    holds(module("gpu_model_checks").checks(gpu)[f"{name} of {family}"])


@pytest.mark.parametrize(
    "name", ["replay with dropout", "overflow", "no waiting, eager", "no waiting, graphs"]
)
def test_other_checks_of_models_hold(gpu, name):
    holds(module("gpu_model_checks").checks(gpu)[name])


def installed_with(monkeypatch, **changed):
    """Have some functions of the kernels' table replaced whenever a device is opened."""
    right = kernels.table
    monkeypatch.setattr(kernels, "table", lambda: {**right(), **changed})


def test_wrong_gradients_are_seen(gpu, monkeypatch):
    right = kernels.table()["sum_rows"]
    checks = module("gpu_model_checks").checks(gpu)
    installed_with(monkeypatch, sum_rows=lambda dy: right(dy) * 1.001)
    assert "gradient of" in why_it_fails(checks["gradients of gpt2"])
    assert "directional derivative" in why_it_fails(checks["derivative of gpt2"])
    installed_with(monkeypatch, sum_rows=lambda dy: right(dy) * -1)
    assert "float32" in why_it_fails(checks["curves of gpt2"])


def test_a_step_that_waits_is_seen(gpu, monkeypatch):
    right = kernels.table()["add_to"]

    def waiting(total, x):
        float(x.reshape(-1)[0])
        return right(total, x)

    installed_with(monkeypatch, add_to=waiting)
    checks = module("gpu_model_checks").checks(gpu)
    assert "ndarray.__float__" in why_it_fails(checks["no waiting, eager"])


def test_a_step_that_cannot_be_recorded_is_seen(gpu, monkeypatch):
    right = kernels.table()["add_to"]
    installed_with(monkeypatch, add_to=lambda total, x: right(total, x + float(0 * x.sum())))
    checks = module("gpu_model_checks").checks(gpu)
    assert "graphs" in why_it_fails(checks["replay of gpt2"])


def test_a_replay_with_another_step_is_seen(gpu, monkeypatch):
    """An update that the host chooses is frozen in a graph."""
    right, calls = optimizer.adamw, []

    def counting(*arrays, weight_decay, **named):
        calls.append(None)
        right(*arrays, weight_decay=weight_decay * (len(calls) % 5), **named)

    monkeypatch.setattr(optimizer, "adamw", counting)
    assert "differ" in why_it_fails(module("gpu_model_checks").checks(gpu)["replay of gpt2"])


# runs and ranks


def test_checks_of_runs_hold(gpu):
    for check in module("gpu_run_checks").checks(gpu).values():
        holds(check)


@pytest.mark.parametrize("name", ["out of memory", "recording in little memory"])
def test_checks_of_memory_hold(gpu, name):
    holds(module("gpu_run_checks").memory_checks(gpu)[name])


def test_ranks_that_share_the_gpu_hold(gpu):
    checks = module("gpu_rank_checks")
    holds(checks.thread_checks(gpu)["threads"])
    processes = checks.process_checks(gpu).values()
    assert [run(check)["status"] for check in processes] == ["skipped"] * 3


def test_ranks_with_other_numbers_are_seen(gpu, monkeypatch):
    """A sum over ranks that adds one of them twice."""
    staged = importlib.import_module("cupytron.comm.staged").Staged
    right = staged._all_reduce

    def twice(self, x):
        if self.size > 1:
            x += x * (self.rank == 0)
        return right(self, x)

    monkeypatch.setattr(staged, "_all_reduce", twice)
    assert "other numbers" in why_it_fails(module("gpu_rank_checks").thread_checks(gpu)["threads"])


# costs


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_costs_by_hand_are_those_of_the_calls(gpu, family):
    costs, checks = module("gpu_costs"), module("gpu_model_checks")
    settings = checks.settings_of(gpu, *checks.FAMILIES[family], "train.compute_dtype=bfloat16")
    trainer = checks.trainer_on(
        "cuda", [*settings, "parallel.graphs=false", "train.global_batch=2"]
    )
    batches = checks.batches(trainer, 9)
    found = module("gpu_profile").profile(gpu, trainer, lambda: next(batches), steps=1)
    by_hand = {row.operation: row for row in costs.together(costs.step(trainer.model.config, 2, 8))}
    counted = found["operations"]
    assert set(by_hand) - {"array"} == set(counted) - {"everything else"}
    for name, row in by_hand.items():
        if name == "array":
            continue
        if name not in ("adamw", "squares"):  # a call for each bucket
            assert counted[name]["calls"] == row.calls, name
        results = 8 * counted[name]["calls"] if name == "squares" else 0
        assert counted[name]["flops"] == pytest.approx(row.calls * row.cost.flops), name
        near = pytest.approx(row.calls * row.cost.nbytes + results, rel=1e-3)
        assert counted[name]["bytes"] == near, name


def test_flops_by_hand_are_the_configuration_s():
    """Six for each weight of a product and token, as config.flops_per_token counts."""
    costs = module("gpu_costs")
    for preset in ("gpt2-124m", "llama-1b"):
        config = load_config(preset=preset)
        length = config.train.sequence_length
        model = resolve_model(config.model, None, length)
        rows = costs.step(model, 3, length)
        total = sum(row.calls * row.cost.flops for row in rows) / (3 * length)
        formula = importlib.import_module("cupytron.config").flops_per_token(model, length, True)
        attention_again = (
            model.num_layers * model.d_model * (length + 1)
        )  # backward makes q k^T again
        diagonal = 6 * model.num_layers * model.d_model
        assert total == pytest.approx(formula + attention_again + diagonal, rel=1e-9)


def test_the_page_has_the_table_that_the_script_prints():
    page = (ROOT / "docs" / "performance.md").read_text()
    command = re.search(r"python benchmarks/gpu_costs.py (.*)", page)
    assert command is not None
    words = [sys.executable, FOLDER / "gpu_costs.py", *command[1].split()]
    printed = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert printed.strip() in page


# side by side


def record_of(folder, *words):
    assert module("gpu_bench").main([*words, "--simulated", "--out", str(folder)]) == 0
    (path,) = folder.glob("gpu-*.json")
    return json.loads(path.read_text())


def test_speed_of_cupytron_alone(tmp_path, capsys):
    record = record_of(tmp_path, "gpt2-124m", "--torch-python", "")
    one = record["summary"]["cupytron"]
    assert one["tokens_per_second"] > 0 and len(one["mfu"]) == 2 and one["taken_bytes"] > 0
    assert one["estimate_bytes"] > 0 and one["lowest"] <= one["tokens_per_second"] <= one["highest"]
    assert set(record["contenders"]["cupytron"]["tried"]) <= {"2", "3"}
    assert "| cupytron |" in capsys.readouterr().out
    assert {"bandwidth", "rate"} == set(record["ceilings"])


def test_who_is_parked_holds_no_activations(gpu):
    cupytron = module("gpu_cupytron").Cupytron(gpu)
    cupytron.build("shakespeare-char", [*TINY_GPT2, "model.dropout=0"], 2)
    device = cupytron.trainer.context.device
    held = [graph.pool.total_bytes() for graph in device.graphs]
    assert sum(held) > 0
    cupytron.park()
    left = sum(graph.pool.total_bytes() for graph in device.graphs)
    assert left < sum(held) / 10  # the last loss
    assert cupytron.run(2)["loss"] > 0


def test_every_kernel_is_measured_in_a_graph(tmp_path):
    record = record_of(tmp_path, "kernels", "--torch-python", "")
    assert {"gelu", "adamw", "gpt2 up", "llama attention, backward"} <= set(record["kernels"])
    for name, outcome in record["kernels"].items():
        assert outcome["status"] == "ok", (name, outcome)
        if name != "ceilings":
            assert outcome["found"]["how"] == "graph", (name, outcome["found"]["why"])
            assert outcome["found"]["bytes"] > 0 and outcome["found"]["seconds"] > 0


def test_a_kernel_that_fails_is_a_case_that_failed(tmp_path, monkeypatch, capsys):
    def broken(x):
        raise RuntimeError("no kernel")

    monkeypatch.setattr(activation, "gelu", broken)
    words = ["kernels", "--simulated", "--torch-python", "", "--out", str(tmp_path)]
    assert module("gpu_bench").main(words) == 1
    assert "kernels that failed: gelu" in capsys.readouterr().out


def test_a_profile_adds_up_to_the_step(tmp_path):
    found = record_of(tmp_path, "profile", "--torch-python", "")["cupytron"]
    seconds = sum(row["seconds"] for row in found["operations"].values())
    assert seconds == pytest.approx(found["step_seconds"])
    assert found["operations"]["linear"]["flops"] > 0


def test_a_case_without_its_corpus_fails(tmp_path, capsys):
    words = ["train-shakespeare", "--simulated", "--text", str(tmp_path / "none.txt")]
    assert module("gpu_bench").main([*words, "--out", str(tmp_path)]) == 1
    assert "none.txt: no such file" in capsys.readouterr().out


PROGRAM = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
from gpu_contenders import serve

class Program:
    def double(self, n):
        print("some noise")
        return {"n": 2 * n}
    def fail(self):
        raise MemoryError("no room")
    def die(self):
        print("last words", flush=True)
        os._exit(3)
    def hang(self):
        time.sleep(60)

serve(Program())
"""


def test_contenders_answer_fail_and_die(tmp_path):
    contenders, failed = module("gpu_contenders"), module("gpu_children").Failed
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    command = [sys.executable, str(script), str(FOLDER)]
    child = contenders.Child(command)
    assert child.ask("double", n=4) == {"n": 8}
    assert child.ask("fail") == {"error": "MemoryError: no room"}
    assert "no attribute" in child.ask("nothing")["error"]
    with pytest.raises(failed, match=r"(?s)ended.*last words"):
        child.ask("die")
    with pytest.raises(failed, match="ended"):
        child.ask("double", n=4)
    slow = contenders.Child(command)
    with pytest.raises(failed, match=r"no answer within 0\.5 s"):
        slow.ask("hang", limit=0.5)
    assert slow.process.poll() is not None


# beside PyTorch


@pytest.mark.torch
@pytest.mark.parametrize("settings", [[], ["model.family=llama", "model.num_kv_heads=1"]])
def test_the_model_of_pytorch_has_cupytron_s_loss(settings):
    torch = pytest.importorskip("torch")
    from cupytron.trainer import Trainer

    config = load_config(overrides=[*TINY_GPT2, *settings, "model.dropout=0.2"])
    alone = Trainer(config)
    alone.materialize()
    ids, targets = np.random.default_rng(3).integers(0, 65, (2, 4, 8))
    model = module("gpu_torch_gpt").make_model(alone.model.config)
    weights = {name: parameter.data for name, parameter in alone.model.named_parameters()}
    module("torch_gpt").load_cupytron(model, weights)
    total, count = alone.evaluate([(ids, targets)])
    model.eval()
    loss = model(torch.from_numpy(ids), torch.from_numpy(targets))
    assert loss.item() == pytest.approx(total / count, rel=1e-5)
    model.train()
    dropped = model(torch.from_numpy(ids), torch.from_numpy(targets))
    assert abs(dropped.item() - loss.item()) > 1e-6


@pytest.mark.torch
def test_both_train_to_the_same_losses(tmp_path):
    pytest.importorskip("torch")
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{n} brown foxes jump over {n * n} dogs.\n" for n in range(60)))
    record = record_of(tmp_path, "train-shakespeare", "--text", str(text))
    mine, theirs = (record["curves"][name] for name in ("cupytron", "torch"))
    assert mine["parameters"] == theirs["parameters"] and mine["steps"] == 4
    assert mine["val_losses"] == pytest.approx(theirs["val_losses"], abs=2e-3)
    assert mine["val_losses"][0] != mine["val_losses"][1]


@pytest.mark.torch
def test_speed_beside_pytorch(tmp_path):
    pytest.importorskip("torch")
    record = record_of(tmp_path, "shakespeare-char")
    assert set(record["contenders"]) == {"cupytron", "torch", "torch_graphs"}
    assert record["summary"]["speed"] > 0
    kernels_record = record_of(tmp_path / "kernels", "kernels")
    assert "llama attention, backward" in kernels_record["torch"]
    profiled = record_of(tmp_path / "profile", "profile")
    assert profiled["torch"]["kernels"] and profiled["torch"]["seconds_of_kernels"] > 0


def test_ops_are_the_reference_again():
    assert all(getattr(ops, name) is function for name, function in ops.REFERENCE.items())

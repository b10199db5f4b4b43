"""cupytron and PyTorch side by side on a GPU.

    python benchmarks/gpu_bench.py CASE [--out FOLDER] [--torch-python PATH] [--text FILE]
    python benchmarks/gpu_bench.py CASE --simulated          a dry run without a GPU, with tiny sizes

Cases: kernels; gpt2-124m, gpt2-350m, llama-1b, shakespeare-char (tokens per second at the best micro-batch
of each, memory at the same one); train-shakespeare (5,000 steps of each); profile (where a step's time
goes). Each ends within nine minutes.

Both stay loaded and run in turn, round after round, so that what slows the GPU down slows both. The record
FOLDER/gpu-CASE-DATE.json has clocks and power as nvidia-smi found them, and is written as the case goes on.
"""

import argparse
import contextlib
import functools
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib import util
from pathlib import Path
from typing import Any

import gpu_kernels
import gpu_profile
from gpu_children import Failed, Group, Json, main_of_child, run_groups, run_one
from gpu_contenders import Bench
from gpu_report import (
    HERE,
    Gpu,
    add_options,
    begin,
    has_gpu,
    healthy,
    markdown,
    open_gpu,
    path_for,
    save,
    state,
)
from gpu_speed import SETTINGS, models, setting_of, tokens_of
from gpu_timing import Ceilings

TEXT = HERE.parents[1] / "shared" / "data" / "tinyshakespeare.txt"
KERNEL_LIMIT = 60.0  # seconds for each
STEPS, EVAL_INTERVAL = 5000, 250
NEAR = 0.01  # that the best validation losses may be apart
PUBLISHED = 1.4697  # nanoGPT's, at 5,000 steps


def kernels(bench: Bench) -> None:
    """Each kernel's share of the ceilings, then the same products and attention by PyTorch."""
    outcomes: Json = {}

    def note(name: str, outcome: Json) -> None:
        outcomes[name.partition("/")[2]] = outcome
        bench.note(kernels=outcomes)

    if bench.gpu is not None:
        for name, check in gpu_kernels.checks(bench.gpu).items():
            note(f"kernels/{name}", run_one(check))
    else:
        command = [sys.executable, str(HERE / "gpu_bench.py"), "--child", "kernels"]
        names = list(gpu_kernels.checks(Gpu(None, simulated=False, tiny=False)))
        run_groups([Group("kernels", command, names, KERNEL_LIMIT)], 1, note)
    if outcomes["ceilings"]["status"] != "ok":
        raise Failed(f"the ceilings cannot be measured: {outcomes['ceilings'].get('why')}")
    bench.say(gpu_kernels.table(outcomes))
    bench.note(kernels=outcomes)
    if len(bench.names()) > 1:
        beside_torch(bench, outcomes)
    if failed := [name for name, outcome in outcomes.items() if outcome["status"] == "FAILED"]:
        raise Failed(f"kernels that failed: {', '.join(failed)}")


def beside_torch(bench: Bench, outcomes: Json) -> None:
    """Products and attention by PyTorch on the same shapes; of attention the faster of two libraries."""
    shapes = {"gpt2": gpu_kernels.GPT2, "llama": gpu_kernels.LLAMA}
    if bench.dry:
        shapes = dict.fromkeys(shapes, gpu_kernels.TINY)
    products = {
        f"{model} {name}": sizes
        for model, shape in shapes.items()
        for name, sizes in gpu_kernels.product_shapes(shape).items()
    }
    heads = {model: shape["heads"] for model, shape in shapes.items()}
    theirs: dict[str, Json] = {}
    for rival, of_products in (("torch", products), ("torch_cudnn", {})):
        said = bench.open(rival).ask("kernels", products=of_products, heads=heads, limit=120.0)
        bench.note(**{rival: said})
        if "error" in said:
            bench.say(f"{rival}: {said['error'][:300]}")
        else:
            theirs[rival] = said
    rows = []
    for name, outcome in outcomes.items():
        best = min((said[name] for said in theirs.values() if name in said), default=None)
        if best is not None and outcome["status"] == "ok":
            mine = outcome["found"]["seconds"]
            rows.append((name, f"{mine * 1e6:.1f}", f"{best * 1e6:.1f}", f"{best / mine:.2f}x"))
    bench.say(markdown(("kernel", "cupytron, us", "PyTorch, us", "speed"), rows))


def training(bench: Bench, text: Path) -> None:
    """5,000 steps of each on characters of Shakespeare, from the same weights on the same batches."""
    from cupytron.data import prepare_dataset

    if not text.exists():
        raise Failed(f"{text}: no such file; give the corpus with --text FILE")
    preset = "shakespeare-char"
    setting = setting_of(bench, preset)
    size = setting.sizes[0]
    steps, interval = (4, 2) if bench.dry else (STEPS, EVAL_INTERVAL)
    # the vocabulary is the text's
    settings = [s for s in setting.settings if "vocab_size" not in s]
    settings += [f"train.max_steps={steps}", "train.eval_interval=0"]
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        prepare_dataset([str(text)], data, tokenizer="char", val_fraction=0.1)
        contenders = {name: bench.open(name) for name in bench.names()}
        curves: dict[str, Json] = {}
        words: Json = {"data": str(data), "preset": preset, "settings": settings}
        for name, one in contenders.items():
            opened = bench.told(one.ask("open_training", micro_batch=size, **words), name)
            curves[name] = {"seconds": 0.0, "steps": 0, "val_losses": [], "losses": [], **opened}
        taken = bench.left()
        for step in range(interval, steps + 1, interval):
            for name, one in contenders.items():
                curve = curves[name]
                run = bench.told(one.ask("train", steps=interval), name)
                curve["losses"].append(run["loss"])
                curve["seconds"] += run["seconds"]
                curve["steps"] = step
                curve["val_losses"].append(bench.told(one.ask("evaluate"), name)["val_loss"])
            shown = (f"{name} {curve['val_losses'][-1]:.4f}" for name, curve in curves.items())
            bench.say(f"  step {step}: validation loss {', '.join(shown)}")
            states = [*bench.record.get("states", []), {} if bench.dry else state()]
            bench.note(curves=curves, states=states)
            if bench.left() < (taken - bench.left()) * interval / step:
                bench.say(f"  no time for more than {step} steps")
                break
    tokens = size * tokens_of(preset, tuple(settings))
    rows = []
    for name, curve in curves.items():
        curve["best"] = min(curve["val_losses"])
        where = (curve["val_losses"].index(curve["best"]) + 1) * interval
        rate = curve["steps"] * tokens / curve["seconds"]
        rows.append(
            (name, f"{curve['best']:.4f}", where, f"{curve['seconds']:.1f}", f"{rate:,.0f}")
        )
    bench.note(curves=curves)
    bench.say(markdown(("", "best validation loss", "at step", "seconds", "tokens/s"), rows))
    if "torch" in curves:
        away = curves["cupytron"]["best"] - curves["torch"]["best"]
        bench.note(difference=away)
        verdict = "holds" if abs(away) <= NEAR else "FALLS SHORT"
        bench.say(f"{verdict}: {away:+.4f} from PyTorch's, at most {NEAR}; nanoGPT: {PUBLISHED}")


def profile(bench: Bench, preset: str) -> None:
    """Operations of a step of cupytron, and kernels of one of PyTorch."""
    setting = setting_of(bench, preset)
    size, steps = setting.sizes[0], 1 if bench.dry else 5
    cupytron = bench.open("cupytron")
    limits = Ceilings(**bench.told(cupytron.ask("ceilings"), "ceilings"))
    bench.note(ceilings=limits._asdict(), preset=preset, micro_batch=size)
    settings = [*setting.settings, "parallel.graphs=false"]
    for name in bench.names():
        one = cupytron if name == "cupytron" else bench.open(name)
        found = one.ask("build", preset=preset, settings=settings, micro_batch=size)
        if "error" not in found:
            found = one.ask("profile", steps=steps)
        one.ask("drop")
        bench.note(**{name: found})
        if "error" in found:
            bench.say(f"{name}: {found['error']}")
        elif name == "cupytron":
            bench.say(gpu_profile.table(found, limits))
        else:
            bench.say(gpu_profile.table_of_torch(found))


CASES: dict[str, Callable[..., None]] = {
    "kernels": kernels,
    **{preset: functools.partial(models, preset=preset) for preset in SETTINGS},
    "train-shakespeare": training,
    "profile": profile,
}


@contextlib.contextmanager
def simulated_or_none(simulated: bool) -> Iterator[Gpu | None]:
    """The simulated GPU in this process; a real one is opened by the contenders."""
    with open_gpu(True) if simulated else contextlib.nullcontext() as gpu:
        yield gpu


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("names", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument(
        "--torch-python",
        metavar="PATH",
        help="an interpreter with PyTorch, or nothing; default: this one",
    )
    parser.add_argument("--text", type=Path, default=TEXT, help="train-shakespeare: the corpus")
    parser.add_argument("--preset", default="gpt2-124m", choices=SETTINGS, help="profile: of what")
    add_options(parser)
    arguments = parser.parse_args(words)
    case = arguments.case
    if arguments.child:
        with open_gpu() as gpu:
            return main_of_child(gpu_kernels.checks(gpu), arguments.names, lambda: healthy(gpu))
    if not has_gpu(arguments.simulated):
        return 1
    python = arguments.torch_python
    if python is None and util.find_spec("torch"):
        python = sys.executable
    if not python:
        print("PyTorch is not installed here: only cupytron is measured; use --torch-python PATH")
    record = {**begin(arguments.simulated), "case": case, "failed": None}
    path = path_for(record, arguments.out, f"gpu-{case}")
    more: dict[str, tuple[Any, ...]] = {
        "train-shakespeare": (arguments.text,),
        "profile": (arguments.preset,),
    }
    with simulated_or_none(arguments.simulated) as gpu:
        bench = Bench(record, path, gpu, python)
        try:
            with bench.stack:
                CASES[case](bench, *more.get(case, ()))
        except Failed as error:
            record["failed"] = str(error)
            print(f"FAILED: {error}")
    save(record, path, last=True)
    print(f"written: {path}")
    return int(record["failed"] is not None)


if __name__ == "__main__":
    sys.exit(main())

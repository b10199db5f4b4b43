"""Tokens per second of cupytron and PyTorch, each at its best micro-batch, and memory at the same one."""

import statistics
import time
from typing import Any, NamedTuple

from gpu_children import Failed, Json
from gpu_contenders import Bench, Contender, configuration
from gpu_report import markdown, state
from gpu_timing import Ceilings

PEAK = 989e12  # of an H100 or H200 in dense bfloat16, by the datasheet
ROUNDS, ROUND_SECONDS = 5, 2.0
TRIAL = 5  # steps of a micro-batch that is tried
SEARCH_SECONDS = 120.0  # after which a contender tries no other micro-batch
WORSE = 0.97  # of the best so far: larger micro-batches are not tried
RESERVE = 20.0  # seconds of a case that are left when a round begins


class Setting(NamedTuple):
    """What is measured of a preset.

    sizes: micro-batches to try, smaller ones first; memory is compared at the first. settings: overrides.
    """

    sizes: tuple[int, ...]
    settings: tuple[str, ...] = ()
    rivals: tuple[str, ...] = ("torch",)


SETTINGS = {
    "gpt2-124m": Setting((16, 32, 64)),
    "gpt2-350m": Setting((8, 16, 32)),
    "llama-1b": Setting((2, 4, 8)),
    "shakespeare-char": Setting((64,), ("model.vocab_size=65",), ("torch", "torch_graphs")),
}
TINY_SIZES = (2, 3)
TINY = (
    "model.num_layers=1",
    "model.num_heads=2",
    "model.num_kv_heads=1",
    "model.d_model=16",
    "model.d_ff=32",
    "model.vocab_size=65",
    "model.context_length=8",
    "train.sequence_length=8",
    "parallel.autotune=off",
)


def setting_of(bench: Bench, preset: str) -> Setting:
    """What to measure of a preset; in a dry run little."""
    setting = SETTINGS[preset]
    return setting._replace(sizes=TINY_SIZES, settings=TINY) if bench.dry else setting


def tokens_of(preset: str, settings: tuple[str, ...]) -> int:
    """Tokens of a sequence."""
    return configuration(preset, list(settings), 1, "cpu").train.sequence_length


def models(bench: Bench, preset: str) -> None:
    """Search, then rounds, and a table."""
    setting = setting_of(bench, preset)
    cupytron = bench.open("cupytron")
    limits = Ceilings(**bench.told(cupytron.ask("ceilings"), "ceilings"))
    contenders: dict[str, Contender] = {}
    found: Json = {}
    bench.note(
        preset=preset, settings=setting.settings, ceilings=limits._asdict(), contenders=found
    )
    for name in bench.names(setting.rivals):
        one = cupytron if name == "cupytron" else bench.open(name)
        found[name] = {"tried": {}, "best": None}
        try:
            search(bench, name, one, preset, setting, found[name])
        except Failed as error:
            found[name] |= {"best": None, "died": str(error)}
            bench.say(f"  {name}: {error}")
        if found[name]["best"] is not None:
            contenders[name] = one
        bench.note(contenders=found)
    if "cupytron" not in contenders:
        raise Failed(f"cupytron cannot run {preset}: {found['cupytron']}")
    rounds(bench, contenders, found, preset, setting)
    result = summary(found, preset, setting, limits, list(contenders))
    bench.note(summary=result)
    bench.say(table(result))


def search(
    bench: Bench, name: str, one: Contender, preset: str, setting: Setting, found: Json
) -> None:
    """Try the micro-batches of a contender: tokens per second and memory of each, and the best one."""
    length, steps = tokens_of(preset, setting.settings), 1 if bench.dry else TRIAL
    began, best = time.monotonic(), 0.0
    for size in setting.sizes:
        said = one.ask(
            "build", preset=preset, settings=list(setting.settings), micro_batch=size,
            limit=min(300.0, bench.left()),
        )  # fmt: skip
        if "error" not in said:
            said["build_seconds"] = said.pop("seconds")
            said |= one.ask("run", steps=steps)
        if "error" not in said:
            said |= one.ask("memory")
        found["tried"][size] = said
        one.ask("park")
        if "error" in said:
            bench.say(f"  {name} {size}: {said['error'][:150]}")
            return
        rate = said["tokens_per_second"] = steps * size * length / said["seconds"]
        bench.say(f"  {name} {size}: {rate:,.0f} tokens/s")
        if rate > best:
            best, found["best"] = rate, size
        if rate < WORSE * best or time.monotonic() - began > SEARCH_SECONDS:
            return


def rounds(
    bench: Bench, contenders: dict[str, Contender], found: Json, preset: str, setting: Setting
) -> None:
    """Run the contenders in turn at their best micro-batches."""
    length = tokens_of(preset, setting.settings)
    steps = {}
    for name, one in contenders.items():
        size, tried = found[name]["best"], found[name]["tried"]
        if size != list(tried)[-1]:
            words: Json = {"preset": preset, "settings": list(setting.settings)}
            bench.told(one.ask("build", micro_batch=size, **words), name)
            one.ask("park")
        each = size * length / tried[size]["tokens_per_second"]
        steps[name] = 1 if bench.dry else max(3, min(400, round(ROUND_SECONDS / each)))
        found[name] |= {"rounds": [], "states": []}
    for number in range(2 if bench.dry else ROUNDS):
        if number >= 2 and bench.left() < RESERVE + number * len(contenders) * ROUND_SECONDS:
            bench.say(f"  no time for round {number + 1}")
            break
        # neither is always the one that comes first
        for name in list(contenders)[:: -1 if number % 2 else 1]:
            try:
                run = bench.told(contenders[name].ask("run", steps=steps[name]), name)
            except Failed as error:
                if name == "cupytron":
                    raise
                bench.say(f"  round {number + 1} {name}: {error}")
                found[name]["died"] = str(error)
                del contenders[name]
                continue
            rate = steps[name] * found[name]["best"] * length / run["seconds"]
            found[name]["rounds"].append(rate)
            found[name]["states"].append({} if bench.dry else state())
            contenders[name].ask("park")
            bench.say(f"  round {number + 1} {name}: {rate:,.0f} tokens/s")
        bench.note(contenders=found)


def summary(found: Json, preset: str, setting: Setting, limits: Ceilings, names: list[str]) -> Json:
    """Medians of the rounds, MFU in both conventions, and ratios to the fastest rival."""
    from cupytron.config import resolve_model
    from cupytron.metrics import both_flops

    config = configuration(preset, list(setting.settings), 1, "cpu")
    length = config.train.sequence_length
    whole, causal = both_flops(resolve_model(config.model, None, length), length)
    result: Json = {}
    for name in names:
        rate = statistics.median(found[name]["rounds"])
        first = found[name]["tried"][setting.sizes[0]]
        result[name] = {
            "micro_batch": found[name]["best"],
            "parameters": first["parameters"],
            "tokens_per_second": rate,
            "lowest": min(found[name]["rounds"]),
            "highest": max(found[name]["rounds"]),
            "mfu": [rate * flops / PEAK for flops in (whole, causal)],
            "of_product": [rate * flops / limits.rate for flops in (whole, causal)],
            "memory_micro_batch": setting.sizes[0],
            **{key: first[key] for key in first if key.endswith("_bytes")},
        }
    counts = {one["parameters"] for one in result.values()}
    if len(counts) > 1:
        raise Failed(f"{preset}: parameter counts differ: {sorted(counts)}")
    rivals = [result[name] for name in names if name != "cupytron"]
    if rivals:
        mine = result["cupytron"]
        result["speed"] = mine["tokens_per_second"] / max(r["tokens_per_second"] for r in rivals)
        least = min(r["taken_bytes"] for r in rivals)
        result["memory"] = mine["taken_bytes"] / least if least else None
    return result


def table(result: Json) -> str:
    """The summary, for the reader."""
    header = ("", "micro-batch", "tokens/s", "lowest, highest", "MFU of 989 TFLOP/s, whole/causal",
              "of the measured product", "memory (micro-batch)")  # fmt: skip
    rows: list[tuple[Any, ...]] = []
    for name, one in result.items():
        if isinstance(one, dict):
            rows.append(
                (
                    name,
                    one["micro_batch"],
                    f"{one['tokens_per_second']:,.0f}",
                    f"{one['lowest']:,.0f}, {one['highest']:,.0f}",
                    "/".join(f"{share:.1%}" for share in one["mfu"]),
                    "/".join(f"{share:.1%}" for share in one["of_product"]),
                    f"{one['taken_bytes'] / 2**30:.2f} GiB ({one['memory_micro_batch']})",
                )
            )
    text = markdown(header, rows)
    if "speed" in result:
        memory = f", {result['memory']:.2f}x its memory" if result["memory"] else ""
        text += f"\n\ncupytron: {result['speed']:.2f}x PyTorch's speed{memory}"
    return text

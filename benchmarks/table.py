"""The benchmark's record as tables of time and memory. Markdown that also reads well as text.

python benchmarks/table.py benchmarks/results/FILE.json
"""

import json
import sys
from pathlib import Path
from typing import Any

# title -> contenders and ratios of one pair of tables
TABLES: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "One process, and PyTorch": (
        {
            "cupytron": "cupytron",
            "torch_eager": "eager",
            "torch_compiled": "compiled",
            "torch_eager_avx512": "eager, AVX-512",
            "torch_compiled_avx512": "compiled, AVX-512",
        },
        {"as_installed": "to PyTorch", "avx512": "to AVX-512"},
    ),
    "Ranks with one thread each (2 ranks: dp=2, ZeRO 1)": (
        {
            "cupytron": "one process",
            "cupytron_dp2": "2 ranks",
            "cupytron_tp2": "tp=2",
            "cupytron_dp4": "4 ranks",
            "cupytron_tp2_dp4": "8 ranks",
        },
        {
            "as_installed_2_ranks": "2 ranks to PyTorch",
            "avx512_2_ranks": "to AVX-512",
            "cupytron_dp2_to_one_process": "to one process",
            "cupytron_tp2_to_one_process": "tp=2 to one process",
        },
    ),
}


def _time(run: dict[str, Any]) -> str:
    return f"{run['ms_per_step']:.1f} ms, {run['tokens_per_second'] / 1e3:.1f} k/s"


def _memory(run: dict[str, Any]) -> str:
    return f"{run['peak_memory_bytes'] / 1e6:.0f} MB"


def _rows(record: dict[str, Any], title: str, ratio: str) -> list[list[str]]:
    """Header and a row for each setting; a contender that failed is shown as that."""
    columns, ratios = TABLES[title]
    summaries = {name: found["summary"] for name, found in record["settings"].items()}
    keys = [key for key in columns if any(key in s["contenders"] for s in summaries.values())]
    kinds = [kind for kind in ratios if any(kind in s["ratios"] for s in summaries.values())]
    cell = _time if ratio == "speed" else _memory
    rows = [["setting", "parameters", *(columns[key] for key in keys)]]
    rows[0] += [f"{ratio} {ratios[kind]}" for kind in kinds]
    for name, summary in summaries.items():
        runs = [summary["contenders"][key] for key in keys]
        counts = [run["parameters"] for run in runs if "parameters" in run]
        row = [name, f"{counts[0]:,}" if counts else "?"]
        row += ["failed" if "error" in run else cell(run) for run in runs]
        for kind in kinds:
            found = summary["ratios"].get(kind)
            row.append(f"{found[ratio]:.2f}x" if found else "-")
        rows.append(row)
    return rows


def _markdown(rows: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    lines.insert(1, "| " + " | ".join("-" * width for width in widths) + " |")
    return "\n".join(lines)


def print_tables(record: dict[str, Any]) -> None:
    """Print the machine, both tables, and why a contender failed."""
    facts = record["machine"]
    versions = ", ".join(f"{name} {value}" for name, value in record["versions"].items())
    print(f"{facts['cpu']}, {facts['cores']} cores; {versions}; {record['date']}")
    print(f"{record['threads']} threads, medians of {record['rounds']} rounds, float32\n")
    print("Median step, thousands of tokens a second; speed: against PyTorch's faster mode.")
    print("Peak memory of the largest process; memory: against the smaller of PyTorch's modes.")
    for title in TABLES:
        print(f"\n{title}\n")
        print(_markdown(_rows(record, title, "speed")) + "\n")
        print(_markdown(_rows(record, title, "memory")))
    for name, found in record["settings"].items():
        for key, run in found["summary"]["contenders"].items():
            if "error" in run:
                print(f"\n{name} {key} failed: {run['error']}")


if __name__ == "__main__":
    print_tables(json.loads(Path(sys.argv[1]).read_text()))

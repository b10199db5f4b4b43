"""Several runs next to each other: their curves, their figures, and the settings in which they differ."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cupytron import chart, report, report_page
from cupytron.chart import Point, Series
from cupytron.errors import CupytronError
from cupytron.manifest import read_manifest
from cupytron.printable import printable
from cupytron.report import Report
from cupytron.run_folder import RunFolder
from cupytron.sealed import step_folder
from cupytron.sealed_schema import check_types

MOST_RUNS = 8  # no more lines can be told apart
_DASHES: tuple[Any, ...] = ("solid", (0, (7, 3)), (0, (2, 2)), (0, (9, 2, 2, 2)))
# (on white paper, on dark paper): told apart by readers who do not see red, green or blue well
_COLOURS = (
    ("#0072b2", "#6cb8f0"),
    ("#c44e00", "#ff9a5a"),
    ("#00795a", "#4fcfa5"),
    ("#a3447e", "#e9a3cc"),
    ("#7a5c00", "#e0c35a"),
    ("#5b3fa0", "#b9a3f5"),
    ("#5f5f5f", "#c4c4c4"),
    ("#b00020", "#ff8a93"),
)


@dataclass
class Compared:
    """One of the runs.

    Attributes:
        tag: a letter, which stands at the end of its lines.
        name: the run's folder; with the folders above it, if another run has the same name.
        report: its records. settings: all of them by "section.key", defaults too.
        data: the hashes of its data and of its tokenizer, as its newest checkpoint seals them.
        bits_per_byte: of the best validation loss; None: not known.
    """

    tag: str
    name: str
    report: Report
    settings: dict[str, Any]
    data: dict[str, Any]
    bits_per_byte: float | None = None

    def figures(self) -> dict[str, str]:
        """The figures of the run by their names, ready to be shown."""
        found: dict[str, str] = {}
        points = [p for values in self.report.curves.values() for p in values]
        if points:
            found["Step"] = f"{max(x for x, _ in points):,.0f}"
        for name, value, remark in report.key_figures(self.report):
            found[name] = f"{value} ({remark})" if remark.startswith("at step") else value
            if name == "Best validation loss":
                found["Last validation loss"] = f"{self.report.curve('val_loss')[-1][1]:.4f}"
        if self.bits_per_byte is not None:
            found["Bits per byte"] = f"{self.bits_per_byte:.4f}"
        return found


@dataclass
class Comparison:
    """Runs, the settings in which they differ with each run's value, and what a reader has to know."""

    runs: list[Compared]
    settings: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def table(self) -> dict[str, list[str]]:
        """The figures by their names, with each run's value; "-" for one that is not known."""
        each = [run.figures() for run in self.runs]
        names = dict.fromkeys(name for figures in each for name in figures)
        return {name: [figures.get(name, "-") for figures in each] for name in names}


def read(paths: Sequence[str | Path]) -> Comparison:
    """Read the records and the settings of several runs; they may be in progress.

    Args:
        paths: two to MOST_RUNS folders of runs.

    Raises:
        CupytronError: too few or too many, one is given twice, or a folder is not a run's.
    """
    places = [Path(path) for path in paths]
    if not 2 <= len(places) <= MOST_RUNS:
        raise CupytronError(
            f"{len(places)} {'run is' if len(places) == 1 else 'runs are'} given; 2 to {MOST_RUNS} "
            "can be compared"
        )
    seen: dict[Path, Path] = {}
    for place in places:
        other = seen.setdefault(place.resolve(), place)
        if other is not place:
            raise CupytronError(f"{place} is the same run as {other}; give each run once")
    names = _names(places)
    tags = "ABCDEFGH"
    found = Comparison([_run(*each) for each in zip(tags, names, places, strict=False)])
    found.settings = _differences(found.runs)
    found.notes = list(_notes(found.runs))
    return found


def _names(places: Sequence[Path]) -> list[str]:
    """A short name for each folder: as many of its last parts as it takes to tell them apart."""
    parts = [place.resolve().parts for place in places]
    length = 1
    while len({part[-length:] for part in parts}) < len(parts):
        length += 1
    return ["/".join(part[-length:]) for part in parts]


def _run(tag: str, name: str, place: Path) -> Compared:
    folder = RunFolder(place).require()
    records = report.read_records(folder)
    data = _sealed_data(folder)
    run = Compared(tag, name, records, _settings(folder, records), data)
    run.bits_per_byte = _bits_per_byte(run)
    return run


def _settings(folder: RunFolder, records: Report) -> dict[str, Any]:
    """Every setting by "section.key"; of a run of another version those that config.toml has."""
    from cupytron.config import load_config

    try:
        sections = load_config(file=folder.config).model_dump(mode="json")
    except CupytronError:
        sections = records.settings
    return {
        f"{section}.{key}": value
        for section, table in sections.items()
        if isinstance(table, dict)
        for key, value in table.items()
    }


def _sealed_data(folder: RunFolder) -> dict[str, Any]:
    """What the newest readable manifest says about the data; {} without one."""
    for step in reversed(folder.steps()):
        place = step_folder(folder.path, step)
        try:
            body = read_manifest(place).body
            check_types(place, body)
        except CupytronError:
            continue  # damaged, or removed meanwhile
        return dict(body.get("data") or {})
    return {}


def _bits_per_byte(run: Compared) -> float | None:
    """Bits for a byte of text at the best validation loss, if the run's own data are still there.

    Losses of different tokenizers cannot be compared, since their tokens stand for more or less text.
    """
    from cupytron.data import DataError, open_dataset
    from cupytron.trained import predicted_bytes

    losses, path = run.report.curve("val_loss"), run.settings.get("data.path")
    if not losses or not isinstance(path, str):
        return None
    try:
        dataset = open_dataset(path)
        if run.data.get("val_sha256") != dataset.val.sha256:
            return None
        counted = dict(run.report.curve("val_tokens"))
        step, best = min(losses, key=lambda point: point[1])
        targets = int(counted.get(step, dataset.val.num_tokens - 1))
        size = predicted_bytes(dataset, targets)
    except (DataError, OSError):
        return None
    return best * targets / math.log(2) / size if size else None


def _differences(runs: Sequence[Compared]) -> dict[str, list[str]]:
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    rows = {key: [report.show(run.settings.get(key)) for run in runs] for key in keys}
    return {key: values for key, values in rows.items() if len(set(values)) > 1}


def _notes(runs: Sequence[Compared]) -> Iterator[str]:
    for run in runs:
        if not (run.report.curve("loss") or run.report.curve("val_loss")):
            yield f"{run.tag}, {run.name}: it has no records yet."
        # the environment is not compared
        told = [note for note in run.report.notes if "environment.json" not in note]
        yield from (f"{run.tag}, {run.name}: {note}" for note in told)
    if _differ(run.data.get("tokenizer_hash") for run in runs):
        yield (
            "The runs have different tokenizers. Their losses cannot be compared, since a token stands "
            "for more or less text; bits per byte can, on the same text."
        )
    elif _differ(run.data.get("val_sha256") for run in runs):
        yield "The runs have different validation splits. Their validation losses cannot be compared."
    if _differ(run.settings.get("train.eval_tokens") for run in runs):
        yield "The validation losses are over different numbers of tokens (train.eval_tokens)."
    if _differ(run.settings.get("train.sequence_length") for run in runs):
        yield "Longer sequences give a token more context, which lowers the loss by itself."
    if any(not run.data for run in runs):
        yield "A run without a checkpoint does not say which data it has."


def _differ(values: Any) -> bool:
    """Whether those that are known differ; eval_tokens is known in each run, None as well."""
    return len(set(values)) > 1


# the page, and the picture


def write_html(found: Comparison, out: str | Path) -> None:
    """Write one self-contained page; everything that is not our own text is escaped."""
    title = " and ".join(run.name for run in found.runs) if len(found.runs) == 2 else "Runs"
    head = [f"{run.tag}  {run.name}" for run in found.runs]
    body = [
        _figure("Validation loss", found.runs, "val_loss", marks=True),
        _figure("Training loss", found.runs, "loss"),
        report_page.figure(
            "Training loss by time",
            [_series(run, i, _by_minutes(run.report)) for i, run in enumerate(found.runs)],
            "time",
            x_label="minutes",
        ),
        report_page.row(
            [
                _figure("Learning rate", found.runs, "lr", small=True),
                _figure("Tokens a second", found.runs, "tokens_per_second", small=True),
            ]
        ),
        report_page.wide_table("Figures", head, found.table()),
        report_page.wide_table("Settings that differ", head, found.settings),
    ]
    document = report_page.page(
        title, f"{len(found.runs)} runs compared", [], found.notes, body, _style()
    )
    report_page.write(document, out)


def _figure(
    title: str, runs: Sequence[Compared], key: str, marks: bool = False, small: bool = False
) -> str:
    lines, smoothed = [], False
    for i, run in enumerate(runs):
        points = run.report.curve(key)
        if key == "loss" or key == "tokens_per_second":
            smoothed |= chart.smoothing_window(points) > 1
            points = chart.smooth(points)
        lines.append(_series(run, i, points, marks, run.tag if small else ""))
    remark = "Each line is a mean over about a twentieth of its records." if smoothed else ""
    return report_page.figure(title, lines, key, small, remark)


def _series(
    run: Compared, number: int, points: Sequence[Point], marks: bool = False, name: str = ""
) -> Series:
    return Series(name or f"{run.tag}  {run.name}", points, f"run{number}", marks, run.tag)


def _by_minutes(records: Report) -> list[Point]:
    """The smoothed training loss by minutes that the run has spent in steps."""
    elapsed = dict(records.curve("elapsed_seconds"))
    smooth = chart.smooth(records.curve("loss"))
    points = [(elapsed[step] / 60, loss) for step, loss in smooth if step in elapsed]
    return sorted(points)


def _style() -> str:
    """Each run's colour, on light and on dark paper, and its kind of line."""
    dashes = ("none", "7 3", "2 3", "9 3 2 3")

    def rules(dark: int) -> str:
        return "".join(
            f".line.run{i} {{ stroke: {pair[dark]}; stroke-dasharray: {dashes[i % len(dashes)]}; }} "
            f".dot.run{i}, svg text.tag.run{i} {{ fill: {pair[dark]}; }}\n"
            for i, pair in enumerate(_COLOURS)
        )

    return f"{rules(0)}@media (prefers-color-scheme: dark) {{\n{rules(1)}}}\n"


def write_png(found: Comparison, out: str | Path) -> None:
    """Draw the validation and the training losses with matplotlib.

    Raises:
        CupytronError: matplotlib is not installed.
    """
    with report.picture(out, size=(11, 4.5)) as figure:
        axes = figure.subplots(1, 2)
        for key, title, place in zip(
            ("val_loss", "loss"), ("validation loss", "training loss, smoothed"), axes, strict=True
        ):
            for i, run in enumerate(found.runs):
                points = run.report.curve(key)
                if not points:
                    continue
                points = chart.smooth(points) if key == "loss" else points
                (line,) = place.plot(
                    *zip(*points, strict=True),
                    color=_COLOURS[i][0],
                    linestyle=_DASHES[i % len(_DASHES)],
                    marker="." if key == "val_loss" or len(points) == 1 else "",
                )
                line.set_label(printable(f"{run.tag}  {run.name}"))
            place.set(xlabel="step", title=title)
            place.grid(alpha=0.3)
            if place.get_legend_handles_labels()[0]:
                for said in place.legend().get_texts():
                    said.set_parse_math(False)

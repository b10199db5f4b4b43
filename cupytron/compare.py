"""Several runs next to each other: their curves, their figures, and the settings in which they differ."""

import contextlib
import math
import os
from collections.abc import Iterable, Iterator, Sequence
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
_DASHES = ((), (7, 3), (2, 3), (9, 3, 2, 3))  # lengths of a line's parts and gaps
# (on white paper, on dark paper); readers who do not see red, green or blue well can tell them apart
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
        report: its records.
        settings: all of them by "section.key", defaults too.
        data: the hashes of its data and of its tokenizer, as its newest checkpoint seals them.
        why_unknown: why the hash of its data is not known; "" if it is.
        bits_per_byte: of the best validation loss; None: not known.
    """

    tag: str
    name: str
    report: Report
    settings: dict[str, Any]
    data: dict[str, Any]
    why_unknown: str = ""
    bits_per_byte: float | None = None

    def figures(self) -> dict[str, str]:
        """The figures of the run by their names, ready to be shown."""
        found: dict[str, str] = {}
        if self.report.curves:
            done, end = report.last_step(self.report), self.settings.get("train.max_steps")
            left = isinstance(end, int) and done < end
            found["Step"] = f"{done:,.0f}" + (f" of {end:,}" if left else "")
        for name, value, remark in report.key_figures(self.report):
            found[name] = value
            if name == "Best validation loss":
                found["Best at step"] = remark.removeprefix("at step ")
                found["Last validation loss"] = f"{self.report.curve('val_loss')[-1][1]:.4f}"
        if self.bits_per_byte is not None:
            found["Bits per byte"] = f"{self.bits_per_byte:.4f}"
        return found


@dataclass
class Comparison:
    """Runs, the settings in which they differ, with each run's value, and notes for the reader."""

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
    seen: dict[str, Path] = {}
    for place in places:
        # not Path.resolve, which fails where links go round in a circle
        other = seen.setdefault(os.path.realpath(place), place)
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
    parts = [Path(os.path.realpath(place)).parts for place in places]
    length = 1
    while len({part[-length:] for part in parts}) < len(parts):
        length += 1
    return ["/".join(part[-length:]) for part in parts]


def _run(tag: str, name: str, place: Path) -> Compared:
    folder = RunFolder(place).require()
    records = report.read_records(folder)
    data, why_unknown = _sealed_data(folder)
    run = Compared(tag, name, records, _settings(folder, records), data, why_unknown)
    run.bits_per_byte = _bits_per_byte(run)
    return run


def _settings(folder: RunFolder, records: Report) -> dict[str, Any]:
    """Every setting by "section.key"; for a run of another version, the settings in config.toml."""
    from cupytron.config import load_config, resolve_run

    try:
        config = load_config(file=folder.config)
        with contextlib.suppress(CupytronError):  # no vocabulary is known
            config = resolve_run(config, None)
        sections = config.model_dump(mode="json")
    except CupytronError:
        sections = records.settings
    return {
        f"{section}.{key}": value
        for section, table in sections.items()
        if isinstance(table, dict)
        for key, value in table.items()
    }


def _sealed_data(folder: RunFolder) -> tuple[dict[str, Any], str]:
    """The entry for data in the newest readable manifest; without one, the tokenizer's hash alone.

    Returns: the entry, and why it has no hash of the data ("" if it has).
    """
    from cupytron.data import DataError, load_tokenizer

    steps = folder.steps()
    for step in reversed(steps):
        place = step_folder(folder.path, step)
        try:
            body = read_manifest(place).body
            check_types(place, body)
        except CupytronError:
            continue  # damaged, or removed meanwhile
        data = dict(body.get("data") or {})
        return data, "" if "val_sha256" in data else "its checkpoint is of an earlier version"
    why = "none of its checkpoints can be read" if steps else "it has no checkpoint"
    with contextlib.suppress(DataError, OSError):
        return {"tokenizer_hash": load_tokenizer(folder.tokenizer).hash}, why
    return {}, why


def _bits_per_byte(run: Compared) -> float | None:
    """Bits for a byte of text at the best validation loss, if the run's own data are still there.

    Losses of different tokenizers cannot be compared, since their tokens stand for more or less text.
    """
    from cupytron.data import DataError, open_dataset
    from cupytron.trained import predicted_bytes

    losses, path = run.report.curve("val_loss"), run.settings.get("data.path")
    sealed = run.data.get("val_sha256")
    if not losses or not isinstance(path, str) or sealed is None:
        return None
    try:
        dataset = open_dataset(path, checked=["val"])
        whole = dataset.val.num_tokens - 1
        step, best = min(losses, key=lambda point: point[1])
        targets = int(dict(run.report.curve("val_tokens")).get(step, whole))
        if dataset.val.sha256 != sealed or not 0 < targets <= whole:
            return None
        size = predicted_bytes(dataset, targets)
    except (DataError, OSError):
        return None
    return best * targets / math.log(2) / size if size else None


def _show(value: Any) -> str:
    # a tenth of 0.003 is 0.00030000000000000003
    return report.show(float(f"{value:.12g}") if isinstance(value, float) else value)


def _differences(runs: Sequence[Compared]) -> dict[str, list[str]]:
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    rows = {key: [_show(run.settings.get(key)) for run in runs] for key in keys}
    return {key: values for key, values in rows.items() if len(set(values)) > 1}


def _notes(runs: Sequence[Compared]) -> Iterator[str]:
    for run in runs:
        if not (run.report.curve("loss") or run.report.curve("val_loss")):
            what = "loss that is a finite number" if run.report.lost else "records yet"
            yield f"{run.tag}, {run.name}: it has no {what}."
        # the environment is not compared
        told = [note for note in run.report.notes if "environment.json" not in note]
        yield from (f"{run.tag}, {run.name}: {note}" for note in told)
        if run.why_unknown:
            yield f"{run.tag}, {run.name}: {run.why_unknown}, so it does not say which data it has."
    tokenizers = _known(run.data.get("tokenizer_hash") for run in runs)
    if len(tokenizers) > 1:
        way_out = "bits per byte can be compared, on the same text"
        if any(run.bits_per_byte is None for run in runs):
            way_out += " (`cupytron eval RUN` prints them if they are missing here)"
        yield (
            "The runs have different tokenizers. Their losses cannot be compared, since a token stands "
            f"for more or less text; {way_out}."
        )
    elif len(_known(run.data.get("val_sha256") for run in runs)) > 1:
        yield "The runs have different validation splits. Their validation losses cannot be compared."
    if not tokenizers and len(_known(run.settings.get("model.vocab_size") for run in runs)) > 1:
        yield (
            "The runs have vocabularies of different sizes and no tokenizers. Their losses can be compared "
            "only if their token ids mean the same."
        )
    if _counts_differ(runs):
        yield (
            "The validation losses are over different numbers of tokens (train.eval_tokens), so they "
            "cannot be compared."
        )
    if len(_known(run.settings.get("train.sequence_length") for run in runs)) > 1:
        yield "Longer sequences give a token more context, which lowers the loss by itself."


def _known(values: Iterable[Any]) -> set[Any]:
    return {value for value in values if isinstance(value, str | int)}


def _counts_differ(runs: Sequence[Compared]) -> bool:
    """Whether validation losses are over different numbers of tokens, as far as anything says so."""
    counts = [{count for _, count in run.report.curve("val_tokens")} for run in runs]
    if all(counts):
        return len(set().union(*counts)) > 1
    # earlier versions did not record them
    return len({str(run.settings.get("train.eval_tokens")) for run in runs}) > 1


# the page, and the picture


def write_html(found: Comparison, out: str | Path) -> None:
    """Write one self-contained page; everything that is not our own text is escaped."""
    runs = found.runs
    title = " and ".join(run.name for run in runs) if len(runs) == 2 else "Runs"
    tags = [run.tag for run in runs]
    body = [
        report_page.legend([_series(run, i, []) for i, run in enumerate(runs)]),
        _figure("Validation loss", runs, "val_loss"),
        _figure("Training loss", runs, "loss"),
        _time_figure(runs),
        report_page.row([_figure(name, runs, key, small=True) for key, name in report.SMALL]),
        report_page.wide_table("Figures", tags, found.table()),
        report_page.wide_table("Settings that differ", tags, found.settings),
    ]
    subtitle = f"{len(runs)} runs compared"
    report_page.write(report_page.page(title, subtitle, [], found.notes, body, _style()), out)


# above a chart; with more runs, the chart has their letters only, and the page begins with a list of names
_MOST_NAMES = 4
_SMOOTHED = "Each line is a mean over about a twentieth of its records."


def _figure(title: str, runs: Sequence[Compared], key: str, small: bool = False) -> str:
    lines, smoothed = [], False
    for i, run in enumerate(runs):
        points = run.report.curve(key)
        if key not in ("val_loss", "lr"):  # these are not noisy
            smoothed |= chart.smoothing_window(points) > 1
            points = chart.smooth(points)
        lines.append(_series(run, i, points, key == "val_loss", small or len(runs) > _MOST_NAMES))
    remark = ("Smoothed." if small else _SMOOTHED) if smoothed else ""
    return report_page.figure(title, lines, key, small, remark)


def _series(
    run: Compared, number: int, points: Sequence[Point], marks: bool = False, short: bool = False
) -> Series:
    name = run.tag if short else f"{run.tag}  {run.name}"
    return Series(name, points, f"run{number}", marks, run.tag)


def _time_figure(runs: Sequence[Compared]) -> str:
    """The smoothed training loss by the time that each run has spent in steps."""
    elapsed = [dict(run.report.curve("elapsed_seconds")) for run in runs]
    longest = max((max(seconds.values(), default=0.0) for seconds in elapsed), default=0.0)
    unit, size = next((unit for unit in _UNITS if longest >= 3 * unit[1]), _UNITS[-1])
    lines, smoothed = [], False
    for i, (run, seconds) in enumerate(zip(runs, elapsed, strict=True)):
        loss = run.report.curve("loss")
        smoothed |= chart.smoothing_window(loss) > 1
        points = [(seconds[step] / size, y) for step, y in chart.smooth(loss) if step in seconds]
        lines.append(_series(run, i, sorted(points), short=len(runs) > _MOST_NAMES))
    remark = _SMOOTHED if smoothed else ""
    return report_page.figure("Training loss by time", lines, "time", remark=remark, x_label=unit)


_UNITS = (("hours", 3600), ("minutes", 60), ("seconds", 1))


def _style() -> str:
    """Each run's colour, on light and on dark paper, and its kind of line."""
    dashes = [" ".join(map(str, lengths)) or "none" for lengths in _DASHES]

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
    with report.picture(out, size=(11, 4.5 + 0.25 * len(found.runs))) as figure:
        from matplotlib.lines import Line2D

        axes = figure.subplots(1, 2)
        styles: list[dict[str, Any]] = [
            {"color": _COLOURS[i][0], "dashes": _DASHES[i % len(_DASHES)]}
            for i in range(len(found.runs))
        ]
        for key, title, place in zip(
            ("val_loss", "loss"), ("validation loss", "training loss, smoothed"), axes, strict=True
        ):
            curves = [run.report.curve(key) for run in found.runs]
            if key == "loss":
                curves = [chart.smooth(points) for points in curves]
            for points, style in zip(curves, styles, strict=True):
                if points:
                    marker = "." if key == "val_loss" or len(points) == 1 else ""
                    place.plot(*zip(*points, strict=True), marker=marker, **style)
            if values := [y for points in curves for _, y in points]:
                place.set_ylim(*chart.bounds(values))
            place.set(xlabel="step", title=title)
            place.grid(alpha=0.3)
        names = [printable(f"{run.tag}  {run.name}") for run in found.runs]
        keys = figure.legend(
            [Line2D([], [], **style) for style in styles],
            [name if len(name) <= 100 else f"{name[:60]}...{name[-37:]}" for name in names],
            loc="outside lower left",
            handlelength=4,
        )
        for said in keys.get_texts():
            said.set_parse_math(False)

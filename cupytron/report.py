"""A run as one self-contained HTML page, as a picture, and as a curve in the terminal."""

import contextlib
import importlib.util
import json
import math
import os
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from cupytron import chart, report_page
from cupytron.chart import Point
from cupytron.config_io import read_toml
from cupytron.durable import open_file, replacing
from cupytron.errors import ConfigError, CupytronError
from cupytron.printable import printable
from cupytron.run_folder import RunFolder

_MOST_BYTES = 1 << 20  # of a file that is shown; they are a page each

Record = Mapping[str, Any]
# small charts: (key of a record, title)
SMALL = (
    ("lr", "Learning rate"),
    ("grad_norm", "Gradient norm"),
    ("tokens_per_second", "Tokens a second"),
)


@dataclass(frozen=True)
class Sample:
    """Text that the model wrote.

    Attributes:
        text: without its prompt, if that is known.
        remark: the prompt, the temperature and the checkpoint, as far as they are known.
    """

    text: str
    remark: str


@dataclass
class Report:
    """What is known about a run; anything but the curves may be missing.

    Attributes:
        title: name of the run's folder.
        curves: points by step of every number in metrics.jsonl, by its key.
        settings: sections of config.toml. environment: flat list of names and values.
        sample: text that the model wrote. parameters: their number.
        lost: how many losses were not finite. notes: what the reader should know about the data.
    """

    title: str
    curves: dict[str, list[Point]]
    settings: dict[str, Any] = field(default_factory=dict)
    environment: list[tuple[str, str]] = field(default_factory=list)
    sample: Sample | None = None
    parameters: int | None = None
    lost: int = 0
    notes: list[str] = field(default_factory=list)

    def curve(self, key: str) -> list[Point]:
        """Finite points of one number, by step; empty if it was never recorded."""
        return self.curves.get(key, [])


def curves(records: Iterable[Record]) -> tuple[dict[str, list[Point]], int]:
    """Points by step of every number, and how many losses were not finite.

    A run that was killed and resumed may tell a step twice: the later record counts.
    """
    found: dict[str, dict[int, Any]] = {}
    for record in records:
        step = record.get("step")
        if isinstance(step, int) and not isinstance(step, bool):
            for key, value in record.items():
                # None: MetricsWriter's word for a number that is not finite
                if value is None or (
                    isinstance(value, int | float) and not isinstance(value, bool)
                ):
                    found.setdefault(key, {})[step] = value
    points = {key: chart.finite(sorted(values.items())) for key, values in found.items()}
    losses = ("loss", "val_loss")
    lost = sum(len(found[key]) - len(points[key]) for key in losses if key in found)
    return {key: values for key, values in points.items() if values}, lost


def read_report(path: str | Path, sample: bool = True) -> Report:
    """Everything that the page shows.

    Args:
        path: a run's folder.
        sample: whether the model may be asked for a text, if RUN/sample.txt has none.

    Raises:
        CupytronError: the folder is not a run's, or has no metrics yet.
    """
    run = RunFolder(path).require()
    report = read_records(run)
    if not report.curve("loss") and not report.curve("val_loss"):
        finite, advice = ("", f"go on with `cupytron train --out {path}`")
        if report.lost:
            finite, advice = " that is a finite number", "train anew with a lower optim.lr"
        raise CupytronError(
            f"{run.metrics}: holds no loss yet{finite}, so there is nothing to report; {advice}"
        )
    if not report.curve("val_loss"):
        report.notes.append("No validation loss is recorded.")
    report.sample = _sample(run, sample, report.notes)
    return report


def read_records(run: RunFolder) -> Report:
    """What a run's files say, without its sample; the run may have no metrics yet."""
    found, lost = curves(run.read_metrics())
    report = Report(title=run.path.resolve().name, curves=found, lost=lost)
    if lost:
        report.notes.append(
            f"{lost:,} {'loss was' if lost == 1 else 'losses were'} not finite and left out."
        )
    try:
        report.settings = read_toml(run.config)
    except ConfigError:
        report.notes.append("config.toml could not be read.")
    try:
        environment = json.loads(_text(run.environment))
        report.environment = list(flatten(environment))
    except (ValueError, OSError, RecursionError):
        report.notes.append("environment.json could not be read.")
    report.parameters = _count_parameters(run.config)
    return report


def _text(path: Path, errors: str = "strict") -> str:
    """The text of a small file of the run's folder.

    Raises:
        OSError, ValueError: it is no file, or not UTF-8.
    """
    with open_file(path) as file:
        return file.read(_MOST_BYTES).decode(errors=errors)


def flatten(value: Any, prefix: str = "") -> Iterable[tuple[str, str]]:
    """Nested JSON as (dotted name, text) pairs."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix or "value", show(value)


def show(value: Any) -> str:
    """A setting's value as TOML writes it, but strings without quotes."""
    if isinstance(value, str):
        return value
    return "-" if value is None else json.dumps(value, ensure_ascii=False, default=str)


def _count_parameters(config: Path) -> int | None:
    from cupytron.config import load_config, resolve_model

    try:
        run = load_config(file=config)
        return resolve_model(run.model, None, run.train.sequence_length).num_parameters()
    except CupytronError:
        return None  # a run of another version, say; the rest of the page stands


def _sample(run: RunFolder, generate: bool, notes: list[str]) -> Sample | None:
    """The text in RUN/sample.txt, or one that the model writes; a note says why there is none."""
    try:
        text = _text(run.path / "sample.txt", "replace").strip("\n")
    except OSError:
        text = ""
    if text:
        return Sample(text, "from sample.txt; its prompt and its temperature are not recorded")
    if not generate:
        return None
    import cupytron
    from cupytron.data import DataError

    how: dict[str, Any] = {"max_new_tokens": 300, "temperature": 0.8, "seed": 1}
    try:
        model = cupytron.load(run.path)
        prompt = model.default_prompt()
        text = model.generate(prompt, **how).strip("\n")
    except (CupytronError, DataError, OSError) as error:
        # no checkpoint yet, or none that is whole
        notes.append(f"There is no sample: {error}")
        return None
    begin = json.dumps(prompt, ensure_ascii=False) if prompt else "none (a document begins)"
    return Sample(
        text,
        f"prompt {begin}, temperature {how['temperature']}, up to {how['max_new_tokens']} tokens, "
        f"seed {how['seed']}, weights of step {model.step:,}",
    )


# figures


def validation_losses(report: Report) -> list[tuple[str, list[Point]]]:
    """Validation losses, by the tokens that they are over: others cannot be compared. The newest come last.

    Returns: (" over the first 100 tokens" or such, or "" where a run never limited it; points).
    """
    tokens = dict(report.curve("val_tokens"))
    found: dict[float | None, list[Point]] = {}
    for step, loss in report.curve("val_loss"):
        kind = tokens.get(step)
        # taken out and put in again, so that the newest stands last
        points = found[kind] = found.pop(kind, [])
        points.append((step, loss))
    train = report.settings.get("train")
    limited = isinstance(train, Mapping) and train.get("eval_tokens") is not None
    told = limited or len(found) > 1
    return [
        (f" over the first {kind:,.0f} tokens" if told and kind is not None else "", points)
        for kind, points in found.items()
    ]


def key_figures(report: Report) -> list[tuple[str, str, str]]:
    """(name, value, remark) of the few numbers that a reader looks for first."""
    figures = []
    if validation := validation_losses(report):
        over, points = validation[-1]
        step, best = min(points, key=lambda p: p[1])
        figures.append(("Best validation loss", f"{best:.4f}", f"at step {step:,.0f}{over}"))
        if best < 50:
            figures.append(("Perplexity", f"{math.exp(best):,.2f}", "at that step"))
    if loss := report.curve("loss"):
        window = loss[-max(1, len(loss) // 20) :]
        mean = statistics.fmean(y for _, y in window)
        over = f"mean of the last {len(window):,} records" if len(window) > 1 else "last record"
        figures.append(("Training loss", f"{mean:.4f}", over))
    if speed := report.curve("tokens_per_second"):
        median = statistics.median(y for _, y in speed)
        figures.append(("Tokens a second", f"{median:,.0f}", "median"))
    if tokens := report.curve("tokens"):
        figures.append(("Tokens", short(tokens[-1][1]), f"{tokens[-1][1]:,.0f}"))
    if report.parameters is not None:
        figures.append(("Parameters", short(report.parameters), f"{report.parameters:,}"))
    if elapsed := report.curve("elapsed_seconds"):
        figures.append(("Time", duration(elapsed[-1][1]), "at the last record"))
    return figures


def short(number: float) -> str:
    """About three digits and a unit: 804 k, 1.54 M."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"


def duration(seconds: float) -> str:
    """Seconds as a person says them: 41 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def write_html(report: Report, out: str | Path) -> None:
    """Write the page; everything that is not our own text is escaped."""
    page = report_page.page(
        report.title, _subtitle(report), key_figures(report), report.notes, _body(report)
    )
    report_page.write(page, out)


def last_step(report: Report) -> float:
    """The step of the last record of a run that has one."""
    return max(points[-1][0] for points in report.curves.values())


def _subtitle(report: Report) -> str:
    last = last_step(report)
    train = report.settings.get("train", {})
    steps = train.get("max_steps") if isinstance(train, Mapping) else None
    return f"step {last:,.0f}" + (f" of {steps:,}" if isinstance(steps, int) else "")


def recorded(points: Sequence[Point], name: str = "") -> list[chart.Series]:
    """A number as it is recorded and, in a long run, smoothed; the lines' names say which is which."""
    window = chart.smoothing_window(points)
    if window == 1:
        return [chart.Series(name or "each record", points, "train")]
    prefix = f"{name}, " if name else ""
    return [
        chart.Series(f"{prefix}each record", points, "raw"),
        chart.Series(f"{prefix}mean of {window:,} records", chart.smooth(points), "train"),
    ]


def _small(report: Report, key: str) -> list[chart.Series]:
    # the learning rate is not noisy: smoothing would only bend its corners
    points = report.curve(key)
    return [chart.Series(key, points, "train")] if key == "lr" else recorded(points)


def _body(report: Report) -> Iterable[str]:
    lines = recorded(report.curve("loss"), "training")
    lines += [
        chart.Series(f"validation{over}", points, "val", marks=True)
        for over, points in validation_losses(report) or [("", [])]
    ]
    yield report_page.figure("Loss", lines, "loss")
    yield report_page.row(
        [report_page.figure(title, _small(report, key), key, small=True) for key, title in SMALL]
    )
    if report.sample:
        yield report_page.sample(report.sample.text, report.sample.remark)
    sections = {
        name: [(key, show(value)) for key, value in section.items()]
        for name, section in report.settings.items()
        if isinstance(section, Mapping) and section
    }
    yield report_page.tables("Settings", sections)
    yield report_page.tables("Environment", {"": report.environment} if report.environment else {})


def require_matplotlib() -> None:
    """Refuse to draw a PNG where nothing can.

    Raises:
        CupytronError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise CupytronError(
            "--png needs matplotlib, which is not installed; run: pip install 'cupytron[plot]'"
        )


def check_outputs(runs: Iterable[str | Path], out: Path, png: Path | None) -> None:
    """Refuse files that cannot be written or would replace something, before any work is done.

    Args:
        runs: folders of the runs that the page is about.
        out: the page.
        png: the picture; None: there is none.

    Raises:
        CupytronError: matplotlib is missing or draws no such file, the two are the same file, or one of
            them is a run's own.
    """
    files = [out]
    if png is not None:
        require_matplotlib()
        _check_kind(png)
        # a link is replaced, not followed, so that two links to one file are two files
        if _place(png) == _place(out):
            raise CupytronError(f"--png {png}: is the page's file, too; choose another name")
        files.append(png)
    for run in map(RunFolder, runs):
        for file in files:
            run.check_foreign(file)


def _place(file: Path) -> str:
    return os.path.join(os.path.realpath(file.parent), file.name)


def _check_kind(png: Path) -> None:
    """Refuse a name whose end matplotlib does not know."""
    from matplotlib.backend_bases import FigureCanvasBase

    if png.suffix and png.suffix[1:].lower() not in FigureCanvasBase.filetypes:
        raise CupytronError(
            f"--png {png}: {png.suffix} is no kind of picture; give a name that ends in .png, .pdf or .svg"
        )


@contextlib.contextmanager
def picture(out: str | Path, size: tuple[float, float]) -> Iterator[Any]:
    """A matplotlib figure to draw into; at the end it is written to a file of the kind that its name says.

    Args:
        out: the file. size: width and height in inches.

    Raises:
        CupytronError: matplotlib is not installed.
    """
    require_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure  # not pyplot: it looks for a display

    out = Path(out)
    with matplotlib.rc_context():
        # a matplotlibrc in the working directory may be a stranger's, and could have programs started
        matplotlib.rcdefaults()
        figure = Figure(figsize=size, layout="constrained")
        yield figure
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(out) as file:
            figure.savefig(file, dpi=150, format=out.suffix[1:] or "png")


def write_png(report: Report, out: str | Path) -> None:
    """Draw the loss curves with matplotlib.

    Raises:
        CupytronError: matplotlib is not installed.
    """
    loss, val = report.curve("loss"), report.curve("val_loss")
    with picture(out, size=(8, 4.5)) as figure:
        axes = figure.add_subplot()
        if loss:
            axes.plot(*zip(*loss, strict=True), color="#2a6fb0", alpha=0.25, linewidth=1)
            smoothed = zip(*chart.smooth(loss), strict=True)
            axes.plot(
                *smoothed, color="#2a6fb0", label="training", marker="." if len(loss) == 1 else ""
            )
        for over, points in validation_losses(report):
            label = f"validation{over}"
            axes.plot(*zip(*points, strict=True), color="#b8500f", label=label, marker=".")
        axes.set(xlabel="step", ylabel="loss")
        # a folder may be called $a$, which is no formula
        axes.set_title(printable(report.title), parse_math=False)
        axes.set_ylim(*chart.bounds([y for _, y in (*loss, *val)]))
        axes.grid(alpha=0.3)
        axes.legend()


def loss_curve_text(records: Sequence[Record], width: int = 60, height: int = 12) -> str:
    """The loss curves in ASCII, for a terminal.

    Args:
        records: of metrics.jsonl.
        width, height: of the plot in characters, without axes.
    """
    found, _ = curves(records)
    loss, val = found.get("loss", []), found.get("val_loss", [])
    if not loss and not val:
        return "no loss recorded"
    names = [name for name, points in (("* training", loss), ("o validation", val)) if points]
    picture = chart.text_chart([("*", loss), ("o", val)], width, height)
    return f"loss: {', '.join(names)}\n{picture}"


__all__ = ["Report", "escape", "loss_curve_text", "read_report", "write_html", "write_png"]

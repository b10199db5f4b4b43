"""`cupytron report`: one page about a run."""

from pathlib import Path

import click

from cupytron.cli.help import Command, Folder, NewFile, option, picture_option
from cupytron.cli.say import say, say_page


@click.command(
    cls=Command,
    examples=[
        "cupytron report runs/demo",
        "cupytron report runs/demo --out demo.html --png loss.png --no-sample",
    ],
)
@click.argument("run", type=Folder(), metavar="RUN")
@option(
    "--out",
    type=NewFile(),
    metavar="FILE",
    help="HTML file to write.  [default: RUN/report.html]",
)
@picture_option
@option("--text", is_flag=True, help="Also draw the loss curves here, in the terminal.")
@option(
    "--sample/--no-sample",
    default=True,
    show_default=True,
    help="Let the model write a text for the page.",
)
def command(run: str, out: Path | None, png: Path | None, text: bool, sample: bool) -> None:
    """Write one self-contained HTML page about RUN: loss curves, settings, speed and a sample."""
    from cupytron import report
    from cupytron.run_folder import RunFolder

    out = out or Path(run) / "report.html"
    report.check_outputs([run], out, png)
    if text:
        say_page(report.loss_curve_text(RunFolder(run).require().read_metrics()))
    found = report.read_report(run, sample)
    report.write_html(found, out)
    say(f"written: {out}")
    if png is not None:
        report.write_png(found, png)
        say(f"written: {png}")

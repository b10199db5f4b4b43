"""`cupytron report`: one page about a run."""

from pathlib import Path

import click


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), help="HTML file [RUN/report.html]."
)
@click.option(
    "--png",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Also draw the loss curves here (needs the plot extra).",
)
@click.option("--text", is_flag=True, help="Also draw the loss curves here, in the terminal.")
@click.option("--sample/--no-sample", default=True, help="Let the model write a text for the page.")
def command(run: Path, out: Path | None, png: Path | None, text: bool, sample: bool) -> None:
    """Write one self-contained HTML page about RUN: loss curves, settings, speed and a sample."""
    from cupytron import report
    from cupytron.run_folder import RunFolder

    if text:
        click.echo(report.loss_curve_text(RunFolder(run).require().read_metrics()))
    out = out or run / "report.html"
    RunFolder(run).check_foreign(out)
    found = report.read_report(run, sample)
    report.write_html(found, out)
    click.echo(f"written: {out}")
    if png is not None:
        report.write_png(found, png)
        click.echo(f"written: {png}")

"""Validation losses over the first tokens of the split: train.eval_tokens, and eval --tokens."""

import json
import re
import subprocess

import numpy as np
import pytest
from runs import cupytron, make_data, run_here

from cupytron import load, report
from cupytron.cli.main import _run
from cupytron.comm import run_ranks
from cupytron.run_folder import RunFolder

LIMIT = ["train.eval_tokens=100", "train.max_steps=6", "train.eval_interval=3"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


def losses(out):
    return {
        r["step"]: (r["val_loss"], r["val_tokens"])
        for r in RunFolder(out).read_metrics()
        if "val_loss" in r
    }


def test_a_run_and_eval_take_the_same_first_tokens_on_any_mesh(data, tmp_path):
    run_here(data, tmp_path / "one", *LIMIT)
    run_ranks(2, lambda world: run_here(data, tmp_path / "two", *LIMIT, world=world))
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert {tokens for _, tokens in one.values()} == {100}
    np.testing.assert_allclose(list(one.values()), list(two.values()), rtol=1e-5)
    model = load(tmp_path / "one", "last")
    part = model.evaluate(tokens=100)
    assert part["val_loss"] == pytest.approx(one[6][0], rel=1e-6) and part["tokens"] == 100
    # one character is one byte
    assert part["bits_per_byte"] == pytest.approx(part["val_loss"] / np.log(2))
    assert model.evaluate()["tokens"] > 100  # the whole split, unless it is told otherwise
    words = [cupytron(), "eval", str(tmp_path / "one"), "--checkpoint", "last", "--tokens", "100"]
    done = subprocess.run([*words, "--json"], capture_output=True, text=True, timeout=100)
    assert json.loads(done.stdout)["val_loss"] == part["val_loss"], done.stderr


def test_losses_over_other_tokens_are_not_compared(data, tmp_path, capsys):
    out = tmp_path / "run"
    run_here(data, out, *LIMIT)
    folder = RunFolder(out)
    assert folder.best(print).step in (3, 6)
    assert _run(["checkpoint", "ls", str(out)]) == 0
    assert re.search(
        r"validation loss \d\.\d+ \(train\.eval_tokens=100\)  best", capsys.readouterr().out
    )
    (_, _, remark), *_ = report.key_figures(report.read_report(out, False))
    assert remark.endswith(" over the first 100 tokens")
    run_here(data, out, "train.max_steps=7", "train.eval_interval=0", "optim.lr=1e-3")
    # over the whole split now: the only loss of its kind, whatever the others were
    assert folder.best(print).step == 7
    assert folder.find("last", print).about["settings"]["train"]["eval_tokens"] is None
    assert _run(["checkpoint", "ls", str(out)]) == 0
    assert re.search(r"validation loss \d\.\d+  best", capsys.readouterr().out)
    page = report.read_report(out, False)
    whole = losses(out)[7]
    assert report.key_figures(page)[0] == (
        "Best validation loss",
        f"{whole[0]:.4f}",
        f"at step 7 over the first {whole[1]:,} tokens",
    )
    report.write_html(page, out / "report.html")
    text = (out / "report.html").read_text()
    assert "validation over the first 100 tokens" in text
    assert f"validation over the first {whole[1]:,} tokens" in text


def test_a_report_about_a_run_without_a_limit_says_none(data, tmp_path):
    run_here(data, tmp_path / "run", "train.max_steps=2")
    page = report.read_report(tmp_path / "run", False)
    assert report.key_figures(page)[0][2] in ("at step 0", "at step 2")
    assert [over for over, _ in report.validation_losses(page)] == [""]

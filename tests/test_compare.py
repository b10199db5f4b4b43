"""`cupytron compare`: several runs on one page, as far as they can be compared."""

import hashlib
import json
import re
import sys

import pytest
from click.testing import CliRunner
from runs import TEXT, make_data, run_here

from cupytron import compare
from cupytron.cli.main import cli
from cupytron.config import load_config
from cupytron.data.tokenizers import ByteTokenizer
from cupytron.errors import CupytronError
from cupytron.manifest import MANIFEST, seal
from cupytron.report import Report

SHORT = ["train.max_steps=6", "train.eval_interval=3"]


def written(folder, losses, val=(), data=None, **settings):
    """A run's folder with records, settings and the hashes of its data, without any tensors."""
    folder.mkdir(parents=True)
    overrides = [f"{key}={value}" for key, value in settings.items()]
    (folder / "config.toml").write_text(load_config(overrides=overrides).to_toml())
    records = [
        {"step": i, "loss": loss, "lr": 1e-3, "tokens": 10 * i, "tokens_per_second": 100.0 + i}
        | {"elapsed_seconds": float(i)}
        for i, loss in enumerate(losses, start=1)
    ]
    records += [{"step": step, "val_loss": loss} for step, loss in val]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    if data is not None:
        step = folder / "checkpoints" / "step-00000001"
        step.mkdir(parents=True)
        hashes = {
            f"{key}_{kind}": hashlib.sha256(value.encode()).hexdigest()
            for (key, kind), value in zip(
                (("tokenizer", "hash"), ("train", "sha256"), ("val", "sha256")), data, strict=True
            )
        }
        body = {"format": 2, "step": 1, "files": {}, "data": hashes}
        (step / MANIFEST).write_bytes(seal(body))
    return folder


def call(*words):
    return CliRunner().invoke(cli, ["compare", *map(str, words)], catch_exceptions=True)


@pytest.fixture
def one(tmp_path):
    return written(tmp_path / "one", [3.0, 2.5, 2.25], [(2, 2.75), (3, 2.5)], ("t", "a", "v"))


def test_two_runs_that_were_trained(tmp_path):
    data = make_data(tmp_path, text=TEXT[:6000])
    for name, lr in (("a", "0.001"), ("b", "0.002")):
        run_here(data, tmp_path / name, *SHORT, f"optim.lr={lr}")
    found = compare.read([tmp_path / "a", tmp_path / "b"])
    # min_lr follows from lr
    assert found.settings == {
        "optim.lr": ["0.001", "0.002"],
        "optim.min_lr": ["0.0001", "0.0002"],
    }
    assert found.notes == []
    table = found.table()
    assert table["Step"] == ["6", "6"] and len(set(table["Parameters"])) == 1
    # its own data are still there; a token of this data set is a byte
    for run, text in zip(found.runs, table["Bits per byte"], strict=True):
        best = min(y for _, y in run.report.curve("val_loss"))
        assert float(text) == pytest.approx(best / 0.6931471805599453, abs=1e-4)


def test_the_page_the_picture_and_the_terminal(tmp_path, one):
    other = written(tmp_path / "<b>&", [2.0] * 100, data=("t", "a", "v"), **{"optim.lr": 0.01})
    page, png = tmp_path / "new" / "page.html", tmp_path / "new" / "page.png"
    done = call(one, other, "--out", page, "--png", png)
    assert done.exit_code == 0, done.output
    assert re.search(r"^optim.lr +0.001 +0.01$", done.output, re.M)
    assert re.search(r"^Best validation loss +2\.5000 +-\nBest at step +3 +-$", done.output, re.M)
    text = page.read_text()
    assert "&lt;b&gt;&amp;" in text and "<b>" not in text
    assert "default-src 'none'" in text and not re.search(r"https?://(?!www\.w3\.org)", text)
    for tag in "AB":
        assert re.search(rf'<text class="tag run\d"[^>]*>{tag}</text>', text)
    # lines differ in more than their colour
    assert re.search(r"\.line\.run1 \{[^}]*stroke-dasharray: 7 3", text)
    assert "a mean over about a twentieth" in text
    assert png.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("data", "note"),
    [
        (("other", "a", "v"), "different tokenizers"),
        (("t", "a", "other"), "different validation splits"),
        (None, "does not say which data it has"),
    ],
)
def test_losses_that_cannot_be_compared_are_told(tmp_path, one, data, note):
    other = written(tmp_path / "two", [1.0], data=data)
    assert sum(note in line for line in compare.read([one, other]).notes) == 1


def test_losses_over_other_tokens_are_told(tmp_path, one):
    more = {"train.eval_tokens": 100, "train.sequence_length": 32}
    other = written(tmp_path / "two", [1.0], data=("t", "a", "v"), **more)
    notes = " ".join(compare.read([one, other]).notes)
    assert "train.eval_tokens" in notes and "more context" in notes


@pytest.mark.parametrize("counts", [(100, 100), (100, 50), (None, None)])
def test_validation_losses_are_over_as_many_tokens_as_the_records_say(tmp_path, one, counts):
    """train.eval_tokens may be more than the validation split has."""
    other = written(tmp_path / "two", [1.0], data=("t", "a", "v"), **{"train.eval_tokens": 100})
    for folder, count in zip((one, other), counts, strict=True):
        with (folder / "metrics.jsonl").open("a") as file:
            told = {} if count is None else {"val_tokens": count}
            file.write(json.dumps({"step": 3, "val_loss": 2.0} | told) + "\n")
    told = any("different numbers of tokens" in n for n in compare.read([one, other]).notes)
    assert told == (counts != (100, 100))


def test_what_is_not_known_is_not_called_different(tmp_path, one):
    other = written(tmp_path / "two", [1.0])
    notes = " ".join(compare.read([one, other]).notes)
    assert "different" not in notes and "two: it has no checkpoint, so" in notes


def test_a_run_whose_checkpoints_cannot_be_read_is_not_said_to_have_none(tmp_path, one):
    other = written(tmp_path / "two", [1.0], data=("t", "a", "v"))
    for manifest in other.glob("checkpoints/*/manifest.json"):
        manifest.write_text("{")
    notes = " ".join(compare.read([one, other]).notes)
    assert "two: none of its checkpoints can be read, so" in notes


def test_a_run_without_a_checkpoint_has_its_tokenizer(tmp_path, one):
    ByteTokenizer().save(written(tmp_path / "two", [1.0]) / "tokenizer.json")
    notes = " ".join(compare.read([one, tmp_path / "two"]).notes)
    assert "different tokenizers" in notes and "`cupytron eval RUN` prints them" in notes


def test_vocabularies_without_tokenizers(tmp_path):
    for name, size in (("a", 50), ("b", 60)):
        written(tmp_path / name, [1.0], **{"model.vocab_size": size})
    notes = compare.read([tmp_path / "a", tmp_path / "b"]).notes
    assert sum("vocabularies of different sizes" in note for note in notes) == 1


def test_settings_are_compared_as_they_are_used(tmp_path):
    """What is not set follows another setting, and the last bit of a quotient is no difference."""
    for name, more in (("a", {}), ("b", {"model.num_kv_heads": 4, "optim.min_lr": 0.0003})):
        written(tmp_path / name, [1.0], **{"model.vocab_size": 50, "optim.lr": 0.003, **more})
    written(tmp_path / "c", [1.0], **{"model.vocab_size": 50, "model.family": "llama"})
    assert compare.read([tmp_path / "a", tmp_path / "b"]).settings == {}
    found = compare.read([tmp_path / "a", tmp_path / "c"]).settings
    assert found["model.norm"] == ["layer", "rms"] and found["optim.min_lr"] == ["0.0003", "0.0001"]


def test_a_run_in_progress(tmp_path, one):
    other = written(tmp_path / "two", [3.0, 2.0], **{"train.max_steps": 5})
    with (other / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    assert compare.read([one, other]).table()["Step"] == ["3 of 2,000", "2 of 5"]


@pytest.mark.parametrize(
    ("seconds", "unit"), [(0.02, "seconds"), (100, "seconds"), (200, "minutes"), (11000, "hours")]
)
def test_times_are_shown_in_a_unit_that_fits_and_are_not_negative(tmp_path, seconds, unit):
    for name in "ab":
        folder = written(tmp_path / name, [])
        lines = [{"step": i, "loss": 1.0, "elapsed_seconds": seconds * i / 9} for i in range(1, 10)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    compare.write_html(compare.read([tmp_path / "a", tmp_path / "b"]), tmp_path / "page.html")
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", (tmp_path / "page.html").read_text())
    assert unit in texts and not [said for said in texts if said.startswith("-")]


def test_many_runs_are_named_once_and_their_lines_by_letters(tmp_path):
    folders = [written(tmp_path / f"{'long' * 20}-{i}", [2.0, 1.0], [(1, 2.0)]) for i in range(5)]
    for count, each in ((5, 1), (2, 4)):
        found = compare.read(folders[:count])
        compare.write_html(found, tmp_path / "page.html")
        body = (tmp_path / "page.html").read_text().partition('<ul class="legend">')[2]
        keys = re.findall(r'class="key">.*?</svg>([^<]*)<', body)
        assert sum(found.runs[0].name in key for key in keys) == each


def test_long_values_are_cut_in_the_terminal_only(tmp_path, one):
    path = f"/{'x' * 5000}/end"
    other = written(tmp_path / "two", [1.0], **{"data.path": json.dumps(path)})
    done = call(one, other, "--out", tmp_path / "page.html")
    assert re.search(r"^data.path +- +/xxxxxxxxxxx\.\.\.x+/end$", done.output, re.M)
    assert path in (tmp_path / "page.html").read_text()


def test_runs_without_records_or_with_losses_that_are_no_numbers(tmp_path, one):
    begun = written(tmp_path / "begun", [])
    lost = written(tmp_path / "lost", [1.0, None])
    found = compare.read([one, begun, lost])
    assert any("begun: it has no records yet" in note for note in found.notes)
    assert any("lost: 1 loss was not finite" in note for note in found.notes)
    nan = written(tmp_path / "nan", [None])
    words = "nan: it has no loss that is a finite number"
    assert any(words in note for note in compare.read([one, nan]).notes)
    assert found.table()["Training loss"][1] == "-"
    compare.write_html(found, tmp_path / "page.html")


def test_names_are_as_long_as_it_takes_to_tell_runs_apart(tmp_path):
    for group in "xy":
        written(tmp_path / group / "run", [1.0])
    found = compare.read([tmp_path / "x" / "run", tmp_path / "y" / "run"])
    assert [run.name for run in found.runs] == ["x/run", "y/run"]


def test_what_cannot_be_compared_is_refused(tmp_path, one):
    many = [written(tmp_path / f"run{i}", [1.0]) for i in range(9)]
    for paths, words in (
        ([one], "1 run is given"),
        (many, "9 runs are given; 2 to 8"),
        ([one, many[0], tmp_path / "run0" / ".." / "one"], "is the same run as"),
        ([one, tmp_path], "not a run's folder"),
    ):
        with pytest.raises(CupytronError, match=words):
            compare.read(paths)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="Too many levels"):  # which commands say in one line
        compare.read([one, tmp_path / "loop"])
    found = compare.read(many[:8])
    compare.write_html(found, tmp_path / "page.html")
    assert len({run.tag for run in found.runs}) == 8


def test_a_file_of_a_run_is_not_written_over(one, tmp_path):
    other, before = written(tmp_path / "two", [1.0]), (one / "metrics.jsonl").read_bytes()
    done = call(one, other, "--out", one / "metrics.jsonl")
    assert isinstance(done.exception, CupytronError)
    assert (one / "metrics.jsonl").read_bytes() == before


def test_a_picture_that_cannot_be_drawn_is_refused_before_the_work(tmp_path, one, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    done = call(one, tmp_path / "nothing", "--png", tmp_path / "x.png")
    assert "needs matplotlib" in str(done.exception)


def test_a_table_of_figures_has_a_row_for_each(one):
    assert compare.Compared("A", "a", Report("a", {}), {}, {}).figures() == {}

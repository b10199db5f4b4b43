"""Any bytes end in one line, within 10 seconds and a gigabyte.

CUPYTRON_FUZZ=N tries N inputs (the acceptance run asks for 20,000).
"""

import os

import fuzz
import pytest

ALL = int(os.environ.get("CUPYTRON_FUZZ", "2000"))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("valid")
    fuzz.make(folder)
    return folder


def jobs(first, count):
    """So many inputs, the kinds in turn."""
    names = list(fuzz.KINDS)
    return [(names[i % len(names)], first + i // len(names)) for i in range(count)]


def replayed(wrong):
    return "\n".join([*wrong, "again: python tests/strangers/fuzz.py KIND SEED"])


@pytest.mark.parametrize("name", fuzz.KINDS)
def test_valid_inputs_are_read(made, tmp_path, name):
    """Otherwise a refusal of everything would pass."""
    fuzz.shutil.copytree(made, tmp_path / "inputs")
    assert fuzz.KINDS[name].read(tmp_path / "inputs") not in (1, 2)


def test_some_mutated_inputs_end_in_one_line(made):
    wrong = fuzz.run(made, jobs(0, 5 * len(fuzz.KINDS)))
    assert not wrong, replayed(wrong)


@pytest.mark.slow
@pytest.mark.timeout(max(900, ALL // 2))
def test_mutated_inputs_end_in_one_line(made):
    wrong = fuzz.run(made, jobs(1000, ALL))
    assert not wrong, replayed(wrong)


def test_a_hang_and_a_traceback_are_seen(made, monkeypatch):
    def hang(folder):
        while True:
            pass

    monkeypatch.setattr(fuzz, "SECONDS", 1)
    monkeypatch.setitem(fuzz.KINDS, "text", fuzz.Kind("source.txt", hang))
    monkeypatch.setitem(fuzz.KINDS, "bin", fuzz.Kind("source.bin", lambda folder: {}[0]))
    wrong = fuzz.run(made, [("bin", 1), ("text", 1), ("bin", 2)])
    assert [line.split(":")[0] for line in wrong] == ["bin 1", "text 1", "bin 2"]
    assert "KeyError" in wrong[0] and "a hang" in wrong[1]

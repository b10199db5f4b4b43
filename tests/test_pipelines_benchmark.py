"""The benchmark of pipelines: its figures and pictures have everything; not what the times are."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cupytron.parallel import schedules

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "pipelines.py"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Folder with the figures and pictures of a run whose layers take half a millisecond."""
    folder = tmp_path_factory.mktemp("pipelines")
    words = ["--threads", "--unit", "1", "--steps", "1", "--pictures", folder]
    command = [sys.executable, SCRIPT, *words, "--out", folder / "out.json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "Traceback" not in done.stderr  # the exit code tells about times
    return folder


def test_figures_are_of_every_schedule_and_set_of_times(written):
    record = json.loads((written / "out.json").read_text())
    run = record["set_times"]["4 threads"]
    assert {"cpu", "cores"} <= set(run["machine"]) and run["steps"] == 1
    assert len(run["schedules"]) == 2
    for of_schedules in run["schedules"].values():
        assert list(of_schedules) == list(schedules.NAMES)
        for found in of_schedules.values():
            assert 0 < found["predicted"] < 1 and 0 < found["measured"] < 1
            assert found["ratio"] == pytest.approx(found["measured"] / found["predicted"])


@pytest.mark.parametrize("kind", ["predicted", "measured"])
@pytest.mark.parametrize("name", schedules.NAMES)
def test_pictures_have_every_action(written, name, kind):
    picture = (written / f"{name}-{kind}.svg").read_text()
    schedule = schedules.make(name, 4, 8)
    assert picture.count('class="action"') == sum(map(len, schedule.actions))
    assert f">{name}, 4 stages, 8 micro-batches, F = 1, B = 1, W = 1 ms: {kind} bubble " in picture

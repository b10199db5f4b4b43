"""Each mesh, batch and number of heads that an error advises is one that is then accepted."""

import re

import pytest
from launchers import launch
from runs import cupytron, make_data, run_here, start

from cupytron.config import load_config
from cupytron.errors import ConfigError


def refusal(settings, ranks=None):
    with pytest.raises(ConfigError) as caught:
        load_config(overrides=settings, ranks=ranks)
    return str(caught.value)


def meshes(text):
    """The meshes that a message lists, each as settings with the batch that it is said to need."""
    batches = dict(re.findall(r"dp=(\d+) needs train\.global_batch=(\d+)", text))
    listed = re.search(r"(?:choose from|which can be) ((?:(?:\w\w=\d+ ?)+(?:, )?)+)", text)
    for mesh in re.split(", ?", listed[1].strip().rstrip(",")) if listed else []:
        sizes = dict(part.split("=") for part in mesh.split())
        if batch := batches.get(sizes.get("dp", "1")):
            yield sizes, [f"train.global_batch={batch}"]
        else:
            yield sizes, []


MODELS = [
    [],
    ["model.num_heads=8", "model.num_kv_heads=2"],
    ["model.num_heads=1", "train.deterministic=true"],
    ["model.num_layers=1", "train.global_batch=24"],
    ["parallel.schedule=zb-v", "model.num_layers=5"],
    ["train.micro_batch=2", "train.global_batch=12"],
]
MESHES = [["tp=2"], ["tp=3"], ["tp=8"], ["pp=3"], ["tp=3", "pp=2"], ["dp=5"], ["tp=6", "dp=1"]]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("mesh", MESHES)
def test_every_mesh_that_is_advised_is_accepted(model, mesh):
    refused = 0
    for ranks in (1, 2, 3, 4, 5, 6, 8, 12):
        asked = [*model, *(f"parallel.{axis}" for axis in mesh)]
        try:
            load_config(overrides=asked, ranks=ranks)
            continue
        except ConfigError as error:
            text = str(error)
        if "does not fit" not in text and "does not divide" not in text:
            continue
        refused += 1
        told = re.search(r"start (\d+) ranks?, which can be", text)
        advised = list(meshes(text))
        for sizes, batch in advised:
            # a default that the message leaves out is 1
            new = [f"parallel.{axis}={sizes.get(axis, 1)}" for axis in ("tp", "pp", "dp")]
            load_config(overrides=[*model, *new, *batch], ranks=int(told[1]) if told else ranks)
        if other := re.search(r"start (\d+) ranks \(mpirun -n \1\)( with (\S+))?", text):
            more = [other[3]] if other[3] else []
            load_config(overrides=[*asked, *more], ranks=int(other[1]))
        assert advised or other, text
    assert refused


def test_three_ranks_are_not_told_to_share_four_heads():
    text = refusal(["parallel.tp=2"], 3)
    assert "tp=3" not in text and "start 2 ranks (mpirun -n 2)" in text


def test_heads_that_are_advised_fit_the_groups_of_keys_and_the_rotary_pairs():
    for fixed in (
        ["model.num_kv_heads=2", "model.d_model=12"],
        ["model.family=llama", "model.d_model=12"],
        ["model.family=llama", "model.num_kv_heads=3", "model.d_model=36"],
    ):
        text = refusal([*fixed, "model.num_heads=5"])
        listed = re.search(r"choose num_heads from ([\d, ]+)", text)[1]
        for heads in listed.split(", "):
            load_config(overrides=[*fixed, f"model.num_heads={heads}"])


def test_a_batch_that_is_advised_can_be_shared_by_the_replicas():
    text = refusal(["train.global_batch=30", "parallel.dp=2"], 2)
    for batch in re.search(r"choose (\d+) or (\d+)", text).groups():
        load_config(overrides=[f"train.global_batch={batch}", "parallel.dp=2"], ranks=2)


def test_commands_that_read_a_run_advise_what_its_model_fits(tmp_path):
    run_here(make_data(tmp_path), tmp_path / "run", "train.max_steps=1")  # 2 heads
    argv, environment = launch("mpich", 3, [cupytron(), "eval", str(tmp_path / "run"), "--tp", "2"])
    process = start(argv, environment)
    output, _ = process.communicate(timeout=100)
    assert process.returncode and "tp=2 does not fit 3 ranks; choose from tp=1 dp=3, or" in output
    assert "tp=3" not in output and "needs" not in output

"""The whole model and AdamW against an independent PyTorch model, to 1e-9 in float64."""

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cupytron import ops
from cupytron.config import ModelConfig, load_config, resolve_model
from cupytron.model import Transformer
from cupytron.stash import MicroBatch, Stash
from cupytron.trainer import Trainer

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

TOLERANCE = 1e-9
# nothing is a multiple of anything else, and the sequence is shorter than the context
SMALL = {"num_layers": 2, "num_heads": 4, "d_model": 24, "d_ff": 20, "vocab_size": 13}
LLAMA = {"family": "llama", "num_kv_heads": 2}

CASES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "gpt2 untied": {"tied": False},
    "gpt2 no bias": {"bias": False},
    "gpt2 no bias untied": {"bias": False, "tied": False},
    "gpt2 exact gelu": {"activation": "gelu_exact"},
    "gpt2 relu": {"activation": "relu"},
    "gpt2 grouped": {"num_kv_heads": 2},
    "gpt2 one kv head": {"num_kv_heads": 1},
    "gpt2 sinusoidal": {"position": "sinusoidal"},
    "gpt2 no positions": {"position": "none"},
    "gpt2 one head": {"num_heads": 1, "d_model": 7},
    "llama": {"family": "llama"},
    "llama tied": {"family": "llama", "tied": True},
    "llama bias": {"family": "llama", "bias": True},
    "llama grouped": LLAMA,
    "llama grouped bias tied": {**LLAMA, "bias": True, "tied": True},
    "llama one kv head": {"family": "llama", "num_kv_heads": 1},
    "llama layer norm": {**LLAMA, "norm": "layer", "bias": True},
    "llama theta eps": {**LLAMA, "rope_theta": 500.0, "norm_eps": 1e-2},
}


@pytest.fixture(scope="module")
def torch_gpt() -> Any:
    folder = str(Path(__file__).parents[1] / "benchmarks")
    sys.path.insert(0, folder)
    yield importlib.import_module("torch_gpt")
    sys.path.remove(folder)


def difference(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape
    return float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-12))


def random_model(config: ModelConfig, rng: np.random.Generator) -> Transformer:
    """Larger values than initialisation gives, so that every part matters; biases are not zero."""
    model = Transformer(config)
    model.materialize(seed=1, dtype=np.float64)
    for name, parameter in model.named_parameters():
        parameter.data[...] = rng.normal(size=parameter.shape) * 0.2
        if "norm" in name and name.endswith("weight"):
            parameter.data += 1.0
    return model


def run_ours(model: Transformer, ids: np.ndarray, targets: np.ndarray) -> float:
    """Loss; the gradients are in the parameters."""
    stash = Stash(MicroBatch(*ids.shape, training=True))
    logits = model.forward(ids.ravel(), stash)
    scale = 1.0 / (targets != ops.IGNORE).sum()
    loss = ops.cross_entropy(logits, targets.ravel(), scale)
    model.backward(logits, stash)
    assert len(stash) == 0
    return loss


def compare(torch_gpt: Any, settings: dict[str, Any], batch: int, seq: int, context: int) -> None:
    given = ModelConfig(**{**SMALL, "context_length": context, **settings})
    config = resolve_model(given, None, seq)
    rng = np.random.default_rng(7)
    ours = random_model(config, rng)
    theirs = torch_gpt.make_model(config, torch.float64)
    torch_gpt.load_cupytron(theirs, {name: p.data for name, p in ours.named_parameters()})

    ids = rng.integers(config.vocab_size, size=(batch, seq))
    targets = rng.integers(config.vocab_size, size=(batch, seq))
    targets[0, : seq // 2] = ops.IGNORE

    loss = run_ours(ours, ids, targets)
    expected = theirs(torch.from_numpy(ids), torch.from_numpy(targets))
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=TOLERANCE)

    gradients = torch_gpt.named_gradients(theirs)
    parameters = dict(ours.named_parameters())
    assert parameters.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert np.abs(gradient).max() > 0, name
        assert difference(parameters[name].grad, gradient) < TOLERANCE, name


@pytest.mark.parametrize("recompute", ["none", "block"])
@pytest.mark.parametrize("case", CASES)
def test_loss_and_every_gradient_agree(torch_gpt: Any, case: str, recompute: str) -> None:
    compare(torch_gpt, {**CASES[case], "recompute": recompute}, batch=3, seq=7, context=9)


@pytest.mark.parametrize("case", ["gpt2", "llama grouped"])
@pytest.mark.parametrize(("batch", "seq"), [(1, 1), (1, 2), (2, 65), (1, 200)])
def test_sequences_of_one_token_and_of_several_blocks_agree(
    torch_gpt: Any, case: str, batch: int, seq: int
) -> None:
    compare(torch_gpt, CASES[case], batch, seq, context=seq)


def test_unequal_names_are_refused(torch_gpt: Any) -> None:
    config = resolve_model(ModelConfig(**SMALL), None, 5)
    with pytest.raises(ValueError, match=r"embedding\.weight"):
        torch_gpt.load_cupytron(torch_gpt.make_model(config), {})


@pytest.mark.parametrize("clip", [0.05, 0.0])
@pytest.mark.parametrize("case", ["gpt2", "llama grouped bias tied"])
def test_three_steps_of_training_agree(torch_gpt: Any, case: str, clip: float) -> None:
    """Accumulation, clipping, AdamW with its two kinds of parameters, and a warm-up."""
    settings = {
        **{f"model.{key}": value for key, value in {**SMALL, **CASES[case]}.items()},
        "train.sequence_length": 7,
        "train.micro_batch": 2,
        "train.global_batch": 6,
        "train.dtype": "float64",
        "optim.lr": 0.01,
        "optim.warmup_steps": 2,
        "optim.weight_decay": 0.3,
        "optim.clip": clip,
    }
    config = load_config(overrides=[f"{k}={str(v).lower()}" for k, v in settings.items()])
    trainer = Trainer(config)
    trainer.materialize()
    rng = np.random.default_rng(3)
    for _, parameter in trainer.model.named_parameters():
        parameter.data += rng.normal(size=parameter.shape) * 0.1

    theirs = torch_gpt.make_model(trainer.model.config, torch.float64)
    weights = {name: p.data for name, p in trainer.model.named_parameters()}
    torch_gpt.load_cupytron(theirs, weights)
    optimizer = torch_gpt.make_optimizer(
        theirs,
        lr=1.0,
        betas=(config.optim.beta1, config.optim.beta2),
        eps=config.optim.eps,
        weight_decay=config.optim.weight_decay,
        fused=False,
    )

    for step in range(3):
        ids = rng.integers(13, size=(6, 7))
        targets = rng.integers(13, size=(6, 7))
        targets[step, :5] = ops.IGNORE  # the micro-batches count unequally many targets
        result = trainer.train_step(ids, targets)

        optimizer.zero_grad()
        loss = theirs(torch.from_numpy(ids), torch.from_numpy(targets))
        loss.backward()
        gradients = [p.grad for p in theirs.parameters()]
        norm = torch.linalg.vector_norm(torch.cat([g.flatten() for g in gradients]))
        if clip:
            assert norm > clip
            # not clip_grad_norm_, which divides by norm + 1e-6
            torch._foreach_mul_(gradients, clip / norm)
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * min(1.0, (step + 1) / 3)
        optimizer.step()

        assert result.loss == pytest.approx(loss.item(), rel=TOLERANCE)
        assert result.grad_norm == pytest.approx(norm.item(), rel=TOLERANCE)
    for name, value in torch_gpt.named_arrays(theirs).items():
        assert difference(weights[name], value) < TOLERANCE, name

"""A user's own model for verify, which is loaded from a Python file and put on a mesh."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cupytron.comm import ParallelContext
from cupytron.config import ModelConfig, RunConfig
from cupytron.errors import ConfigError, CupytronError
from cupytron.gradient_check import Report, check_gradient
from cupytron.layer import Layer
from cupytron.nn import Embedding
from cupytron.parallel.pipeline import Pipeline
from cupytron.parallel.plan import parallelize
from cupytron.parallel.zero import Zero
from cupytron.trainer import Trainer


class OwnModel:
    """A class of models: layers that make logits (T, V) of ids (T,), with a `loss`.

    Args:
        make: makes one, without arguments. It may have the attributes `vocab_size` (V; else the rows of its
            first Embedding), and `tensor_plan`, the keyword arguments of parallelize that say what is cut.

    Raises:
        CupytronError: it makes no such model.
    """

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make = make
        self.name = getattr(make, "__name__", "the model")
        model = make()
        if not isinstance(model, Layer) or not hasattr(model, "loss"):
            raise CupytronError(
                f"{self.name}: makes a {type(model).__name__}; a model is a cupytron.layer.Chain, or "
                "another Layer, with a method loss(logits, targets, scale)"
            )
        tables = [part for _, part in model.named_layers() if isinstance(part, Embedding)]
        size = getattr(model, "vocab_size", None) or next((t.weight.shape[0] for t in tables), None)
        if size is None:
            raise CupytronError(
                f"{self.name}: its vocabulary is not known; set vocab_size = N in the class"
            )
        self.vocab_size = int(size)
        self.tensor_plan: dict[str, Any] | None = getattr(model, "tensor_plan", None)

    @classmethod
    def load(cls, name: str) -> "OwnModel":
        """From "FILE:CLASS". FILE is executed, and may import modules that lie beside it.

        Raises:
            CupytronError: there is no such file or class.
        """
        file, colon, kind = name.rpartition(":")
        path = Path(file)
        if not colon or not path.is_file():
            raise CupytronError(
                f"{name}: give FILE:CLASS, such as model.py:Model, with an existing FILE"
            )
        spec = importlib.util.spec_from_file_location(path.stem, path)
        if spec is None or spec.loader is None:
            raise CupytronError(f"{file}: is no Python file; its name has to end in .py")
        module = importlib.util.module_from_spec(spec)
        sys.path.insert(0, str(path.resolve().parent))
        sys.modules[path.stem] = module  # as an import of it would
        spec.loader.exec_module(module)
        made = getattr(module, kind, None)
        if not callable(made):
            there = [
                n for n, v in vars(module).items() if isinstance(v, type) and issubclass(v, Layer)
            ]
            raise CupytronError(
                f"{name}: {file} has no class {kind!r}; there are {', '.join(there) or 'no layers'}"
            )
        return cls(made)

    def settings(self, config: RunConfig) -> RunConfig:
        """These settings, for this model's vocabulary.

        Raises:
            ConfigError: the model does not say how tensor parallelism cuts it.
        """
        parallel = config.parallel
        if parallel.tp > 1 and self.tensor_plan is None:
            raise ConfigError(
                f"{self.name}: tp={parallel.tp} has to know which layers are cut; set tensor_plan = "
                '{"column": [...], "row": [...], "vocabulary": [...]} in the class (see '
                "cupytron.parallelize), or leave out --tp and use --dp, --pp and --zero"
            )
        model = config.model.model_copy(update={"vocab_size": self.vocab_size})
        return config.model_copy(update={"model": model})

    def check(self, config: RunConfig) -> Report:
        """The gradient check of the whole model, on micro-batches as the settings have them."""
        train = config.train
        tokens = train.micro_batch * train.sequence_length
        return check_gradient(
            self.make(), (tokens,), vocab_size=self.vocab_size, batch_size=train.micro_batch
        )


class OwnTrainer(Trainer):
    """Trains a user's model, not materialised yet.

    Args:
        own: the model.
        config: the run's settings, but for those of the model.
        context: the mesh.
    """

    def __init__(self, own: OwnModel, config: RunConfig, context: ParallelContext) -> None:
        self.own = own
        super().__init__(config, None, context)

    def build_model(self, model: ModelConfig) -> tuple[Any, Zero]:
        """As Trainer's, in the order that plan.build has."""
        parallel, context = self.config.parallel, self.context
        made = self.own.make()
        if self.own.tensor_plan is not None:
            parallelize(made, context, **self.own.tensor_plan, sequence_parallel=parallel.sp)
        pipeline = Pipeline(
            made,
            context.pp,
            context.ends,
            parallel.schedule,
            parallel.chunks,
            device=context.device,
        )
        deterministic = self.config.train.deterministic
        return made, Zero(made, context, parallel.zero, deterministic, pipeline=pipeline)

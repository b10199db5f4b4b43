"""A new run that starts from another run's weights: whether they fit, and taking them."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field

from cupytron.checkpoint import Checkpoint
from cupytron.comm import Communicator
from cupytron.config import ModelConfig
from cupytron.data import Dataset
from cupytron.errors import ConfigError, GoneCheckpoint
from cupytron.resume import check_tokenizer, model_differences
from cupytron.run_folder import RunFolder
from cupytron.together import together
from cupytron.trainer import Trainer


@dataclass
class Source:
    """The run whose weights a new one starts from.

    Attributes:
        folder: the run's, which need not be one.
        checkpoint: "best" (by validation loss; the last if none was evaluated), "last", or a step.
    """

    folder: RunFolder
    checkpoint: str = "best"
    _chosen: Checkpoint | None = field(default=None, init=False)  # verified, and fits

    def choose(
        self,
        model: ModelConfig,
        dataset: Dataset,
        warn: Callable[[str], None],
        world: Communicator,
    ) -> None:
        """Verify the checkpoint that the weights will come from, and whether it fits. Collective.

        Args:
            model: the new run's, resolved.
            dataset: the new run's.
            warn: called with a line for each damaged checkpoint that is passed over.

        Raises:
            ConfigError, CheckpointError: as take_weights.
        """

        def fits(found: Checkpoint) -> Checkpoint:
            check_weights(found, model, dataset)
            return found

        folder = together(world, self.folder.require)
        self._chosen = folder.reading(self._which(), warn, fits, world)

    def take_weights(
        self,
        trainer: Trainer,
        dataset: Dataset,
        warn: Callable[[str], None],
        world: Communicator,
    ) -> str:
        """Give the trainer's model the weights; returns a line about them. Collective.

        Raises:
            ConfigError: the weights are of another model or tokenizer; the same on every rank.
            CheckpointError: there is no such checkpoint, or it is damaged; the same on every rank.
        """

        def take(found: Checkpoint) -> str:
            model = trainer.model.config
            check_weights(found, model, dataset)
            trainer.load(found, weights_only=True)
            before = found.about["model"].get("context_length")
            grown = f"; its context was {before} tokens, and is {model.context_length} now"
            return f"weights from {found.folder}{grown if before != model.context_length else ''}"

        if self._chosen is not None:
            with contextlib.suppress(GoneCheckpoint):  # that run trains, and has removed it
                return take(self._chosen)
        return together(world, self.folder.require).reading(self._which(), warn, take, world)

    def _which(self) -> str:
        return "best or last" if self.checkpoint == "best" else self.checkpoint


def check_weights(found: Checkpoint, model: ModelConfig, dataset: Dataset) -> None:
    """Refuse weights that would mean something else in this model, whatever their shapes.

    Another context length is accepted if positions are not a table of weights.

    Raises:
        ConfigError: it says which settings differ, and which to leave out.
    """
    check_tokenizer(found, dataset)
    different = model_differences(found, model)
    if model.position != "learned":
        different.pop("context_length", None)
    lines = [
        f"model.{key}: {there} there, {here} asked for" for key, (there, here) in different.items()
    ]
    if not lines:
        return
    if set(different) == {"context_length"}:
        rows = found.about["model"].get("context_length")
        way_out = (
            f"learned positions are a table of {rows} rows, so leave model.context_length out and set "
            f"train.sequence_length to {rows} or less, or start from a model with rotary positions"
        )
    else:
        keys = ", ".join(f"model.{key}" for key in different)
        way_out = (
            f"leave out {keys} (as an option, in --set, --preset or --config); without a preset and a file "
            "the model is that of the source"
        )
    raise ConfigError(f"{found.folder} does not fit: {'; '.join(lines)}; {way_out}")

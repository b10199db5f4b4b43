"""A trained model, read from a run's folder: evaluate it, write text with it."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cupytron.config import RunConfig, load_config
from cupytron.data import Tokenizer, evaluation_batches, load_tokenizer, open_dataset
from cupytron.errors import CheckpointError, CupytronError
from cupytron.generate import generate
from cupytron.model import Transformer
from cupytron.run_folder import RunFolder
from cupytron.trainer import evaluate


class TrainedModel:
    """A model with the weights of one checkpoint, and its tokenizer.

    Attributes:
        config: the run's settings. step: of the checkpoint. model: the Transformer.
        tokenizer: None if the data set had none.
    """

    def __init__(
        self, config: RunConfig, model: Transformer, tokenizer: Tokenizer | None, step: int
    ) -> None:
        self.config, self.model, self.tokenizer, self.step = config, model, tokenizer, step

    def stream(
        self,
        prompt: str,
        max_new_tokens: int = 200,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 1,
        sample: int = 0,
        stop_at_separator: bool = True,
    ) -> Iterator[str]:
        """The text after `prompt`, piece by piece; arguments as in cupytron.generate.generate.

        Raises:
            CupytronError, DataError: no tokenizer, an empty prompt, or an argument out of range.
        """
        tokenizer = self.tokenizer
        if tokenizer is None:
            raise CupytronError(
                "this run has no tokenizer (its data set was given as token ids), so it cannot "
                "read a prompt; prepare the data with --tokenizer FILE"
            )
        separator = tokenizer.separator
        ids = tokenizer.encode(prompt)
        if not ids and separator is not None:
            ids = [separator]  # a document begins here
        decoder = tokenizer.stream()
        for token in generate(
            self.model,
            ids,
            max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            sample=sample,
            stop=separator if stop_at_separator else None,
            vocab_size=tokenizer.vocab_size,
        ):
            if text := decoder.push(token):
                yield text
        if text := decoder.finish():
            yield text

    def generate(self, prompt: str, max_new_tokens: int = 200, **options: Any) -> str:
        """The text after `prompt`; options as in `stream`."""
        return "".join(self.stream(prompt, max_new_tokens, **options))

    def evaluate(self, data: str | Path | None = None) -> dict[str, Any]:
        """Loss over the whole validation split.

        Args:
            data: a prepared folder; None: the one that the run was trained on.

        Returns: val_loss (nats a token), perplexity, bits_per_byte (None if the bytes of the text are
            not known), tokens (targets counted), step.
        """
        path = data or self.config.data.path
        if path is None:
            raise CupytronError("the run names no data set; give --data DIR")
        dataset = open_dataset(path)
        vocab = int(self.model.config.vocab_size or 0)
        if dataset.vocab_size > vocab:
            raise CupytronError(
                f"{path} has {dataset.vocab_size} token ids, the model {vocab}; "
                "give data made with the run's tokenizer"
            )
        if self.tokenizer and dataset.tokenizer_hash != self.tokenizer.hash:
            raise CupytronError(
                f"{path} was made with another tokenizer than the run's; "
                "prepare it with --tokenizer RUN/tokenizer.json"
            )
        train = self.config.train
        batches = evaluation_batches(dataset.val, train.sequence_length, train.micro_batch)
        total, counted = evaluate(self.model, batches)
        loss, num_bytes = total / counted, dataset.val.num_bytes
        return {
            "val_loss": loss,
            "perplexity": math.exp(loss) if loss < 700 else math.inf,
            "bits_per_byte": total / math.log(2) / num_bytes if num_bytes else None,
            "tokens": counted,
            "step": self.step,
        }


def load(
    run: str | Path, checkpoint: str = "best", warn: Callable[[str], None] = lambda text: None
) -> TrainedModel:
    """A trained model from a run's folder.

    Args:
        run: folder that `cupytron train --out` made.
        checkpoint: "best" (by validation loss; the last if none was evaluated), "last", or a step.
        warn: hears of damaged checkpoints that are passed over.

    Raises:
        CupytronError: no such run or checkpoint, or a damaged one.
    """
    folder = RunFolder(run).require()
    config = load_config(file=folder.config)
    if checkpoint == "best" and folder.best() is None:
        checkpoint = "last"
    found = folder.find(checkpoint, warn)
    # the checkpoint's own record: vocabulary and context as they were resolved in training
    model = Transformer(type(config.model)(**found.about["model"]))
    dtype = np.dtype(config.train.dtype)
    parameters = {f"weight/{name}": p for name, p in model.named_parameters()}
    for name, array in found.tensors():
        parameter = parameters.pop(name, None)
        if parameter is None:
            continue  # optimizer state
        if array.shape != parameter.shape:
            raise CheckpointError(
                f"{found.folder}: {name} has shape {array.shape}, the model {parameter.shape}"
            )
        parameter.data = array.astype(dtype, copy=False)
    if parameters:
        raise CheckpointError(f"{found.folder}: it lacks {', '.join(sorted(parameters))}")
    tokenizer = load_tokenizer(folder.tokenizer) if folder.tokenizer.exists() else None
    return TrainedModel(config, model, tokenizer, found.step)

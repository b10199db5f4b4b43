"""A trained model, read from a run's folder: evaluate it, write text with it."""

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cupytron.backend import named_dtype
from cupytron.checkpoint import Checkpoint
from cupytron.comm import ParallelContext
from cupytron.config import ParallelConfig, RunConfig, load_config
from cupytron.data import (
    DataError,
    Dataset,
    StreamDecoder,
    Tokenizer,
    evaluation_batches,
    load_tokenizer,
)
from cupytron.errors import CheckpointError, ConfigError, CupytronError
from cupytron.generate import generate
from cupytron.memory import explained
from cupytron.mesh_run import check_gpu, open_data, open_mesh
from cupytron.model import Transformer
from cupytron.parallel.pipeline import Pipeline
from cupytron.parallel.plan import build
from cupytron.progress import Note, unwatched
from cupytron.room import check_room
from cupytron.run_folder import RunFolder
from cupytron.sealed_schema import OF_MODEL, check_keys
from cupytron.together import together
from cupytron.trainer import evaluate, load_buckets


class TrainedModel:
    """A model with the weights of one checkpoint, and its tokenizer.

    Attributes:
        config: the run's settings. step: of the checkpoint. model: the Transformer, or this stage's part.
        tokenizer: None if the data set had none. context: the mesh that it runs on.
        pipeline: the stage that is here.
    """

    def __init__(
        self,
        config: RunConfig,
        pipeline: Pipeline,
        tokenizer: Tokenizer | None,
        step: int,
        context: ParallelContext,
        val_sha256: str | None = None,
        warn: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.config, self.tokenizer, self.step = config, tokenizer, step
        self._val_sha256, self._warn = val_sha256, warn
        self.pipeline, self.context = pipeline, context
        self.model: Transformer = pipeline.model

    def __repr__(self) -> str:
        model = self.config.model
        return (
            f"TrainedModel({model.family}, {model.num_parameters():,} parameters, step {self.step}, "
            f"vocabulary of {model.vocab_size}, context of {model.context_length} tokens)"
        )

    def stream(
        self,
        prompt: str | None = None,
        max_new_tokens: int = 200,
        *,
        temperature: float = 0.8,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 1,
        sample: int = 0,
        stop_at_separator: bool = True,
        echo: bool = False,
    ) -> Iterator[str]:
        """The text after `prompt`, piece by piece; arguments as in cupytron.generate.generate.

        The pieces are the text that the new ids add to the text of the prompt's ids (`StreamDecoder`). So
        `prompt` and the pieces together are the text of all ids, if that begins with `prompt`. It does not
        if the tokenizer changes the prompt, such as to lower case.

        Args:
            prompt: None: begin as a document does (`default_prompt`).
            echo: yield the prompt first, as its ids are decoded.

        Raises:
            CupytronError, DataError: no tokenizer, an empty prompt, or an argument out of range.
        """
        tokenizer = self.tokenizer
        if tokenizer is None:
            raise CupytronError(
                "this run has no tokenizer (its data set was given as token ids), so it cannot "
                "read a prompt; prepare the data with --tokenizer FILE"
            )
        if not isinstance(prompt, str | None):
            raise CupytronError(
                f"prompt is of type {type(prompt).__name__}; give text, or None to begin a document"
            )
        separator = tokenizer.separator
        prompt = self.default_prompt() if prompt is None else prompt
        ids = tokenizer.encode(prompt)
        decoder = tokenizer.stream(ids)
        shown = tokenizer.decode(ids)
        if not ids and separator is not None:
            ids = [separator]  # a document begins here
        tokens = generate(
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
            tp=self.context.tp,
            pipeline=self.pipeline,
        )
        pieces = _decoded(tokens, decoder)
        with _explained(self.config, self.context, sequences=1):
            if echo:
                # together with the first text, so that an error comes before the prompt
                yield shown + next(pieces, "")
                yield from pieces
            else:
                # the end of the prompt that comes back with the next word, such as a space
                lost = prompt.removeprefix(shown) if prompt.startswith(shown) else ""
                yield from _after(lost, pieces)

    def default_prompt(self) -> str:
        """Nothing if the tokenizer has a separator to begin with, else a new line or the first token."""
        if self.tokenizer is None or self.tokenizer.separator is not None:
            return ""
        first = (self.tokenizer.decode([i]) for i in range(min(self.tokenizer.vocab_size, 100)))
        for text in ("\n", *first):
            with contextlib.suppress(DataError):
                if self.tokenizer.encode(text):
                    return text
        return ""

    def generate(self, prompt: str | None = None, max_new_tokens: int = 200, **options: Any) -> str:
        """The text after `prompt`; options as in `stream`."""
        return "".join(self.stream(prompt, max_new_tokens, **options))

    def evaluate(
        self, data: str | Path | None = None, note: Note = unwatched, tokens: int | None = None
    ) -> dict[str, Any]:
        """Loss over the validation split: the whole of it, whatever train.eval_tokens says.

        Args:
            data: a prepared folder; None: the one that the run was trained on.
            note: called before each batch, for a watchdog.
            tokens: targets at most, the first of the split; None: all of them.

        Returns: val_loss (nats a token), perplexity, bits_per_byte (None if the bytes of the text are
            not known), tokens (targets counted), step.
        """
        path = self.config.data.path if data is None else data
        if path is None:
            raise CupytronError("the run names no data set; give --data DIR")
        dataset = open_data(path, self.context.world)
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
        if data is None and self._val_sha256 not in (None, dataset.val.sha256):
            self._warn(
                f"{path} is not the data set that the checkpoint of step {self.step} was trained with: its "
                "validation split is another one, so that losses cannot be compared"
            )
        train = self.config.train
        batches = evaluation_batches(dataset.val, train.sequence_length, train.micro_batch, tokens)
        noted = _noted(batches, self.step, note)
        with _explained(self.config, self.context, train.micro_batch):
            total, counted = evaluate(self.pipeline, noted, self.context.dp)
        loss, num_bytes = total / counted, predicted_bytes(dataset, counted)
        return {
            "val_loss": loss,
            "perplexity": math.exp(loss) if loss < 700 else math.inf,
            "bits_per_byte": total / math.log(2) / num_bytes if num_bytes else None,
            "tokens": counted,
            "step": self.step,
        }


def _decoded(tokens: Iterator[int], decoder: StreamDecoder) -> Iterator[str]:
    for token in tokens:
        if text := decoder.push(token):
            yield text
    if text := decoder.finish():
        yield text


def _after(start: str, pieces: Iterator[str]) -> Iterator[str]:
    """The pieces without `start`, if they begin with it; else all of them."""
    held = ""
    for text in pieces:
        held += text
        if len(held) < len(start) and start.startswith(held):
            continue
        if rest := held.removeprefix(start):
            yield rest
        held = start = ""
    if held:
        yield held


def _noted(batches: Iterator[Any], step: int, note: Note) -> Iterator[Any]:
    note(step, "evaluating")
    for batch in batches:
        note(step, "evaluating")
        yield batch


def predicted_bytes(dataset: Dataset, targets: int) -> int | None:
    """Bytes of the validation text behind its first `targets` targets: the first token is none of them."""
    lengths = dataset.tokenizer.text_lengths() if dataset.tokenizer else None
    if dataset.val.num_bytes is None or lengths is None:
        return None
    if targets < dataset.val.num_tokens - 1:
        return int(lengths[dataset.val.tokens[1 : targets + 1]].sum())
    return dataset.val.num_bytes - int(lengths[dataset.val.tokens[0]])


def load(
    run: str | Path,
    checkpoint: str | int = "best",
    warn: Callable[[str], None] = lambda text: None,
    context: ParallelContext | None = None,
    zero: int = 0,
    device: str = "auto",
) -> TrainedModel:
    """A trained model from a run's folder, whatever mesh it was trained on.

    Args:
        run: folder that `cupytron train --out` made.
        checkpoint: "best" (by validation loss; the last if none was evaluated), "last", or a step.
        warn: hears of damaged checkpoints that are passed over, and of data that are not the run's.
        context: the mesh that the model is to run on; None: this process alone. All of its ranks call
            this, and then the model's methods, together.
        zero: 3 spreads the weights over the replicas, and gathers them layer by layer.
        device: "cpu", "cuda" or "auto", for this process alone; a context has its own.

    Raises:
        CupytronError: an argument is out of range, no such run or checkpoint, or a damaged one.
    """
    if zero not in range(4):
        raise ConfigError(
            f"zero={zero!r}: must be from 0 to 3; 3 spreads the weights over replicas"
        )
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device={device!r}: must be auto, cpu or cuda")
    if context is None:
        RunFolder(run).require()  # before a device is opened
        alone = ParallelConfig.model_validate({"device": device})
        context = open_mesh(RunConfig(parallel=alone))
    mesh = context
    folder = together(mesh.world, RunFolder(run).require)

    def load_from(found: Checkpoint) -> TrainedModel:
        return _load_from(found, folder, warn, mesh, zero)

    which = "best or last" if checkpoint == "best" else str(checkpoint)
    return folder.reading(which, warn, load_from, mesh.world)


def _load_from(
    found: Checkpoint,
    folder: RunFolder,
    warn: Callable[[str], None],
    context: ParallelContext,
    zero: int,
) -> TrainedModel:
    """A checkpoint's model on the mesh of `context`. Collective."""
    # the checkpoint's own record, which its hash covers, not config.toml, which anybody may have edited
    check_keys(found.folder, found.about, OF_MODEL)
    try:
        config = RunConfig(**{**found.about["settings"], "model": found.about["model"]})
    except (ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())  # pydantic's errors have several lines
        raise CheckpointError(f"{found.folder}: its settings cannot be used: {reason}") from None
    if lacking := [name for name, value in config.model if value is None]:
        # a run seals its model with everything filled in
        raise CheckpointError(f"{found.folder}: its model lacks {', '.join(lacking)}")
    # the data may have moved since, and the run been told so
    with contextlib.suppress(ConfigError):
        if (path := load_config(file=folder.config).data.path) is not None:
            data = config.data.model_copy(update={"path": path})
            config = config.model_copy(update={"data": data})
    if context.device.gpu:
        check_gpu(config, training=False)
    parallel = config.parallel.model_copy(update={"zero": zero, "sp": False})
    config = config.model_copy(update={"parallel": parallel})
    check_room(config, config.model, context, training=False)
    _, shards = build(config, config.model, context, training=False)
    # a CPU has no use for 16 bits
    compute_dtype = config.compute_dtype if context.device.gpu else config.train.dtype
    with _explained(config, context, sequences=1):
        shards.materialize(None, config.train.dtype, compute_dtype=named_dtype(compute_dtype))
        load_buckets(found, shards, ("weight",), complete=False)
    data = found.about["data"]
    tokenizer = _tokenizer(folder, data.get("tokenizer_hash"))
    return TrainedModel(
        config, shards.pipeline, tokenizer, found.step, context, data.get("val_sha256"), warn
    )


def _explained(
    config: RunConfig, context: ParallelContext, sequences: int
) -> contextlib.AbstractContextManager[None]:
    """Say what does not fit a GPU that runs so many sequences at once."""
    train = config.train.model_copy(
        update={"micro_batch": sequences, "global_batch": sequences * context.sizes["dp"]}
    )
    alone = config.model_copy(update={"train": train})
    return explained(alone, config.model, context, training=False)


def _tokenizer(folder: RunFolder, expected: str | None) -> Tokenizer | None:
    """RUN/tokenizer.json, if it is the one that the checkpoint was trained with."""
    if expected is None:
        return None
    if not folder.tokenizer.exists():
        raise CupytronError(
            f"{folder.tokenizer}: is missing; copy tokenizer.json there from the run's data set"
        )
    tokenizer = load_tokenizer(folder.tokenizer)
    if tokenizer.hash != expected:
        raise CupytronError(
            f"{folder.tokenizer}: is not the tokenizer that the checkpoint was trained with; "
            "copy tokenizer.json there from the run's data set"
        )
    return tokenizer

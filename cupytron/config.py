"""The settings of a run: TOML files, presets and flags to validated, immutable values.

Imports neither NumPy nor click, because settings decide how the process is prepared before NumPy is
imported. `load_config` is the entry; a class built by hand checks itself too and raises pydantic's
ValidationError. None means "follow another setting"; `resolve_model` and the properties of
`RunConfig` say which.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from cupytron.config_checks import CHUNKS, Problem, check_mesh, check_model, check_run
from cupytron.config_io import show_text, write_toml
from cupytron.config_reader import Conflict, Reader
from cupytron.errors import ConfigError
from cupytron.inherited import inherited_settings

# upper bounds catch slips (a missing dot, a size in bytes), not ambitions
Layers = Annotated[int, Field(ge=1, le=10_000)]
Size = Annotated[int, Field(ge=1, le=2**24)]
Vocabulary = Annotated[int, Field(ge=2, le=2**31)]
Steps = Annotated[int, Field(ge=1, le=10**12)]
StepsOrNever = Annotated[int, Field(ge=0, le=10**12)]
Ranks = Annotated[int, Field(ge=1, le=2**20)]
Positive = Annotated[float, Field(gt=0, le=1e9)]
NotNegative = Annotated[float, Field(ge=0, le=1e9)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if problems := list(self._problems()):
            raise Conflict(problems)
        return self

    def _problems(self) -> Iterable[Problem]:
        return ()


class ModelConfig(_Settings):
    """The network. `resolve_model` fills in every None."""

    family: Literal["gpt2", "llama"] = Field(
        default="gpt2", description="gpt2 or llama: fills the keys below that are not given"
    )
    vocab_size: Vocabulary | None = Field(
        default=None, description="token ids that the tables have room for; unset: the data set's"
    )
    num_layers: Layers = Field(default=4, description="blocks")
    num_heads: Size = Field(default=4, description="attention heads of a block")
    num_kv_heads: Size | None = Field(
        default=None, description="heads of keys and values, shared by groups; unset: num_heads"
    )
    d_model: Size = Field(default=128, description="width of the residual stream")
    d_ff: Size | None = Field(
        default=None,
        description="width of the MLP; unset: gpt2 4 d_model, llama 8/3 d_model, up to a 32-fold",
    )
    context_length: Size | None = Field(
        default=None, description="longest sequence the model takes; unset: train.sequence_length"
    )
    position: Literal["learned", "rotary", "sinusoidal", "none"] | None = Field(
        default=None,
        description="learned, rotary, sinusoidal or none; unset: gpt2 learned, llama rotary",
    )
    norm: Literal["layer", "rms"] | None = Field(
        default=None, description="layer or rms; unset: gpt2 layer, llama rms"
    )
    activation: Literal["gelu", "gelu_exact", "relu", "swiglu"] | None = Field(
        default=None,
        description="gelu (tanh), gelu_exact, relu or swiglu; unset: gpt2 gelu, llama swiglu",
    )
    bias: bool | None = Field(
        default=None,
        description="biases in linear layers and LayerNorm; unset: gpt2 true, llama false",
    )
    tied: bool | None = Field(
        default=None,
        description="the head uses the embedding's table; unset: gpt2 true, llama false",
    )
    dropout: Fraction = Field(default=0.0, description="probability that a value is dropped")
    rope_theta: Positive = Field(default=10000.0, description="base of the rotary wavelengths")
    norm_eps: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1e-5, description="added to the variance in a norm"
    )
    init_std: Annotated[float, Field(gt=0, le=10)] = Field(
        default=0.02, description="standard deviation of the initial weights"
    )
    recompute: Literal["none", "selective", "block"] = Field(
        default="none",
        description="run forward again in backward: selective, of attention and activation functions; "
        "block, of all, keeping a block's input only",
    )

    @property
    def head_size(self) -> int:
        """Width H of one head."""
        return self.d_model // self.num_heads

    def _problems(self) -> Iterable[Problem]:
        return check_model(self)

    def num_parameters(self) -> int:
        """Numbers that training changes; a tied table counts once. The model is resolved."""
        vocab, _, _, context = self.sizes()
        d = self.d_model
        norm = 2 * d if self.norm == "layer" and self.bias else d
        block = 2 * norm + sum(i * o + (o if self.bias else 0) for i, o in self.linears())
        tables = vocab * d * (1 if self.tied else 2)
        positions = context * d if self.position == "learned" else 0
        return tables + positions + self.num_layers * block + norm

    def linears(self) -> list[tuple[int, int]]:
        """(D_in, D_out) of a block's linear layers. The model is resolved."""
        _, kv_heads, d_ff, _ = self.sizes()
        d = self.d_model
        gate = [(d, d_ff)] if self.activation == "swiglu" else []
        return [(d, d + 2 * kv_heads * self.head_size), (d, d), (d, d_ff), *gate, (d_ff, d)]

    def sizes(self) -> tuple[int, int, int, int]:
        """V, N_kv, F and the context's length. The model is resolved."""
        v, kv_heads, d_ff = self.vocab_size, self.num_kv_heads, self.d_ff
        context = self.context_length
        if v is None or kv_heads is None or d_ff is None or context is None:
            raise ConfigError("the model has sizes that are not set; call resolve_model first")
        return v, kv_heads, d_ff, context


class DataConfig(_Settings):
    """The text, as tokens."""

    path: (
        Annotated[
            str, Field(min_length=1, pattern=r"^[^\x00]*$"), AfterValidator(os.path.expanduser)
        ]
        | None
    ) = Field(default=None, description="folder made by `cupytron data prepare`")


class TrainConfig(_Settings):
    """How much is trained on, and in what portions."""

    sequence_length: Size = Field(default=64, description="tokens of a training sequence")
    micro_batch: Size = Field(default=12, description="sequences of one forward and backward")
    global_batch: Size | None = Field(
        default=None,
        description="sequences of a step, a multiple of micro_batch; unset: micro_batch",
    )
    max_steps: Steps = Field(default=2000, description="steps of the whole run")
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = Field(
        default=1, description="of initial weights, sample order and dropout"
    )
    deterministic: bool = Field(
        default=False,
        description="the same bits on any number of replicas: one BLAS thread, sums in a tree (slower)",
    )
    dtype: Literal["float32", "float64"] = Field(
        default="float32",
        description="of weights and optimizer state, as they are updated and saved",
    )
    compute_dtype: Literal["float64", "float32", "bfloat16", "float16"] | None = Field(
        default=None,
        description="of activations, and of the weights' copies that layers use; unset: dtype",
    )
    reduce_dtype: Literal["float64", "float32"] | None = Field(
        default=None, description="of gradients and of their sums over ranks; unset: dtype"
    )
    loss_scale: Annotated[float, Field(ge=1, le=2.0**24)] = Field(
        default=65536.0,
        description="compute_dtype=float16: what the loss is multiplied by at first; it is halved where "
        "gradients overflow, and doubled after 2000 steps in which none did",
    )
    tf32: bool = Field(
        default=False,
        description="GPU: products of float32 with 10 bits of mantissa on tensor cores, faster",
    )
    eval_interval: StepsOrNever = Field(
        default=250, description="steps between validation losses; 0: only at the end"
    )
    eval_tokens: Annotated[int, Field(ge=1, le=10**15)] | None = Field(
        default=None,
        description="targets of a validation loss: the first of the validation split; unset: all of it",
    )
    log_interval: Steps = Field(default=10, description="steps between progress lines")
    check_replicas: StepsOrNever = Field(
        default=0,
        description="steps between comparisons of copies on several ranks; 0: before saves only",
    )


class OptimConfig(_Settings):
    """The optimizer and its learning rate."""

    name: Literal["adamw", "sgd"] = Field(default="adamw", description="adamw or sgd")
    lr: Positive = Field(default=1e-3, description="highest learning rate")
    min_lr: NotNegative | None = Field(
        default=None, description="learning rate at the end of the decay; unset: lr / 10"
    )
    schedule: Literal["constant", "linear", "cosine", "wsd"] = Field(
        default="cosine", description="constant, linear, cosine or wsd (warmup, stable, decay)"
    )
    warmup_steps: StepsOrNever = Field(
        default=100, description="steps in which the learning rate rises to lr"
    )
    decay_steps: Steps | None = Field(
        default=None,
        description="cosine, linear: step where min_lr is reached, unset: train.max_steps; "
        "wsd: length of the final decay, unset: a fifth of train.max_steps",
    )
    beta1: Fraction = Field(default=0.9, description="adamw: decay of the mean gradient")
    beta2: Fraction = Field(default=0.99, description="adamw: decay of the mean square")
    eps: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1e-8, description="adamw: added to the root of the mean square"
    )
    momentum: Fraction = Field(default=0.9, description="sgd: decay of the summed gradient")
    weight_decay: NotNegative = Field(default=0.1, description="decoupled, of matrices only")
    clip: NotNegative = Field(default=1.0, description="largest norm of the gradient; 0: off")


class ParallelConfig(_Settings):
    """How the run is spread over processes and threads."""

    tp: Ranks = Field(default=1, description="tensor-parallel size")
    pp: Ranks = Field(default=1, description="pipeline-parallel size: stages")
    dp: Ranks | None = Field(default=None, description="data-parallel size; unset: what is left")
    schedule: Literal["gpipe", "1f1b", "interleaved", "zb-h1", "zb-v"] = Field(
        default="1f1b",
        description="of the pipeline: gpipe, 1f1b, interleaved, zb-h1 or zb-v (see `cupytron schedule`)",
    )
    chunks: Annotated[int, Field(ge=1, le=1024)] | None = Field(
        default=None, description="interleaved: parts of the model on each stage; unset: 2"
    )
    split: Annotated[str, Field(pattern=r"^\d{1,5}(,\d{1,5})*$")] | None = Field(
        default=None,
        description="blocks of each part of the pipeline, such as 2,3,3,2; unset: parts of equal cost",
    )
    zero: Annotated[int, Field(ge=0, le=3)] = Field(default=0, description="ZeRO stage, 0 to 3")
    sp: bool = Field(default=False, description="sequence parallelism along the tensor axis")
    sp_keep_gathered: bool = Field(
        default=False,
        description="sp: keep inputs of column layers gathered: 4/5 of the bytes, more memory",
    )
    timeout: Annotated[float, Field(ge=0, le=10**7)] = Field(
        default=600.0,
        description="seconds without progress that end a job of several ranks; 0: off",
    )
    threads: Annotated[int, Field(ge=1, le=4096)] | None = Field(
        default=None, description="threads of this process; unset: the cores it may use"
    )
    blas_kernel: Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]{0,31}$")] = Field(
        default="auto", description="OpenBLAS kernel: auto measures, off leaves it, or a name"
    )
    malloc: bool = Field(default=True, description="keep freed pages for the next step (glibc)")
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto",
        description="where layers run; auto: cuda if a GPU and CuPy are there, else cpu",
    )
    comm: Literal["auto", "nccl", "mpi", "mpi-staged"] = Field(
        default="auto",
        description="how ranks exchange what is on GPUs: nccl, mpi (CUDA-aware), mpi-staged through "
        "the host's memory, or auto",
    )
    graphs: bool = Field(
        default=True, description="GPU: record a step as CUDA graphs, and replay them"
    )
    autotune: Literal["on", "off"] = Field(
        default="on", description="choice of kernels: on, the fastest by measurement; off, defaults"
    )

    @property
    def ranks(self) -> int:
        """Processes that the mesh needs; one replica where dp is not set."""
        return self.tp * self.pp * (self.dp or 1)

    @property
    def parts(self) -> int:
        """Parts that the pipeline cuts the model into."""
        return self.pp * (self.chunks or CHUNKS[self.schedule])

    @property
    def blocks_of_parts(self) -> list[int]:
        """`split` as numbers; empty if it is not set."""
        return [int(n) for n in self.split.split(",")] if self.split else []


class CheckpointConfig(_Settings):
    """What is kept on disk."""

    interval: StepsOrNever = Field(default=250, description="steps between saves; 0: at the end")
    keep: Steps = Field(default=2, description="newest saves that stay, besides the best")


class RunConfig(_Settings):
    """Every setting of a run."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    optim: OptimConfig = OptimConfig()
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @property
    def global_batch(self) -> int:
        """Sequences of a step."""
        return self.train.global_batch or self.train.micro_batch

    @property
    def micro_batches(self) -> int:
        """Forward and backward passes of a step."""
        return self.global_batch // self.train.micro_batch

    @property
    def compute_dtype(self) -> str:
        """Name of the dtype that layers work in."""
        return self.train.compute_dtype or self.train.dtype

    @property
    def reduce_dtype(self) -> str:
        """Name of the dtype of gradients."""
        return self.train.reduce_dtype or self.train.dtype

    @property
    def scales_loss(self) -> bool:
        """Whether a loss scale keeps gradients in the range of their dtype."""
        return self.compute_dtype == "float16"

    @property
    def tokens_per_step(self) -> int:
        """Tokens that a step trains on."""
        return self.global_batch * self.train.sequence_length

    @property
    def min_lr(self) -> float:
        """Learning rate at the end of the decay."""
        return self.optim.lr / 10 if self.optim.min_lr is None else self.optim.min_lr

    @property
    def decay_steps(self) -> int:
        """cosine, linear: the step where min_lr is reached; wsd: length of the final decay."""
        if self.optim.decay_steps is not None:
            return self.optim.decay_steps
        steps = self.train.max_steps
        return max(1, steps // 5) if self.optim.schedule == "wsd" else steps

    def to_toml(self) -> str:
        """The settings as a TOML file that `load_config` reads back to equal settings."""
        return write_toml(self.model_dump())

    def _problems(self) -> Iterable[Problem]:
        return check_run(self)


def load_config(
    preset: str | None = None,
    file: str | Path | None = None,
    overrides: Iterable[str] = (),
    ranks: int | None = None,
    check: bool = True,
    start: Mapping[str, Any] | None = None,
    init_from: str | Path | None = None,
) -> RunConfig:
    """The settings of a run: defaults < start < preset < file < overrides, and the later override wins.

    Args:
        preset: name of a file in `cupytron/presets`, without `.toml`.
        file: a TOML file.
        overrides: `section.key=value` strings; `none` as the value unsets a key.
        ranks: processes that the mesh must fit; None: not known yet.
        check: whether the model and the batch must fit the mesh.
        start: sections of settings, as a checkpoint seals them.
        init_from: a run whose weights this one is to start from. Without a preset and a file, its model and
            its train.sequence_length are the start.

    Raises:
        ConfigError: a line for everything that is wrong, each beginning with the key or the file.
        CupytronError: init_from is no run with a checkpoint.
    """
    reader, overrides = Reader(RunConfig), _listed(overrides)
    if init_from is not None and preset is None and file is None:
        start = inherited_settings(Path(init_from), overrides)
    if start is not None:
        reader.add_values(start)
    if preset is not None:
        reader.add_preset(preset)
    if file is not None:
        reader.add_file(file)
    for override in overrides:
        reader.add_override(override)
    return reader.finish(*([lambda config: check_mesh(config, ranks)] if check else []))


def _listed(overrides: Iterable[str]) -> list[str]:
    """Refuse overrides that are text, which has letters, or a mapping, which has keys."""
    wrong: Any = overrides
    if not isinstance(overrides, str | bytes | Mapping):
        listed = list(overrides)
        others = [value for value in listed if not isinstance(value, str)]
        if not others:
            return listed
        wrong = others[0]
    raise ConfigError(
        f"overrides: {show_text(repr(wrong))} is of type {type(wrong).__name__}; give a list of texts "
        'section.key=value, such as ["optim.lr=1e-3"]'
    )


def require_mesh(config: RunConfig, tp: int, pp: int, dp: int) -> None:
    """Refuse settings that do not fit a mesh of these sizes, whatever their own say.

    Raises:
        ConfigError: a line for everything that is wrong.
    """
    sizes = config.parallel.model_copy(update={"tp": tp, "pp": pp, "dp": dp})
    problems = check_mesh(config.model_copy(update={"parallel": sizes}))
    if lines := [problem.message for problem in problems]:
        raise ConfigError("\n".join(lines))


def resolve_model(model: ModelConfig, vocab_size: int | None, sequence_length: int) -> ModelConfig:
    """The model with every None filled in.

    Args:
        model: settings of the model.
        vocab_size: the data set's; None if there is none, and then `model.vocab_size` must be set.
        sequence_length: `train.sequence_length`.

    Raises:
        ConfigError: no vocabulary is known, or the model has no room for the data.
    """
    vocab = model.vocab_size or vocab_size
    if vocab is None:
        raise ConfigError(
            "model.vocab_size: is not set, and there is no data set to take it from; "
            "give --data DIR or --set model.vocab_size=N"
        )
    if vocab < (vocab_size or 0):
        raise ConfigError(
            f"model.vocab_size={vocab}: is smaller than the data set's vocabulary of {vocab_size}; "
            f"set it to {vocab_size} or more, or leave it out"
        )
    context = model.context_length or sequence_length
    if context < sequence_length:
        raise ConfigError(
            f"model.context_length={context}: is shorter than sequences of {sequence_length} "
            "tokens; raise it or lower train.sequence_length"
        )
    llama, d = model.family == "llama", model.d_model
    filled = {
        "vocab_size": vocab,
        "num_kv_heads": model.num_heads,
        "d_ff": -(-8 * d // 96) * 32 if llama else 4 * d,
        "context_length": context,
        "position": "rotary" if llama else "learned",
        "norm": "rms" if llama else "layer",
        "activation": "swiglu" if llama else "gelu",
        "bias": not llama,
        "tied": not llama,
    }
    given = {key: value for key, value in model.model_dump().items() if value is not None}
    try:
        return ModelConfig(**(filled | given))
    except ValidationError as error:
        # only what came from the data set can be wrong here
        raise ConfigError(
            f"model.vocab_size={vocab}: {error.errors()[0]['msg']}; the data set has {vocab} token "
            "ids: prepare it with another tokenizer"
        ) from None


def resolve_run(config: RunConfig, vocab_size: int | None) -> RunConfig:
    """The settings with every None filled in that depends on neither the machine nor the run's length.

    optim.decay_steps stays as it is: unset, it follows train.max_steps when a run is made longer.

    Raises:
        ConfigError: as resolve_model.
    """
    model = resolve_model(config.model, vocab_size, config.train.sequence_length)
    train = config.train.model_copy(update={"global_batch": config.global_batch})
    optim = config.optim.model_copy(update={"min_lr": config.min_lr})
    return config.model_copy(update={"model": model, "train": train, "optim": optim})


def flops_per_token(model: ModelConfig, sequence_length: int, causal: bool) -> float:
    """Floating-point operations of training on one token (forward and backward).

    6 for each weight of a matrix product (the head's table counts, tied or not), and for attention
    12 L D S, or half of it if only the causal half is counted. nanoGPT and picotron count all of
    it, llm.c the half. The model is resolved.
    """
    vocab, _, _, _ = model.sizes()
    weights = vocab * model.d_model + model.num_layers * sum(i * o for i, o in model.linears())
    attention = (6 if causal else 12) * model.num_layers * model.d_model * sequence_length
    return float(6 * weights + attention)

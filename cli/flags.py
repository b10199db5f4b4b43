"""The table of named options that set a run's settings, and where they stand in the help."""

# (names, the key that they set, their heading in the help). Users of other systems know these names. The
# schema of the settings says what they mean. Values stay text here, so that `load_config` reports all
# errors at once and in one way.
FLAGS = [
    (("--num-layers", "--n-layers"), "model.num_layers", "Model"),
    (("--num-heads", "--n-heads"), "model.num_heads", "Model"),
    (("--d-model",), "model.d_model", "Model"),
    (("--data",), "data.path", "Data"),
    (("--sequence-length",), "train.sequence_length", "Batch and steps"),
    (("--micro-batch", "--batch-size"), "train.micro_batch", "Batch and steps"),
    (("--global-batch",), "train.global_batch", "Batch and steps"),
    (("--max-steps",), "train.max_steps", "Batch and steps"),
    (("--eval-interval",), "train.eval_interval", "Batch and steps"),
    (("--lr", "--learning-rate"), "optim.lr", "Optimizer"),
    (("--seed",), "train.seed", "Numbers"),
    (("--dtype",), "train.dtype", "Numbers"),
    (("--compute-dtype",), "train.compute_dtype", "Numbers"),
    (("--tensor-parallel-size", "--tp"), "parallel.tp", "Mesh"),
    (("--pipeline-parallel-size", "--pp"), "parallel.pp", "Mesh"),
    (("--data-parallel-size", "--dp"), "parallel.dp", "Mesh"),
    (("--zero",), "parallel.zero", "Mesh"),
    (("--check-replicas",), "train.check_replicas", "Mesh"),
    (("--schedule",), "parallel.schedule", "Pipeline"),
    (("--chunks",), "parallel.chunks", "Pipeline"),
    (("--split",), "parallel.split", "Pipeline"),
    (("--recompute",), "model.recompute", "Memory and speed"),
    (("--autotune",), "parallel.autotune", "Memory and speed"),
    (("--device",), "parallel.device", "Process and device"),
    (("--comm",), "parallel.comm", "Process and device"),
    (("--threads",), "parallel.threads", "Process and device"),
    (("--blas-kernel",), "parallel.blas_kernel", "Process and device"),
    (("--timeout",), "parallel.timeout", "Process and device"),
]
SWITCHES = [
    (("--deterministic/--no-deterministic",), "train.deterministic", "Numbers"),
    (("--sequence-parallel/--no-sequence-parallel", "--sp/--no-sp"), "parallel.sp", "Mesh"),
    (("--tf32/--no-tf32",), "train.tf32", "Memory and speed"),
    (("--graphs/--no-graphs",), "parallel.graphs", "Memory and speed"),
    (("--malloc/--no-malloc",), "parallel.malloc", "Process and device"),
]
HEADINGS = list(dict.fromkeys(heading for _, _, heading in FLAGS))  # in the order of the help
# keys that only train uses, and what to do about them in other commands
UNUSED_WITHOUT_TRAINING = {
    "train.max_steps": "give --steps",
    "train.eval_interval": "it evaluates nothing",
    "train.check_replicas": "it compares no replicas",
}
# the names of values in the help, where the type says too little
SHOWN = {"data.path": "DIR", "parallel.split": "N,N,...", "parallel.blas_kernel": "NAME"}

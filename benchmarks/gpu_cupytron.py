"""cupytron as a contender: a process that trains what it is told, and says how long it took."""

import gc
import time
from collections.abc import Callable
from typing import Any

from gpu_children import Json
from gpu_contenders import BATCHES, WARMUP, configuration, random_batches, serve
from gpu_report import Gpu, open_gpu
from gpu_timing import ceilings, random


class Cupytron:
    """cupytron on the GPU."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu, self.trainer = gpu, None
        self.config: Any = None

    def ceilings(self) -> Json:
        """Bytes per second of a copy, operations per second of a product, on this device now."""
        found = ceilings(self.gpu)
        self.drop()
        return found._asdict()

    def build(self, preset: str, settings: list[str], micro_batch: int) -> Json:
        """A trainer that is ready to be timed."""
        from cupytron.config import resolve_model
        from cupytron.memory import estimate
        from cupytron.mesh_run import open_mesh
        from cupytron.trainer import Trainer

        self.drop()
        self.free = self._free()
        self.config = config = configuration(
            preset, ["train.compute_dtype=bfloat16", *settings], micro_batch, "cuda"
        )
        model = resolve_model(config.model, None, config.train.sequence_length)
        self.batches = random_batches(
            int(model.vocab_size or 0), micro_batch, config.train.sequence_length
        )
        began = time.perf_counter()
        self.trainer = Trainer(config, None, open_mesh(config))
        self.trainer.materialize(initial=False)
        self._fill()
        self._warm()
        return {
            "parameters": model.num_parameters(),
            "seconds": time.perf_counter() - began,
            "estimate_bytes": estimate(config, model).total,
            "kernels": self.trainer.context.tuner.choices() if self.trainer.context.tuner else {},
            "cudnn_refused": self.trainer.context.device.refusals(),
        }

    def _fill(self) -> None:
        """Weights of about the initial size, made on the device: the host needs a minute for a billion."""
        for bucket in self.trainer.zero.buckets:
            for parameter, start, stop in bucket.segments:
                part = bucket.weights[start:stop]
                if len(parameter.shape) > 1:
                    part[...] = random(self.gpu, (stop - start,), part.dtype, spread=0.02)
                else:
                    part.fill(float(parameter.name.endswith("weight")))
            bucket.refresh()
        self.trainer.zero.publish()

    def _warm(self) -> None:
        for i in range(WARMUP):
            self.trainer.start_step(*self.batches[i % BATCHES])()

    def run(self, steps: int) -> Json:
        """Seconds of so many steps; each is heard of when the next one has been started, as in a run."""
        self._warm()
        began = time.perf_counter()
        before: Callable[[], Any] | None = None
        for i in range(steps):
            started = self.trainer.start_step(*self.batches[i % BATCHES])
            if before is not None:
                before()
            before = started
        loss = before().loss if before else 0.0
        return {"seconds": time.perf_counter() - began, "loss": loss}

    def memory(self) -> Json:
        """Bytes that this process has taken from the device since `build`, and what its arrays hold."""
        return {
            "taken_bytes": self.free - self._free(),
            "reserved_bytes": self.trainer.context.device.used_bytes(),
        }

    def park(self) -> None:
        """Give back what only steps need."""
        if self.trainer is not None:
            self.trainer.context.device.stream.synchronize()
            for graph in list(self.trainer.context.device.graphs):
                graph.forget()
                graph.pool.free_all_blocks()  # the activations
        self._give_back()

    def drop(self) -> None:
        """Give everything back."""
        self.trainer = None
        self._give_back()

    def _give_back(self) -> None:
        gc.collect()
        self.gpu.cupy.cuda.Device().synchronize()
        self.gpu.cupy.get_default_memory_pool().free_all_blocks()

    def _free(self) -> int:
        return int(self.gpu.cupy.cuda.runtime.memGetInfo()[0])

    def profile(self, steps: int) -> Json:
        """gpu_profile's figures; built without graphs."""
        from gpu_profile import profile

        position = iter(range(1 << 30))
        return profile(
            self.gpu, self.trainer, lambda: self.batches[next(position) % BATCHES], steps
        )

    def open_training(self, data: str, preset: str, settings: list[str], micro_batch: int) -> Json:
        """A run on a data set, from its first step."""
        from cupytron.data import open_dataset
        from cupytron.mesh_run import open_mesh
        from cupytron.trainer import Trainer

        self.drop()
        self.dataset = open_dataset(data)
        config = configuration(
            preset, ["train.compute_dtype=bfloat16", *settings], micro_batch, "cuda"
        )
        self.trainer = Trainer(config, self.dataset.vocab_size, open_mesh(config))
        self.trainer.materialize()
        self.config = config
        return {"parameters": self.trainer.model.config.num_parameters()}

    def train(self, steps: int) -> Json:
        """So many steps more: seconds, and the last loss."""
        from cupytron.data import Loader

        train = self.config.train
        loader = Loader(self.dataset.train, train.sequence_length, train.seed)
        began = time.perf_counter()
        before = None
        for _ in range(steps):
            batch = loader.batch(self.trainer.position, self.config.global_batch)
            started = self.trainer.start_step(*batch)
            if before is not None:
                before()
            before = started
        loss = before().loss if before else 0.0
        return {"seconds": time.perf_counter() - began, "loss": loss, "step": self.trainer.step}

    def evaluate(self) -> Json:
        """Mean loss over the whole validation split."""
        from cupytron.data import evaluation_batches

        train = self.config.train
        batches = evaluation_batches(self.dataset.val, train.sequence_length, train.micro_batch)
        total, counted = self.trainer.evaluate(batches)
        return {"val_loss": total / counted, "tokens": counted}


if __name__ == "__main__":
    with open_gpu() as gpu:
        serve(Cupytron(gpu))

"""The same models trained by PyTorch on a GPU, as its users do: what cupytron is measured beside.

float32 weights under bfloat16 autocast, scaled_dot_product_attention, torch.compile, fused AdamW, and
clipping. The models are those of torch_gpt.py, which agree with cupytron's to 1e-9, with dropout where they
have some. Without a GPU everything runs in float32 on the CPU, not compiled.
"""

import argparse
import contextlib
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from gpu_children import Json
from gpu_contenders import BATCHES, WARMUP, configuration, random_batches, serve
from gpu_torch_gpt import make_model
from torch import Tensor, nn
from torch_gpt import load_cupytron, make_optimizer

KERNELS = 25  # of a profile that are told


class Torch:
    """A PyTorch model and what trains it.

    Args:
        device: "cuda" or "cpu". backend: of attention: "flash", "cudnn", or "" for PyTorch's own choice.
        mode: of torch.compile; "" for none.
    """

    def __init__(self, device: str, backend: str = "flash", mode: str = "default") -> None:
        self.device, self.backend = torch.device(device), backend
        self.mode = mode if device == "cuda" else ""
        self.model: Any = None
        torch.set_float32_matmul_precision("high")

    def _autocast(self) -> contextlib.ExitStack:
        stack = contextlib.ExitStack()
        if self.device.type == "cuda":
            stack.enter_context(torch.autocast("cuda", dtype=torch.bfloat16))
            if self.backend:
                from torch.nn.attention import SDPBackend, sdpa_kernel

                chosen = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
                stack.enter_context(sdpa_kernel(chosen[self.backend]))
        return stack

    def _make(self, config: Any, vocab_size: int | None) -> Any:
        from cupytron.config import resolve_model

        torch.manual_seed(1)
        model = resolve_model(config.model, vocab_size, config.train.sequence_length)
        self.config = config
        with self.device:  # not on the CPU first
            self.model = make_model(model)
        self._optimize()
        return model

    def _optimize(self) -> None:
        c = self.config.optim
        self.optimizer = make_optimizer(
            self.model, c.lr, (c.beta1, c.beta2), c.eps, c.weight_decay, fused=True
        )
        self.forward = torch.compile(self.model, mode=self.mode) if self.mode else self.model

    def build(self, preset: str, settings: list[str], micro_batch: int) -> Json:
        """A model that is ready to be timed; settings of cupytron's alone are passed over."""
        self.drop()
        self.free = self._free()
        config = configuration(preset, settings, micro_batch, "cpu")
        began = time.perf_counter()
        model = self._make(config, None)
        self.batches = [
            tuple(self._pinned(x) for x in pair)
            for pair in random_batches(model.vocab_size, micro_batch, config.train.sequence_length)
        ]
        self._warm()
        return {
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "seconds": time.perf_counter() - began,
            "torch": torch.__version__,
        }

    def _pinned(self, x: Any) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(x))
        return tensor.pin_memory() if self.device.type == "cuda" else tensor

    def _warm(self) -> None:
        for i in range(WARMUP):
            loss = self.step(*self.batches[i % BATCHES])
        loss.item()

    def step(self, ids: Tensor, targets: Tensor, lr: float | None = None) -> Tensor:
        """One step on host tensors (B, S); the loss, not waited for."""
        ids, targets = (x.to(self.device, non_blocking=True) for x in (ids, targets))
        if lr is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
        if self.mode == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()
        with self._autocast():
            loss = self.forward(ids, targets)
        loss.backward()
        if self.config.optim.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optim.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def run(self, steps: int) -> Json:
        """Seconds of so many steps; nothing is waited for but the last."""
        self._warm()
        began = time.perf_counter()
        for i in range(steps):
            loss = self.step(*self.batches[i % BATCHES])
        value = loss.item()
        return {"seconds": time.perf_counter() - began, "loss": value}

    def memory(self) -> Json:
        """Bytes taken from the device since `build`, and the allocator's own peaks."""
        if self.device.type == "cpu":
            return {"taken_bytes": 0, "reserved_bytes": 0, "allocated_bytes": 0}
        torch.cuda.empty_cache()  # what compiling has left
        torch.cuda.reset_peak_memory_stats()
        for i in range(3):
            self.step(*self.batches[i % BATCHES])
        torch.cuda.synchronize()
        return {
            "taken_bytes": self.free - self._free(),
            "reserved_bytes": torch.cuda.max_memory_reserved(),
            "allocated_bytes": torch.cuda.max_memory_allocated(),
        }

    def park(self) -> None:
        """Give back what only steps need; CUDA graphs keep theirs."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def drop(self) -> None:
        """Give everything back."""
        self.model = self.optimizer = self.forward = None
        if self.device.type == "cuda":
            torch.compiler.reset()
        self.park()

    def _free(self) -> int:
        return torch.cuda.mem_get_info()[0] if self.device.type == "cuda" else 0

    def kernels(self, products: Json, heads: Json) -> Json:
        """Seconds of single products and of attention, by name.

        Args:
            products: (tokens, features in, features out) by name.
            heads: (sequences, length, KV heads, query heads of each, head size) by name.
        """
        found = {}
        for name, (t, d_in, d_out) in products.items():
            x, dy, weight = (self._normal(*s) for s in ((t, d_in), (t, d_out), (d_in, d_out)))
            found[name] = self._seconds(lambda x=x, weight=weight: x @ weight)
            found[f"{name}, backward"] = self._seconds(lambda dy=dy, weight=weight: dy @ weight.T)
            found[f"{name}, weight"] = self._seconds(lambda x=x, dy=dy: x.T @ dy)
        for name, (batch, length, kv_heads, group, size) in heads.items():
            q = self._normal(batch, kv_heads * group, length, size).requires_grad_()
            k, v = (self._normal(batch, kv_heads, length, size).requires_grad_() for _ in range(2))

            def attend(q: Any = q, k: Any = k, v: Any = v, grouped: bool = group > 1) -> Tensor:
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)

            with self._autocast():
                found[f"{name} attention"] = self._seconds(attend)
                y = attend()
                dy = torch.randn_like(y)
                backward = functools.partial(
                    torch.autograd.grad, y, (q, k, v), dy, retain_graph=True
                )
                found[f"{name} attention, backward"] = self._seconds(backward)
        return found

    def _normal(self, *shape: int) -> Tensor:
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        return torch.randn(shape, device=self.device, dtype=dtype)

    def _seconds(self, call: Callable[[], Any], rounds: int = 5, launches: int = 20) -> float:
        """Median over the rounds."""
        times = []
        for _ in range(rounds + 1):
            began = time.perf_counter()
            if self.device.type == "cuda":
                start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
            for _ in range(launches):
                call()
            if self.device.type == "cuda":
                stop.record()
                stop.synchronize()
                times.append(start.elapsed_time(stop) / 1e3 / launches)
            else:
                times.append((time.perf_counter() - began) / launches)
        return statistics.median(times[1:])  # the first one warms up

    def profile(self, steps: int) -> Json:
        """Kernels of a step by torch.profiler, the longest first."""
        from torch.autograd import DeviceType
        from torch.profiler import ProfilerActivity, profile

        self._warm()
        kinds = [ProfilerActivity.CPU]
        kinds += [ProfilerActivity.CUDA] if self.device.type == "cuda" else []
        with profile(activities=kinds) as found:
            for i in range(steps):
                self.step(*self.batches[i % BATCHES]).item()
        field = "self_device_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
        # operations of PyTorch's have the time of their kernels, too
        kind = DeviceType.CUDA if self.device.type == "cuda" else DeviceType.CPU
        rows = [
            row
            for row in found.key_averages()
            if row.device_type == kind and not row.is_user_annotation
        ]
        rows.sort(key=lambda row: -getattr(row, field))
        total = sum(getattr(row, field) for row in rows)
        return {
            "seconds_of_kernels": total / steps / 1e6,
            "kernels": [
                {
                    "name": row.key[:120],
                    "calls": row.count / steps,
                    "seconds": getattr(row, field) / steps / 1e6,
                }
                for row in rows[:KERNELS]
            ],
        }

    def open_training(self, data: str, preset: str, settings: list[str], micro_batch: int) -> Json:
        """A run on a data set, from cupytron's initial weights."""
        from cupytron.data import open_dataset
        from cupytron.trainer import Trainer

        self.drop()
        self.dataset = open_dataset(data)
        config = configuration(preset, settings, micro_batch, "cpu")
        self._make(config, self.dataset.vocab_size)
        trainer = Trainer(config, self.dataset.vocab_size)  # on the CPU
        trainer.materialize()
        load_cupytron(self.model, {n: p.data for n, p in trainer.model.named_parameters()})
        self.position = self.steps = 0
        return {"parameters": sum(p.numel() for p in self.model.parameters())}

    def train(self, steps: int) -> Json:
        """So many steps more, on cupytron's batches with its learning rates: seconds, and the last loss."""
        from cupytron.data import Loader
        from cupytron.optim import learning_rate

        train = self.config.train
        loader = Loader(self.dataset.train, train.sequence_length, train.seed)
        self.model.train()
        began = time.perf_counter()
        for _ in range(steps):
            batch = loader.batch(self.position, self.config.global_batch)
            rate = learning_rate(self.config, self.steps)
            loss = self.step(*map(self._pinned, batch), lr=rate)
            self.position += self.config.global_batch
            self.steps += 1
        value = loss.item()
        return {"seconds": time.perf_counter() - began, "loss": value, "step": self.steps}

    def evaluate(self) -> Json:
        """Mean loss over the whole validation split."""
        from cupytron.data import evaluation_batches

        train = self.config.train
        total = counted = 0.0
        self.model.eval()
        with torch.no_grad(), self._autocast():
            for batch in evaluation_batches(
                self.dataset.val, train.sequence_length, train.micro_batch
            ):
                ids, targets = (torch.from_numpy(x).to(self.device) for x in batch)
                count = int((batch[1] >= 0).sum())
                total += self.model(ids, targets).item() * count
                counted += count
        return {"val_loss": total / counted, "tokens": int(counted)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--attention", default="flash", help="flash, cudnn, or nothing")
    parser.add_argument("--mode", default="default", help="of torch.compile; nothing for eager")
    arguments = parser.parse_args()
    serve(Torch(arguments.device, arguments.attention, arguments.mode))

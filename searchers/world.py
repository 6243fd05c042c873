"""The processes, threads and device that train: one CPU or GPU, or one process per GPU under ``torchrun``.

DistributedDataParallel averages gradients, autocast lowers precision where there is a GPU; a searcher asks the world
for both and stays the same code everywhere.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from latbench import host
from latbench.errors import LatbenchError, UsageError

LOOK_S = 1.0  # at what else runs here; a burst of a quarter of it is no reason to train with fewer threads for hours
TAKEN = 0.25  # share of a core's time that others use, from which on it is no core for a thread of ours
M = TypeVar("M", bound=nn.Module)


class OutOfMemoryError(LatbenchError):
    """The device's memory does not hold a step."""


@dataclass(frozen=True)
class World:
    """This process among those that train together."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @classmethod
    def here(cls, device: str | None = None) -> World:
        """The process group that ``torchrun`` describes, else this process alone; the GPU where there is one.

        Raises UsageError on a device that torch does not know or have.
        """
        size, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
        name = device or (f"cuda:{local}" if torch.cuda.is_available() else "cpu")
        try:
            chosen = torch.device(name)
            torch.empty(0, device=chosen)
        except (RuntimeError, AssertionError) as error:
            raise UsageError(f"cannot train on {name!r}: {' '.join(str(error).split())[:200]}") from None
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)
        if size > 1 and not dist.is_initialized():
            backend = "nccl" if chosen.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=timedelta(minutes=30))
        return cls(chosen, dist.get_rank(), dist.get_world_size()) if size > 1 else cls(chosen)

    @property
    def leads(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    @cached_property
    def dtype(self) -> torch.dtype:
        """What products are computed in: bfloat16 on GPUs that have it, float16 on older ones, float32 on CPUs."""
        if self.device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16

    def autocast(self) -> AbstractContextManager[Any]:
        """In which forward passes run."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def place(self, module: M) -> M:
        """`module` on the device, channels last: half again as fast in depthwise networks on CPUs, faster on GPUs."""
        return module.to(self.device).to(memory_format=torch.channels_last)

    def wrap(self, module: nn.Module, *, unused: bool = False) -> nn.Module:
        """`module` with gradients averaged over the processes; `unused`: some parameters may have none in a step."""
        if self.size == 1:
            return module
        ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(module, device_ids=ids, find_unused_parameters=unused)

    def gather(self, tensor: Tensor) -> Tensor:
        """(N, ...) of each process -> (size * N, ...), the same everywhere."""
        if self.size == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    def sum(self, values: Mapping[str, float]) -> dict[str, float]:
        """Each figure added up over the processes."""
        if self.size == 1:
            return dict(values)
        total = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return dict(zip(values, total.tolist(), strict=True))

    def wait(self) -> None:
        """Until every process is here."""
        if self.size > 1:
            dist.barrier()


def leave_busy_cores() -> str | None:
    """torch gets as many threads as cores are idle, where OMP_NUM_THREADS does not say how many -> what to tell of it.

    A thread on a core that others use is waited for in every operation: on two cores, beside one busy process, an epoch
    of InstaNAS on digits takes 125 s with two threads and 5 s with one (4.5 s with two on an idle machine).
    """
    threads = torch.get_num_threads()
    if threads == 1 or "OMP_NUM_THREADS" in os.environ or torch.cuda.is_available():
        return None
    idle, quota = host.idle_cores(LOOK_S), host.cpu_quota()
    room = min(math.inf if free is None else free for free in (idle, quota))
    if room + TAKEN >= threads:
        return None
    chosen = max(1, int(room + TAKEN))
    torch.set_num_threads(chosen)
    why = f"{room:.1f} cores are idle" if room == idle else f"this process is granted {room:g} CPUs"
    return f"{why}: training with {chosen} thread(s); set OMP_NUM_THREADS for another number"


def unsynced(module: nn.Module) -> AbstractContextManager[None]:
    """Within it, backward passes of a wrapped module leave gradients of their own process."""
    return module.no_sync() if isinstance(module, DistributedDataParallel) else nullcontext()


class Update:
    """An optimiser, its gradient scaling and clipping: ``backward`` as often as wanted, then ``step``."""

    def __init__(self, optimizer: torch.optim.Optimizer, world: World, *, clip: float | None = None) -> None:
        self.optimizer, self.clip = optimizer, clip
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=world.dtype == torch.float16)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of `loss`."""
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def step(self, lr: float | None = None) -> None:
        """Applies the gradients at this learning rate (None: as it stands) and forgets them."""
        for group in self.optimizer.param_groups if lr is not None else ():
            group["lr"] = lr
        if self.clip is not None:
            self.scaler.unscale_(self.optimizer)
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(parameters, self.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """Of the optimiser and the scaler."""
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of ``state_dict``."""
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:
            self.scaler.load_state_dict(dict(state["scaler"]))


def decayed(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups in which biases and batch norms do not decay."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


@contextmanager
def memory_told(batch_size: int) -> Iterator[None]:
    """Turns an allocator's failure into one line."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryError(_too_large(batch_size, str(error))) from None
    except RuntimeError as error:  # the CPU's allocator has no class of its own
        if "can't allocate memory" not in str(error) and "not enough memory" not in str(error):
            raise
        raise OutOfMemoryError(_too_large(batch_size, str(error))) from None


def _too_large(batch_size: int, words: str) -> str:
    return (
        f"out of memory at {batch_size} images a step: take a smaller --batch-size; checkpoints are intact "
        f"({' '.join(words.split())[:160]})"
    )


def to_device(batches: Iterable[Any], device: torch.device) -> Iterator[Any]:
    """Batches (named tuples of tensors) moved to the device, images channels last."""
    for batch in batches:
        parts = (part.to(device, non_blocking=True) for part in batch)
        yield type(batch)(*(p.contiguous(memory_format=torch.channels_last) if p.ndim == 4 else p for p in parts))

"""The processes that share a training, as torchrun and accelerate launch tell them of each other."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import ZeroConvError
from ..keys import State, Weights

PATIENCE = timedelta(minutes=10)
"""How long a process waits for the others: longer than any of them writes a checkpoint, shorter than a night."""


class DistributedError(ZeroConvError, RuntimeError):
    """Processes that cannot work together, or one that was left alone by the others."""


@dataclass(frozen=True)
class Process:
    """One of the `world` processes that share a training, each with a device of its own; alone by default."""

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")

    def share(self, count: int) -> slice:
        """Which of `count` examples are this process's; `count` is a multiple of `world`."""
        each = count // self.world
        return slice(self.rank * each, (self.rank + 1) * each)

    def gather(self, number: int) -> list[int]:
        """The number that each process gives, by rank; waits for all of them."""
        if self.world == 1:
            return [int(number)]
        numbers = torch.zeros(self.world, dtype=torch.int64, device=self.device)
        numbers[self.rank] = int(number)
        dist.all_reduce(numbers)
        return numbers.tolist()

    def mean(self, number: Tensor) -> Tensor:
        """The mean of the tensors that the processes give; waits for all of them."""
        if self.world == 1:
            return number
        total = number.clone()
        dist.all_reduce(total)
        return total / self.world

    def collect(self, tensors: State) -> Weights:
        """What all processes give, for the first of them, what is others' on the CPU; nothing for the others.

        Waits for all of them. Names differ between processes.
        """
        if self.world == 1:
            return dict(tensors)
        told: list[Any] = [None] * self.world
        dist.all_gather_object(told, [(name, tensor.shape, tensor.dtype) for name, tensor in tensors.items()])
        if self.rank:
            for tensor in tensors.values():
                dist.send(tensor.detach().to(self.device).contiguous(), 0)
            return {}
        found = dict(tensors)
        # One after the other: the first process has no room for all of them beside its own.
        for rank, theirs in enumerate(told[1:], start=1):
            for name, shape, dtype in theirs:
                received = torch.empty(shape, dtype=dtype, device=self.device)
                dist.recv(received, rank)
                found[name] = received.cpu()
        return found

    def divided(self, count: int, work: Callable[[range], Iterable[Tensor]]) -> list[Tensor]:
        """What `work` makes of each number below `count`, for the first process; the others are given nothing.

        Each process works on those whose turn it is, and waits for all of them.
        """
        own = range(self.rank, count, self.world)
        made = self.collect({f"{number}": one for number, one in zip(own, work(own))} if own else {})
        return [made[f"{number}"] for number in range(count)] if self.rank == 0 else []


ALONE = Process()


def from_environment(environment: Mapping[str, str]) -> Process:
    """The process that the environment speaks of (RANK, WORLD_SIZE, LOCAL_RANK), with its device; alone if it does not.

    CUDA device LOCAL_RANK where there is CUDA, else the CPU. Raises DistributedError for more processes on this machine
    than it has GPUs.
    """
    rank, world, local = (int(environment.get(name, usual)) for name, usual in
                          (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")))  # fmt: skip
    if not torch.cuda.is_available():
        return Process(rank, world)
    count = torch.cuda.device_count()
    if local >= count:
        raise DistributedError(
            f"process {local} of this machine finds {count} GPUs: start no more processes on a machine than it has "
            "GPUs (torchrun --nproc-per-node, accelerate launch --num_processes)"
        )
    return Process(rank, world, torch.device("cuda", local))


@contextmanager
def joined(environment: Mapping[str, str] = os.environ) -> Iterator[Process]:
    """This process among those that share the training, for as long as it lasts; alone, nothing is set up.

    nccl on CUDA (gloo where torch lacks it), gloo on the CPU. Raises DistributedError when the others do not appear,
    end, or do not answer for `PATIENCE`.
    """
    process = from_environment(environment)
    if process.device.type == "cuda":
        torch.cuda.set_device(process.device)
    if process.world == 1:
        yield process
        return
    fast = process.device.type == "cuda" and dist.is_nccl_available()
    try:
        dist.init_process_group(
            "nccl" if fast else "gloo", rank=process.rank, world_size=process.world, timeout=PATIENCE
        )
        yield process
    except (RuntimeError, ValueError) as error:
        # gloo has no class of its own; init_process_group answers a missing address with a ValueError.
        if isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo", "MASTER_", "env://")):
            raise DistributedError(
                f"process {process.rank} of {process.world} was left alone ({' '.join(str(error).split())[:200]}): "
                "what stopped another one is said above or in its own output; start all of them again"
            ) from error
        raise
    # Only after a good end: a group with a missing member may wait for it.
    dist.destroy_process_group()

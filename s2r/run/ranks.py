"""Several processes, one per GPU: who does what, and how parameters are spread (torchrun, FSDP2).

    torchrun --nproc-per-node 8 -- train_rl.py …          the same flags as without; `--nnodes` for more machines

Every rank knows the whole step: the batch, and once sampled all its rollouts. It samples for its part of the problems
and learns from its part of the tokens. Denominators are those of the whole step, so the number of ranks changes the
step no more than the size of a micro-batch does. In fp32 that is the order of sums. In bf16 it is also the rounding of
each micro-batch's gradients, which are then added up in fp32.

Parameters, gradients and optimizer state are spread over the ranks of a machine by `fully_shard` (FSDP2): fp32 master
weights, compute in the model's dtype. A rank samples from a whole copy of its own, so nothing has to be exchanged
inside decoding.
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from s2r.model import Transformer
from s2r.packing import Pack, pack


class Ranks:
    """The processes that torchrun started, or this one alone, for which every method is trivial."""

    def __init__(self, device: torch.device):
        self.rank, self.size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        # Over how many the parameters are spread: those of one machine, whose links are fast, if it has several.
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self.spread = local if local > 1 else self.size
        if self.size % self.spread:
            raise ValueError(f"{self.size} processes, {local} of them here: start as many on each machine")
        self.device, self.first = device, self.rank == 0  # first: writes and prints for all
        if self.size > 1 and not dist.is_initialized():
            # Ranks wait for the one with the longest rollouts, and for the first while it saves. If a rank dies, torchrun
            # ends the others of its machine; those of another machine may wait this long.
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=2))
        if len(set(self.gather([local]))) > 1:
            raise ValueError(f"{local} processes here, and another number elsewhere: start as many on each machine")

    def shard(self, model: Transformer) -> None:
        """Spread the model's parameters over the ranks; they are gathered block by block when it runs forward."""
        if dist.is_initialized():
            compute = None if model.embed.dtype == model.dtype else model.dtype
            shape, names = (self.size // self.spread, self.spread), ("replicate", "shard")
            # FSDP's own choice of device is a GPU, wherever there is one.
            mesh = init_device_mesh(self.device.type, shape, mesh_dim_names=names)
            mesh = mesh if shape[0] > 1 else mesh["shard"]
            policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
            for block in model.blocks:
                fully_shard(block, mesh=mesh, mp_policy=policy)
            # The root keeps its parameters together after a forward: head and embedding are read outside of it.
            fully_shard(model, mesh=mesh, mp_policy=policy)

    def release(self, model: Transformer) -> None:
        """Free what the model's root keeps gathered after a forward pass; a backward pass does that by itself."""
        if isinstance(model, FSDPModule):
            model.reshard()

    def share(self, costs: Sequence[int]) -> list[int]:
        """Indices of this rank's items, rising. The most expensive is dealt first, each to the least busy rank."""
        busy, mine = [0] * self.size, []
        for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
            rank = busy.index(min(busy))
            busy[rank] += costs[i]
            if rank == self.rank:
                mine.append(i)
        return sorted(mine)

    def even(self, packs: list[Pack]) -> list[Pack]:
        """The micro-batches, filled up with empty ones until every rank has equally many.

        FSDP gathers parameters in every forward and backward pass, and all ranks have to take part in it.
        """
        if self.size == 1:
            return packs
        most = torch.tensor(len(packs), device=self.device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        (nothing,) = pack([[0]], [[]], 1, self.device)  # one token, no target: its loss and gradients are zero
        return packs + [replace(nothing, rows=[])] * (int(most) - len(packs))

    def gather(self, items: list, to_first: bool = False) -> list:
        """The items of all ranks in the order of the ranks, on every rank, or on the first alone and none on the others.

        They are pickled: no large tensors.
        """
        if self.size == 1:
            return items
        parts: list[list] = [[]] * self.size
        if to_first:
            dist.gather_object(items, None if self.rank else parts)
        else:
            dist.all_gather_object(parts, items)
        return [item for part in parts for item in part]

    def sum(self, values: Sequence[float]) -> list[float]:
        """The sums over all ranks."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

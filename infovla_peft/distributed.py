"""What several processes do together: mini-batches, pieces of work, sharded parameters, and who may write.

A mini-batch spread over processes: the anchors of all of them, and the mean that is right for unequal shares.

    others = gather_anchors(anchors, others_only=True)
    loss = replay_anchor_contrastive_loss(student, anchors, bank=others) * mean_weight(len(student))

The mean of this loss over the processes, and of its gradient (as DistributedDataParallel takes it), is what one
process with the whole mini-batch would give. Student features are never sent, so no gradient crosses processes.

Pieces of work that need no gradient (batches of a teacher, rollouts) are dealt out and their results collected:

    results = gather_pieces([work(pieces[number]) for number in my_share(len(pieces))], len(pieces))

Every process must call all functions of this file; without torch.distributed, they do what one process would.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

T = TypeVar("T")


def gather_anchors(tensor: Tensor, *, others_only: bool = False) -> Tensor:
    """The rows of all processes in the order of their ranks; without torch.distributed, the tensor itself.

    Processes may hold different numbers of rows, also none. The result carries no gradient. Every process must call.

    Args:
        tensor: (B, ...); dtype and the trailing shape must agree over the processes.
        others_only: leave out this process's own rows.
    """
    rows = tensor.detach().contiguous()
    if not _is_distributed():
        return rows[:0] if others_only else rows
    counts = _row_counts(len(rows), rows.device)
    padded = rows.new_zeros((max(counts), *rows.shape[1:]))
    padded[: len(rows)] = rows
    received = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(received, padded)
    own = dist.get_rank() if others_only else None
    return torch.cat([received[rank][:count] for rank, count in enumerate(counts) if rank != own])


def mean_weight(samples: int, device: torch.device | str = "cpu") -> float:
    """What to multiply a local mean by, so that the mean over processes is the mean over all samples.

    It is `samples` · (number of processes) / (samples of all processes): 1 where all hold equally many, 0 where there
    are none. Every process must call.

    Args:
        samples: how many rows this process's mean was taken over.
        device: where the backend communicates: "cpu" for gloo, the process's GPU for NCCL.
    """
    if not _is_distributed():
        return 1.0 if samples else 0.0
    counts = _row_counts(samples, device)
    return samples * len(counts) / max(sum(counts), 1)


def my_share(count: int) -> list[int]:
    """Which of `count` pieces of work are this process's: every n-th of n processes.

    All processes get equally many, because a sharded model runs on all or on none; the last piece may be done twice.

    >>> my_share(3)
    [0, 1, 2]
    """
    processes, rank = _world()
    return [min(first + rank, count - 1) for first in range(0, count, processes)]


def deal(pieces: Sequence[T]) -> list[T]:
    """This process's pieces of work, each done once; some processes may have none. For `gather_pieces`."""
    processes, rank = _world()
    return list(pieces[rank::processes])


def gather_pieces(results: Sequence[T], count: int) -> list[T]:
    """The results of all pieces, in their order, from those that each process has of `my_share(count)`, or of `deal`.

    Args:
        results: pickled on their way; tensors on the CPU.
    """
    if not _is_distributed():
        return list(results)
    received = exchange(list(results))
    processes = len(received)
    return [received[number % processes][number // processes] for number in range(count)]


def exchange(value: T) -> list[T]:
    """What each process gives, by rank; pickled on its way."""
    if not _is_distributed():
        return [value]
    received: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(received, value)
    return cast(list[T], received)


def whole(tensor: Tensor) -> Tensor:
    """A tensor that FSDP2 or ZeRO-3 has spread over the processes, gathered; any other as it is."""
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    if hasattr(tensor, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    return tensor


def whole_state(model: nn.Module) -> Mapping[str, Tensor] | None:
    """All weights of a sharded model, gathered on the CPU one after another; None where nothing is sharded."""
    if not is_sharded(model):
        return None
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {name: whole(parameters.get(name, tensor)).detach().cpu() for name, tensor in model.state_dict().items()}


def is_sharded(model: nn.Module) -> bool:
    """Whether this process holds only a part of some parameter."""
    return any(isinstance(parameter, DTensor) or hasattr(parameter, "ds_id") for parameter in model.parameters())


def reshard(model: nn.Module) -> None:
    """Free what FSDP2 keeps gathered after a forward pass; the parameters are then the sharded ones again."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def is_main() -> bool:
    """Whether this process is the one that writes."""
    return _world()[1] == 0


def _world() -> tuple[int, int]:
    return (dist.get_world_size(), dist.get_rank()) if _is_distributed() else (1, 0)


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _row_counts(samples: int, device: torch.device | str) -> list[int]:
    count = torch.tensor([samples], dtype=torch.long, device=device)
    received = [torch.empty_like(count) for _ in range(dist.get_world_size())]
    dist.all_gather(received, count)
    return [int(value) for value in torch.cat(received).tolist()]

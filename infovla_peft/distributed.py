"""A mini-batch spread over processes: the anchors of all of them, and the mean that is right for unequal shares.

    others = gather_anchors(anchors, others_only=True)
    loss = replay_anchor_contrastive_loss(student, anchors, bank=others) * mean_weight(len(student))

The mean of this loss over the processes, and of its gradient (as DistributedDataParallel takes it), is what one
process with the whole mini-batch would give. Student features are never sent, so no gradient crosses processes.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


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


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _row_counts(samples: int, device: torch.device | str) -> list[int]:
    count = torch.tensor([samples], dtype=torch.long, device=device)
    received = [torch.empty_like(count) for _ in range(dist.get_world_size())]
    dist.all_gather(received, count)
    return [int(value) for value in torch.cat(received).tolist()]

"""Tensors on disk: safetensors that carry a checksum of their content, written atomically, checked when read."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .files import atomic_file
from .integrity import SUMS, DamagedFileError


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors of any shape and device, and strings to go with them."""
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    notes = dict(metadata or {})
    with atomic_file(path) as temporary:
        save_file(whole, temporary, {**notes, SUMS: _digest(whole, notes)})


def empty_tensor(shape: Sequence[int], dtype: torch.dtype, file: Path | None = None) -> Tensor:
    """A tensor to be filled, in memory or in a file, which may be removed while the tensor is in use.

    Raises:
        OSError: there is no room for it on the disk.
    """
    if file is None:
        return torch.empty(tuple(shape), dtype=dtype)
    with file.open("ab") as whole:  # now, for a mapped file that does not fit ends the process later
        os.posix_fallocate(whole.fileno(), 0, max(math.prod(shape) * dtype.itemsize, 1))
    mapped = torch.from_file(str(file), shared=True, size=math.prod(shape), dtype=dtype)
    return mapped.view(tuple(shape))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors, on the CPU, and the strings that were saved with them.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedFileError: it is damaged, or has no checksum.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        with safe_open(path, framework="pt") as file:
            notes = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, UnicodeDecodeError) as error:
        raise DamagedFileError(f"{path} is damaged ({error})") from error
    if notes.pop(SUMS, None) != _digest(tensors, notes):
        raise DamagedFileError(f"{path} is damaged (its content does not match its checksum)")
    return tensors, notes


def _digest(tensors: Mapping[str, Tensor], notes: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(sorted(notes.items())).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()

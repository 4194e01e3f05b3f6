"""Pictures from a worker process to its parent through memory that both of them map, instead of through a pipe."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray


class SharedFrames:
    """One picture per camera in shared memory.

    The memory has no name, so that nothing is left behind whoever dies first, and takes no room in /dev/shm, which is
    small in containers. Whose turn it is, both sides know from the messages that they exchange besides. As a context
    manager it closes the descriptor on leaving, once the other process has inherited it.

    Args:
        cameras: their names.
        image_size: edge of the pictures in pixels.
        descriptor: of the memory, inherited from the process that made it; None makes it.

    Raises:
        OSError: there is no memory left.
    """

    def __init__(self, cameras: Sequence[str], image_size: int, descriptor: int | None = None) -> None:
        self.cameras = tuple(cameras)
        shape = (len(self.cameras), image_size, image_size, 3)
        self.descriptor = _anonymous_file(int(np.prod(shape))) if descriptor is None else descriptor
        """For the process that is to map the same memory; `Popen(pass_fds=[frames.descriptor])`."""
        self._pictures = np.frombuffer(mmap.mmap(self.descriptor, int(np.prod(shape))), np.uint8).reshape(shape)

    def write(self, images: Mapping[str, NDArray[np.uint8]]) -> None:
        """Put one picture (H, W, 3) per camera where the other process sees it."""
        for place, camera in zip(self._pictures, self.cameras, strict=True):
            place[:] = images[camera]

    def read(self) -> dict[str, NDArray[np.uint8]]:
        """Copies of what was written last, by camera: they stay when the next ones are written."""
        return {camera: picture.copy() for camera, picture in zip(self.cameras, self._pictures, strict=True)}

    def __enter__(self) -> SharedFrames:
        return self

    def __exit__(self, *_: object) -> None:
        """Close the descriptor; what is mapped stays."""
        os.close(self.descriptor)
        self.descriptor = -1


def _anonymous_file(size: int) -> int:
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("infovla_frames")
    else:  # macOS: a file that is deleted already
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, size)
    return descriptor

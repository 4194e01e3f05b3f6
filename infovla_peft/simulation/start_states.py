"""LIBERO's start states: archives of `torch.save` with one NumPy array, read without unpickling anything.

The operations of the pickle in them are disassembled and compared with the only sequence that such a file has; none is
carried out.
"""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from pickletools import genops
from typing import Any

import numpy as np
from numpy.typing import NDArray

_CONTENT = "archive/data.pkl"
_LARGEST = 16 << 20  # bytes; LIBERO's have some 50 thousand
_ROWS, _COLUMNS, _VALUES = object(), object(), object()
_ONE_ARRAY: tuple[Any, ...] = (
    2,  # the protocol
    "numpy.core.multiarray _reconstruct", "numpy ndarray", 0, "_codecs encode", "b", "latin1",  # an empty array
    1, _ROWS, _COLUMNS, "numpy dtype", "f8", 3, "<", -1, -1, 0,  # its version, shape, and type
    _VALUES,
)  # fmt: skip
_OPERATIONS = (
    "PROTO GLOBAL GLOBAL BININT1 TUPLE1 GLOBAL BINUNICODE BINUNICODE TUPLE2 REDUCE TUPLE3 REDUCE MARK BININT1 BININT1 "
    "BININT1 TUPLE2 GLOBAL BINUNICODE NEWFALSE NEWTRUE TUPLE3 REDUCE MARK BININT1 BINUNICODE NONE NONE NONE BININT "
    "BININT BININT1 TUPLE BUILD NEWFALSE BINUNICODE TUPLE2 REDUCE TUPLE BUILD STOP"
)


def read_states(file: Path) -> NDArray[np.float64]:
    """The table of float64 in one of these files.

    Raises:
        ValueError: it cannot be read, or is anything else.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            if archive.getinfo(_CONTENT).file_size > _LARGEST:
                raise ValueError(f"it is larger than {_LARGEST >> 20} MiB")
            content = archive.read(_CONTENT)
        operations = [
            (code.name, argument)
            for code, argument, _ in genops(content)
            if not code.name.startswith(("BINPUT", "BINGET", "LONG_BIN"))  # the memo, which is never filled
        ]
    # A damaged archive may also claim encryption, an unknown compression, or end too early.
    except (OSError, zipfile.BadZipFile, KeyError, RuntimeError, EOFError, zlib.error) as error:
        raise ValueError(f"it is no archive of start states ({error})") from error
    arguments = [argument for _, argument in operations if argument is not None]
    if " ".join(name for name, _ in operations) != _OPERATIONS or len(arguments) != len(_ONE_ARRAY):
        raise ValueError("it holds something else than one table of numbers")
    found: dict[object, Any] = {}
    for argument, expected in zip(arguments, _ONE_ARRAY, strict=True):
        if expected in (_ROWS, _COLUMNS, _VALUES):
            found[expected] = argument
        elif argument != expected:
            raise ValueError(f"it holds {argument!r:.60} where {expected!r} belongs")
    try:
        values = np.frombuffer(found[_VALUES].encode("latin1"), dtype="<f8")
        states: NDArray[np.float64] = values.reshape(found[_ROWS], found[_COLUMNS]).astype(np.float64)
    except ValueError as error:
        raise ValueError(f"its numbers are damaged ({error})") from error
    if not np.isfinite(states).all():
        raise ValueError("some of its numbers are not finite")
    return states

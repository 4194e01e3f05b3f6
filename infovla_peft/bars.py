"""Progress bars, drawn where somebody watches or asks for them. Light, because simulation processes import it."""

from __future__ import annotations

import os
from typing import Any

from tqdm import tqdm


def progress_bar(*arguments: Any, disable: bool | None = None, **options: Any) -> Any:
    """A tqdm bar; where stderr is no terminal, only if TQDM_MININTERVAL is set, or `disable=False` asks for it."""
    make: Any = tqdm
    if disable is None and os.environ.get("TQDM_MININTERVAL"):
        disable = False
    return make(*arguments, disable=disable, **options)

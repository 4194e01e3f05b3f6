"""Progress bars, drawn only where somebody watches. Light, because simulation processes import it."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm


def progress_bar(*arguments: Any, disable: bool | None = None, **options: Any) -> Any:
    """A tqdm bar; none where stderr is no terminal, unless `disable=False` asks for it."""
    make: Any = tqdm
    return make(*arguments, disable=disable, **options)

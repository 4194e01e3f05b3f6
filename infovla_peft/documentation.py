"""The docstrings of every module as web pages."""

from __future__ import annotations

import pkgutil
import warnings
from pathlib import Path

import infovla_peft


def render_documentation(folder: str | Path) -> Path:
    """Write one page per module, and an index.

    Args:
        folder: where; pages of a module that is no longer there stay.

    Returns:
        The page to open.

    Raises:
        ImportError: pdoc is not installed.
    """
    try:
        import pdoc
    except ImportError as error:
        raise ImportError("the documentation is rendered by pdoc: pip install 'infovla-peft[docs]'") from error
    # By name, because pdoc takes a package's `__all__` for all of its modules.
    modules = [module.name for module in pkgutil.walk_packages(infovla_peft.__path__, "infovla_peft.")]
    with warnings.catch_warnings():  # of transformers' annotations, and of names that are imported when they are used
        warnings.filterwarnings("ignore", category=UserWarning, module="pdoc")
        pdoc.pdoc("infovla_peft", *modules, output_directory=Path(folder))
    return Path(folder) / "index.html"

"""`infovla cp | docs | doctor | setup-libero`: recipes, documentation, installation."""

from __future__ import annotations

import argparse

from .options import AddCommand


def _cp(options: argparse.Namespace) -> None:
    from ..recipe_files import copy_recipe, list_recipes

    if options.name is None:
        print("\n".join(list_recipes()))
    else:
        print(copy_recipe(options.name, options.target, overwrite=options.force))


def _docs(options: argparse.Namespace) -> None:
    from ..documentation import render_documentation

    print(render_documentation(options.folder))


def _doctor(_options: argparse.Namespace) -> int:
    from ..simulation.installation import doctor

    checks = doctor()
    for check in checks:
        print(f"{'ok  ' if check.ok else 'FAIL'}  {check.name}: {check.detail}")
        if check.cure and not check.ok:
            print(f"      cure: {check.cure}")
    return 0 if all(check.ok for check in checks) else 1


def _setup_libero(_options: argparse.Namespace) -> None:
    from ..simulation.installation import setup_libero

    setup_libero()


def register(add: AddCommand) -> None:
    """Add `cp`, `docs`, `doctor` and `setup-libero` to the parser."""
    cp = add("cp", "copy a recipe, to read and to change; without a name: list them", _cp)
    cp.add_argument("name", nargs="?", help="such as continual (the loop), quickstart.yaml, libero_goal_b5_5n1")
    cp.add_argument("target", nargs="?", default=".", help="folder, or name of the copy")
    cp.add_argument("--force", action="store_true", help="replace a file that is there")

    docs = add("docs", "render the docstrings of all modules as web pages", _docs)
    docs.add_argument("folder", nargs="?", default="site", help="where the pages go")

    add("doctor", "say what is wrong with this installation, and the cure", _doctor)
    add("setup-libero", "install the LIBERO simulation without its 80 training packages", _setup_libero)

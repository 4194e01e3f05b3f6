"""`infovla push | list`: the Hub."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from .options import AddCommand, add_token


def _push(options: argparse.Namespace) -> None:
    import tempfile

    from ..progress import quiet_libraries
    from ..publishing import base_files, prepare, push_to_hub
    from ..remote import check_repo_id

    quiet_libraries(loading_bars=True)
    message, base_repo = options.commit_message, options.base_repo
    if options.dry_run:
        check_repo_id(options.repo)
        with tempfile.TemporaryDirectory() as workspace:
            base, lines = None, []
            if base_repo is not None:
                check_repo_id(base_repo)
                files, base = base_files(options.run, options.repo, base_repo), (base_repo, "")
                size = sum(file.stat().st_size for file in files.values())
                lines = [f"to {base_repo}: the base, {size:,} bytes in {len(files)} files, one commit"]
            planned = prepare(
                options.run, options.repo, Path(workspace), base=base, revision=options.revision, message=message
            ).describe()
        made = {None: "", True: ", private", False: ", public if it is new"}[options.private]
        print("\n".join([*lines, f"to {options.repo}, branch {options.revision or 'main'}{made}:", planned]))
        return
    done = push_to_hub(
        options.run,
        options.repo,
        private=options.private,
        revision=options.revision,
        commit_message=message,
        base_repo=base_repo,
        license=options.license,
        token=options.token,
    )
    print(f"{done.url}: {f'commit {done.commit}' if done.changed else 'everything was there already'}")


def _list(options: argparse.Namespace) -> None:
    from dataclasses import asdict

    from ..hub import list_adapters
    from ..progress import quiet_libraries

    quiet_libraries(loading_bars=False)
    found = list_adapters(options.repo, revision=options.revision, token=options.token)
    if options.json:
        print(json.dumps([asdict(adapter) for adapter in found], indent=2))
        return
    for adapter in found:
        print(f"{adapter.folder}: stage {adapter.stage}, base {adapter.base_model}")
        for task in adapter.tasks:
            reached = adapter.success.get(task)
            print(f"  {task}: {f'{reached[0]} of {reached[1]}' if reached else 'not measured'}")
    if not found:
        raise ValueError(f"{options.repo} holds no adapter")


def register(add: AddCommand) -> None:
    """Add `push` and `list` to the parser."""
    push = add("push", "publish a run on the Hub: adapters, results, figures, videos, card; one commit", _push)
    push.add_argument("run", help="folder of a run")
    push.add_argument("--repo", required=True, help="user/name; made if it does not exist")
    push.add_argument(
        "--private",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="whether a new repository is; the account's default if not given",
    )
    push.add_argument("--revision", help="branch; made if it does not exist; the main one if not given")
    push.add_argument("--commit_message", help="first line of the commit; names the stages if not given")
    push.add_argument("--base_repo", help="publish a base that was trained here under this name of its own")
    push.add_argument("--license", help="such as mit; what the repository's card says, apache-2.0 for a new one")
    add_token(push)
    push.add_argument("--dry-run", action="store_true", help="say what would be pushed, and push nothing")

    listing = add("list", "say which adapters a repository or run holds, without downloading weights", _list)
    listing.add_argument("repo", help="Hub id or folder")
    listing.add_argument("--revision", help="branch, tag or commit; the main branch if not given")
    add_token(listing)
    listing.add_argument("--json", action="store_true", help="everything that is known, as JSON")

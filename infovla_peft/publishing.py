"""Publishing a run: its adapters, results, figures and videos as one commit of a repository on the Hub.

    README.md                       the card, see cards.py
    adapter_model.safetensors …     the last stage's adapter, so that PEFT alone reads the repository
    stage_01/ …                     the adapter of every stage
    base/                           the base, if it was trained here and is published nowhere else; infovla_base.json
                                    there has its checksums
    results.json, figures/, videos/ what was measured, the report's figures, one rollout per task
    .eval_results/                  the numbers as the Hub's leaderboards read them

Large files are uploaded first, and one commit then names them all: a push that was interrupted has changed nothing,
and the next one finds what is uploaded already. What an earlier push left there and the run no longer has goes away.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .adapter_files import INFO, PEFT_CONFIG, STATISTICS, WEIGHTS, AdapterError, AdapterInfo, check_adapter, write_info
from .cards import LICENCE, card, eval_results
from .files import write_json
from .integrity import SUMS, DamagedFileError, check_files, checksums, read_sealed, write_sealed
from .library import StoredAdapter, find_adapters
from .methods import METHODS
from .remote import HubError, api, explained, retried
from .results import Results, Video
from .run_folder import RunFolder

RESULTS, CARD, BASE_FOLDER = "results.json", "README.md", "base"
BASE_SUMS, BASE_FORMAT = "infovla_base.json", 1
EVAL_RESULTS = ".eval_results/libero.yaml"
_OURS = ("stage_", f"{BASE_FOLDER}/", "figures/", "videos/", ".eval_results/libero")
"""Beginnings of what a push may take away again; other files of the repository stay."""


@dataclass(frozen=True)
class Publication:
    """What a push puts into a repository.

    Attributes:
        files: path in the repository → file here.
        stages: numbers of the stages whose adapters are among them.
        message: of the commit.
    """

    files: dict[str, Path]
    stages: list[int]
    message: str

    @property
    def size(self) -> int:
        """Bytes; a file that is there twice is stored once."""
        return sum({path.resolve(): path.stat().st_size for path in self.files.values()}.values())

    def describe(self) -> str:
        """One line per file, with its size, and their sum."""
        lines = [f"{path.stat().st_size:>13,}  {name}" for name, path in self.files.items()]
        return "\n".join([*lines, f"{self.size:>13,}  bytes in {len(lines)} files, one commit: {self.message}"])


@dataclass(frozen=True)
class Pushed:
    """What a push has done.

    Attributes:
        repo_id, revision: where.
        commit: the repository's commit now.
        url: of the repository.
        changed: False if everything was there already, so that no commit was made.
    """

    repo_id: str
    revision: str
    commit: str
    url: str
    changed: bool


def push_to_hub(
    run_folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    token: str | bool | None = None,
    base_repo: str | None = None,
    license: str | None = None,
) -> Pushed:
    """Publish what a run has finished so far, as one commit.

    Args:
        run_folder: of a run with at least one finished and measured stage.
        repo_id: user/name; made if it does not exist. Without user: the token's.
        private: make a new repository private; None for the account's default. An existing one stays as it is: True
            for one that is public is an error, and nothing is sent.
        revision: branch to commit to; made from the main branch if it does not exist.
        commit_message: first line of the commit; None says which stages.
        token: with write access; None is that of `hf auth login`.
        base_repo: user/name, another one, under which a base that was trained here is published for itself. None: it
            goes into the same repository, as base/.
        license: of the adapters, as the Hub names it. None: what the repository's card says; of a new one,
            "apache-2.0".

    Raises:
        FileNotFoundError, ValueError: nothing to publish, or it is damaged; nothing is sent then.
        HubError: the Hub refuses, or the connection broke. The repository is as it was before; the same call
            continues.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    hub, branch = api(token), revision or "main"
    check_run(run_folder)
    own_base = None if base_repo is None else base_files(run_folder, repo_id, base_repo)
    with explained(repo_id), tempfile.TemporaryDirectory(prefix="infovla-push-") as temporary:
        url = _open_repository(hub, repo_id, private)
        repo_id = url.repo_id
        if revision is not None and not revision.startswith("refs/pr/"):  # a pull request is there, or is refused
            retried(lambda: hub.create_branch(repo_id, branch=branch, exist_ok=True))
        base: tuple[str, str] | None = None
        if base_repo is not None and own_base is not None:
            base = _push_base(hub, own_base, base_repo, private)
        before = retried(lambda: hub.model_info(repo_id, revision=branch))
        chosen = license or _license_of(before)
        publication = prepare(
            run_folder, repo_id, Path(temporary), base=base, revision=revision, message=commit_message, license=chosen
        )
        there = {sibling.rfilename for sibling in before.siblings or ()}
        gone = [name for name in sorted(there - set(publication.files)) if name.startswith(_OURS)]

        def commit() -> Pushed:
            now = hub.model_info(repo_id, revision=branch).sha
            if now != before.sha:  # an attempt whose answer was lost may have been carried out
                newest, *older = hub.list_repo_commits(repo_id, revision=branch)
                ours = publication.message.strip().split("\n", 1)[0].strip()
                if newest.title.strip() != ours or not older or older[0].commit_id != before.sha:
                    raise HubError(f"{repo_id}: the repository was changed at the same time; give the command again")
                return Pushed(repo_id, branch, newest.commit_id, str(url), changed=True)
            done = hub.create_commit(
                repo_id,
                [
                    *(CommitOperationAdd(name, str(path)) for name, path in publication.files.items()),
                    *(CommitOperationDelete(name, is_folder=False) for name in gone),
                ],
                commit_message=publication.message,
                revision=branch,
                parent_commit=before.sha,  # what somebody else pushes meanwhile is not overwritten
            )
            return Pushed(repo_id, branch, done.oid, str(url), changed=done.oid != before.sha)

        return retried(commit)


def _license_of(repository: Any) -> str | None:
    """What the card of a repository says; its owner may have changed it there."""
    said = getattr(repository.card_data, "license", None)
    return said if isinstance(said, str) else None


def check_run(run_folder: str | Path) -> list[StoredAdapter]:
    """The adapters of a run that can be published, each checked against its checksums.

    Raises:
        FileNotFoundError: no run, no finished adapter, nothing measured yet, or the base is gone.
        ValueError: an adapter is damaged, or a run of `merge` has no merged adapters (of an earlier version).
    """
    run = Path(run_folder)
    if not run.is_dir():
        raise FileNotFoundError(f"there is no run at {run}; give the folder of one (its --output_dir)")
    results = Results.load(run / RESULTS)
    adapters = [each for each in find_adapters(run) if 0 < each.info.stage < results.stages]
    if not adapters:
        raise FileNotFoundError(f"{run} has no adapter that was measured yet; finish its first stage, then push")
    merges = results.method in METHODS and METHODS[results.method].policy == "merged"
    if merges and any(adapter.folder.parent.name != "merged" for adapter in adapters):
        raise ValueError(
            f"{run} was measured with all its adapters merged into one, which it has not kept; give the recipe's "
            "command again, which merges them, then push"
        )
    for adapter in adapters:
        check_adapter(adapter.folder)
        named = adapter.info.base_model
        if _local_base(adapter) is None and (named.startswith((".", "/")) or named.count("/") != 1):
            raise FileNotFoundError(
                f"the base of {adapter.folder} is not at {adapter.folder / named}, and nobody could load the adapter "
                "without it; put it back, then push"
            )
    if (folder := _local_base(adapters[-1])) is not None:
        check_publishable_base(folder)
    return adapters


def check_publishable_base(folder: Path) -> None:
    """Raise a ValueError for a base with weights that are no safetensors: a push takes no others, nor does a load."""
    parts = sorted(file.name for file in folder.glob("*--*.pt"))
    if parts or not any(folder.glob("*.safetensors")):
        what = f"weights in {', '.join(parts)}" if parts else "no *.safetensors"
        raise ValueError(
            f"the base {folder} has {what}, and only safetensors are published, as others may hold code. Train on one "
            "in safetensors alone (of OpenVLA-OFT: `model, processor = load_openvla(...)`, then `save_pretrained` of "
            "both), or on one that is on the Hub"
        )


def prepare(
    run_folder: str | Path,
    repo_id: str,
    workspace: Path,
    *,
    base: tuple[str, str] | None = None,
    revision: str | None = None,
    message: str | None = None,
    license: str | None = None,
) -> Publication:
    """What a push of a run would put into a repository; nothing is sent.

    Args:
        workspace: empty folder for what has to be written anew: cards, results, descriptions.
        base: repository and commit of the base, if it is published for itself.
        revision, message, license: see `push_to_hub`.

    Raises:
        FileNotFoundError, ValueError: see `check_run`.
    """
    run, adapters = Path(run_folder), check_run(run_folder)
    results = Results.load(run / RESULTS)
    files: dict[str, Path] = {}
    included = base is None and _local_base(adapters[-1]) is not None
    # Whether the data set that was learned from is a folder, only the run could tell: by its own working directory.
    folder_of_data = bool(RunFolder(run).state().get("demonstrations", {}).get("folder"))
    for adapter in adapters:
        below = f"stage_{adapter.info.stage:02d}/"
        files |= _adapter_files(adapter, below, workspace, base, included, folder_of_data)
    files |= _adapter_files(adapters[-1], "", workspace, base, included, folder_of_data)
    if included:
        folder = _local_base(adapters[-1])
        assert folder is not None
        parts = {file.relative_to(folder).as_posix(): file for file in _checkpoint_files(folder)}
        write_sealed(workspace / BASE_SUMS, {"format_version": BASE_FORMAT}, checksums(parts.values(), folder))
        files |= {f"{BASE_FOLDER}/{name}": file for name, file in {**parts, BASE_SUMS: workspace / BASE_SUMS}.items()}
    figures = sorted((run / "report").glob("*.png"))
    files |= {f"figures/{file.name}": file for file in figures}
    shown = _videos(results, run)
    files |= {video.path: source for video, source in shown}
    results.videos = [video for video, _ in shown]
    results.config = public_config(results.config, folder_of_data=folder_of_data)
    results.base_model = str(public_config({"base_model": results.base_model})["base_model"])
    results.save(workspace / RESULTS)
    files[RESULTS] = workspace / RESULTS
    info = _published_info(adapters[-1], "", base, included, folder_of_data)
    entries = eval_results(results, repo_id)
    if entries:
        (workspace / "eval_results.yaml").write_text(entries, encoding="utf-8")
        files[EVAL_RESULTS] = workspace / "eval_results.yaml"
    described = [adapter.info for adapter in adapters]
    text = card(
        results, info, repo_id, files=sorted(files), stages=described, license=license or LICENCE, revision=revision
    )
    (workspace / CARD).write_text(text, encoding="utf-8")
    files[CARD] = workspace / CARD
    stages = [adapter.info.stage for adapter in adapters]
    what = f"stage {stages[0]}" if len(stages) == 1 else f"stages {stages[0]} to {stages[-1]}"
    default = f"{results.method} on {results.suite}, {results.stream}: {what} of {results.planned_stages - 1}"
    return Publication(files, stages, message or default)


def create_collection(
    title: str,
    repo_ids: str | Sequence[str] | Mapping[str, str],
    *,
    description: str | None = None,
    namespace: str | None = None,
    private: bool = False,
    token: str | bool | None = None,
) -> str:
    """Gather repositories in one collection of the Hub, such as the runs of a benchmark.

    Done again, it adds what is new.

    Args:
        title: of the collection.
        repo_ids: one model, or several in their order; as a mapping, each with a note.
        description: at most 150 characters.
        namespace: user or organisation; None for the token's.

    Returns:
        The collection's address.

    Raises:
        ValueError: no models, or a description that is too long.
        HubError, FileNotFoundError: the Hub refuses; a model does not exist.
    """
    repo_ids = [repo_ids] if isinstance(repo_ids, str) else repo_ids
    notes = dict(repo_ids) if isinstance(repo_ids, Mapping) else dict.fromkeys(repo_ids, "")
    if not notes:
        raise ValueError("a collection needs at least one repository")
    if description is not None and len(description) > 150:
        raise ValueError(f"the Hub takes descriptions of at most 150 characters, this one has {len(description)}")
    hub = api(token)
    with explained(f"the collection {title!r}"):
        made = retried(
            lambda: hub.create_collection(
                title, namespace=namespace, description=description, private=private, exists_ok=True
            )
        )
    for name, note in notes.items():
        with explained(name):
            retried(
                lambda name=name, note=note: hub.add_collection_item(  # type: ignore[misc]
                    made.slug, item_id=name, item_type="model", note=note or None, exists_ok=True
                )
            )
    return made.url


def _local_base(adapter: StoredAdapter) -> Path | None:
    folder = adapter.folder / adapter.info.base_model
    return folder.resolve() if folder.is_dir() else None


def _checkpoint_files(folder: Path) -> list[Path]:
    """What is published of a base: no optimiser states, no pickles."""
    suffixes = (".safetensors", ".json", ".txt", ".model")
    return sorted(
        file for file in folder.rglob("*") if file.is_file() and file.suffix in suffixes and file.name != BASE_SUMS
    )


def check_base_files(folder: Path) -> None:
    """Check a base that went along with adapters against its checksums; one that has none is taken as it is.

    The fingerprint in `infovla.json` says which base it is by a few values of every tensor. It sees neither a change
    elsewhere in them nor the tokenizer.

    Raises:
        AdapterError: a file is missing, was changed or was not published with it.
    """
    if not (folder / BASE_SUMS).is_file():
        return
    cure = "the base is not as it was published: copy or download the whole folder again"
    try:
        sums = read_sealed(folder / BASE_SUMS, newest=BASE_FORMAT, sealed_since=BASE_FORMAT)[SUMS]
        check_files(folder, sums)
    except DamagedFileError as error:
        raise AdapterError(error.with_cure(cure)) from error
    strange = [file for file in _checkpoint_files(folder) if file.relative_to(folder).as_posix() not in sums]
    if strange:
        raise AdapterError(f"{strange[0]} was not published with the others; {cure}")


def _published_info(
    adapter: StoredAdapter, below: str, base: tuple[str, str] | None, included: bool, folder_of_data: bool
) -> AdapterInfo:
    """What infovla.json says once it is published: a base that others find, no paths of this machine."""
    info = adapter.info
    if base is not None:
        info = replace(info, base_model=base[0], base_revision=base[1])
    elif included:
        info = replace(info, base_model=f"../{BASE_FOLDER}" if below else f"./{BASE_FOLDER}", base_revision=None)
    return replace(info, training=public_config(info.training, folder_of_data=folder_of_data))


def public_config(config: Mapping[str, Any], *, folder_of_data: bool = False) -> dict[str, Any]:
    """A resolved configuration without what is nobody's business: folders of this machine, secrets.

    Args:
        folder_of_data: `demonstrations_source` is a folder, even if it looks like a Hub id ("data/kitchen").

    >>> public_config({"seed": 0, "output_dir": "/runs/a", "hub_token": "hf_x", "assets_folder": None})
    {'seed': 0, 'output_dir': 'a', 'assets_folder': None}
    >>> public_config({"demonstrations_source": "/robot", "deepspeed": {"config": ["~/zero.json"]}})
    {'demonstrations_source': 'robot', 'deepspeed': {'config': ['zero.json']}}
    """
    kept = {name: value for name, value in config.items() if "token" not in name or not isinstance(value, str)}
    for name in _PLACES:
        value = kept.get(name)
        # With one it may be of the Hub, as is hf://datasets/user/name.
        is_folder = folder_of_data and name == "demonstrations_source"
        if isinstance(value, str) and (is_folder or (value.count("/") > 1 and not value.startswith("hf://"))):
            kept[name] = Path(value).name
    return {name: _without_folders(value) for name, value in kept.items()}


_PLACES = (
    "output_dir",
    "logging_dir",
    "assets_folder",
    "demonstrations_folder",
    "demonstrations_source",
    "resume_from_checkpoint",
    "base_model",
)


def _without_folders(value: Any) -> Any:
    """The same, with the last part alone of every path that begins at the root, at home or at a dot."""
    if isinstance(value, str):
        return Path(value).name if value.startswith(("/", "./", "../", "~")) else value
    if isinstance(value, Mapping):
        return {name: _without_folders(each) for name, each in value.items()}
    return [_without_folders(each) for each in value] if isinstance(value, (list, tuple)) else value


def _adapter_files(
    adapter: StoredAdapter,
    below: str,
    workspace: Path,
    base: tuple[str, str] | None,
    included: bool,
    folder_of_data: bool,
) -> dict[str, Path]:
    """The four files of an adapter; those that name the base are written anew."""
    info = _published_info(adapter, below, base, included, folder_of_data)
    folder = workspace / (below or "root")
    folder.mkdir(parents=True)
    for name in (WEIGHTS, STATISTICS):
        _link(adapter.folder / name, folder / name)
    config = json.loads((adapter.folder / PEFT_CONFIG).read_text(encoding="utf-8"))
    write_json(
        folder / PEFT_CONFIG, {**config, "base_model_name_or_path": info.base_model, "revision": info.base_revision}
    )
    write_info(folder, info)
    return {f"{below}{name}": folder / name for name in (WEIGHTS, PEFT_CONFIG, INFO, STATISTICS)}


def _link(source: Path, target: Path) -> None:
    try:
        target.symlink_to(source.resolve())
    except OSError:  # a file system without links
        shutil.copyfile(source, target)


def _videos(results: Results, run: Path) -> list[tuple[Video, Path]]:
    """One rollout per task: of the newest stage that recorded it, a success if there is one."""
    best: dict[str, Video] = {}
    for video in results.videos:
        known = best.get(video.task)
        better = known is None or (video.stage, video.success) > (known.stage, known.success)
        if better and (run / video.path).is_file():
            best[video.task] = video
    return [(replace(video, path=f"videos/{task}.mp4"), run / video.path) for task, video in best.items()]


def _open_repository(hub: Any, repo_id: str, private: bool | None) -> Any:
    """Make a repository, or see that it is there; never let what should be private go into a public one.

    Raises:
        HubError: `private` is True, and there is a public one.
    """
    made = retried(lambda: hub.create_repo(repo_id, private=private, exist_ok=True))
    if private and not retried(lambda: hub.model_info(made.repo_id)).private:
        raise HubError(
            f"{made.repo_id} is there already, and public, so nothing was pushed as private; make it private in its "
            "settings on the Hub, take another name, or leave `private` (--private, hub_private_repo) out"
        )
    return made


def base_files(run_folder: str | Path, repo_id: str, base_repo: str) -> dict[str, Path]:
    """What a push of a run puts into the repository of its base: path there → file here.

    Raises:
        FileNotFoundError, ValueError: see `check_run`; the base is published already; both repositories are the same.
    """
    adapter = check_run(run_folder)[-1]
    folder = _local_base(adapter)
    if folder is None:
        raise ValueError(
            f"the base of {run_folder} is {adapter.info.base_model}, which is published already; leave out base_repo"
        )
    if base_repo == repo_id:
        raise ValueError(
            f"{repo_id} cannot hold the adapters and, at its root too, the base: leave out base_repo, and the base "
            "goes into its folder base/; or give another name"
        )
    return {file.relative_to(folder).as_posix(): file for file in _checkpoint_files(folder)}


def _push_base(hub: Any, files: Mapping[str, Path], base_repo: str, private: bool | None) -> tuple[str, str]:
    from huggingface_hub import CommitOperationAdd

    def commit(url: Any) -> str:
        additions = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
        parent = hub.model_info(url.repo_id).sha
        message = "The base of infovla adapters"
        return str(hub.create_commit(url.repo_id, additions, commit_message=message, parent_commit=parent).oid)

    with explained(base_repo):
        url = _open_repository(hub, base_repo, private)
        return url.repo_id, retried(lambda: commit(url))


def check_access(repo_id: str | None, folder: str | Path, *, private: bool | None, token: str | bool | None) -> str:
    """Make the repository of a run, or see that it is there, before anything is trained; returns its full id.

    Args:
        repo_id: None for the name of the run's folder, below the token's user.

    Raises:
        HubError, FileNotFoundError: nothing could be pushed with this token.
    """
    name = repo_id or Path(folder).resolve().name
    hub = api(token)
    with explained(name):
        who = retried(lambda: hub.whoami(cache=True))
        made = _open_repository(hub, name, private)
    if who.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise HubError(f"{name}: the token may only read; use one with write access")
    return str(made.repo_id)

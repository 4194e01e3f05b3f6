"""The Hub on this machine answers the unmodified client as the Hub does, in what the other tests do not ask of it."""

from __future__ import annotations

import pytest
from huggingface_hub import CommitOperationDelete, HfApi
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError
from local_hub import LocalHub

REPO = "me/model"
FILES = {"a.txt": b"a", "one/b.txt": b"b", "one/two/c.safetensors": b"c", "one more/d.txt": b"d"}


@pytest.fixture
def api(hub: LocalHub) -> HfApi:
    api = HfApi(token=hub.token("me"))
    api.create_repo(REPO)
    hub.put(REPO, FILES, remove=[".gitattributes"])
    return api


def paths(found: object) -> list[str]:
    return sorted(item.path for item in found)  # type: ignore[attr-defined]


def test_a_tree_is_listed_folder_by_folder(api: HfApi) -> None:
    assert paths(api.list_repo_tree(REPO)) == ["a.txt", "one", "one more"]
    assert paths(api.list_repo_tree(REPO, recursive=True)) == sorted([*FILES, "one", "one more", "one/two"])
    assert paths(api.list_repo_tree(REPO, "one")) == ["one/b.txt", "one/two"]
    assert paths(api.list_repo_tree(REPO, "one", recursive=True)) == ["one/b.txt", "one/two", "one/two/c.safetensors"]
    assert paths(api.list_repo_tree(REPO, "one more")) == ["one more/d.txt"]
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree(REPO, "absent"))
    assert sorted(api.list_repo_files(REPO)) == sorted(FILES)


def test_paths_are_described(api: HfApi) -> None:
    found = {item.path: item for item in api.get_paths_info(REPO, ["a.txt", "one", "one/two/c.safetensors", "absent"])}
    assert sorted(found) == ["a.txt", "one", "one/two/c.safetensors"]
    assert [type(found[path]).__name__ for path in sorted(found)] == ["RepoFile", "RepoFolder", "RepoFile"]
    assert (found["a.txt"].size, found["a.txt"].lfs) == (1, None)
    assert found["one/two/c.safetensors"].lfs is not None


def test_a_folder_is_deleted_with_all_that_is_in_it(hub: LocalHub, api: HfApi) -> None:
    api.delete_folder("one", REPO)
    assert hub.files(REPO) == ["a.txt", "one more/d.txt"]
    with pytest.raises(EntryNotFoundError):
        api.create_commit(REPO, [CommitOperationDelete("absent/")], commit_message="nothing")


def test_what_is_no_model_is_refused(hub: LocalHub, api: HfApi) -> None:
    for kind, options in (("dataset", {}), ("space", {"space_sdk": "static"})):
        with pytest.raises(RepositoryNotFoundError, match="keeps models alone"):
            api.create_repo("me/other", repo_type=kind, **options)
        with pytest.raises(RepositoryNotFoundError, match="keeps models alone"):
            api.repo_info("me/other", repo_type=kind)
    with pytest.raises(RepositoryNotFoundError):
        api.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id="me/other", repo_type="dataset")
    assert list(hub.repositories) == [REPO]

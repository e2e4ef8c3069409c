"""Sends a checked folder to the Hub as one commit, so that a repository never shows half a checkpoint.

`modeling_pisces/hub/export.py` hands `push_folder` on to users. Writing the folder is left to that file, checking it
to `modeling_pisces/hub/checks.py`.
"""

import os
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

from ..checkpoint.files import DECODER_PARTS
from .checks import check_hub_folder, check_repo_id


# What an earlier push may have left behind and a loader would still find: other shards, an old decoder, old code.
STALE_AT_ROOT = ("*.safetensors", "*.safetensors.index.json", "*.py", "model_index.json")


@dataclass(frozen=True)
class PushReport:
    """What a push did.

    Args:
        repo_id: the repository, owner/name.
        commit: hash of the commit that holds the checkpoint.
        url: where to look at it; the pull request's, if one was opened.
        files: every file of the checkpoint, as named in the repository.
        removed: files of an earlier checkpoint that this commit removed.
        num_bytes: size of all files.
    """

    repo_id: str
    commit: str
    url: str
    files: tuple[str, ...]
    removed: tuple[str, ...]
    num_bytes: int

    def __str__(self) -> str:
        removed = f", {len(self.removed)} earlier files removed" if self.removed else ""
        return f"{self.url}: {len(self.files)} files, {self.num_bytes / 1e6:.1f} MB in one commit{removed}"


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    private: bool = True,
    token: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload a Pisces checkpoint",
) -> PushReport:
    """Check an exported folder and publish it: all of it in one commit, or nothing.

    Files that an earlier checkpoint left in the repository and that this one does not have are removed by the same
    commit: weights, decoder and code. Other files stay. After a failure the same call goes on: large files that the
    Hub has received already are not sent again.

    Args:
        folder: what `export_to_folder` wrote.
        repo_id: owner/name, or name alone for the own account; without a dot. Created if it does not exist.
        private: whether a repository that is created now is private. An existing one is left as it is.
        token: access token; None takes the one of `hf auth login`.
        revision: branch to push to, created if it does not exist; None is the default branch.
        create_pr: open a pull request instead of pushing to the default branch.

    Raises:
        ValueError: before anything is sent: the folder or the name cannot be published as they are.
        RuntimeError: the Hub refused or the connection broke; the message says whether anything was published.
    """
    folder = Path(folder)
    check_repo_id(repo_id)
    if create_pr and revision is not None:
        raise ValueError(
            f"create_pr and revision={revision!r} exclude each other: the pull request is its own branch."
        )
    files = [path.as_posix() for path in check_hub_folder(folder)]
    return send_files(folder, files, repo_id, private, token, revision, create_pr, commit_message)


def send_files(
    folder: Path,
    files: list[str],
    repo_id: str,
    private: bool,
    token: str | None,
    revision: str | None,
    create_pr: bool,
    commit_message: str,
) -> PushReport:
    """Send checked files as one commit; arguments and errors as in `push_folder`."""
    api = HfApi(token=token)
    before = None
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        before = api.repo_info(repo_id, revision=revision).sha
        removed = _files_to_remove(api.list_repo_files(repo_id, revision=revision), files)
        additions = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name in files]
        deletions = [CommitOperationDelete(path_in_repo=name, is_folder=False) for name in removed]
        # not upload_folder: with hf_xet installed, huggingface_hub 2 sends it in several commits
        commit = api.create_commit(
            repo_id,
            [*additions, *deletions],
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
            parent_commit=before,  # somebody else's push in the meantime is an error, not a mixture
        )
    except Exception as error:  # the Hub client and two HTTP libraries below it have a hundred ways to fail
        raise RuntimeError(_failure(api, folder, repo_id, revision, before, error)) from error
    num_bytes = sum((folder / name).stat().st_size for name in files)
    url = commit.pr_url or commit.commit_url
    return PushReport(repo_id, commit.oid, url, tuple(files), tuple(removed), num_bytes)


def _files_to_remove(found: list[str], files: list[str]) -> list[str]:
    def is_ours(name: str) -> bool:
        if "/" in name:
            return name.split("/")[0] in DECODER_PARTS
        return any(fnmatch(name, pattern) for pattern in STALE_AT_ROOT)

    return sorted(name for name in set(found) - set(files) if is_ours(name))


def _failure(
    api: HfApi, folder: Path, repo_id: str, revision: str | None, before: str | None, error: Exception
) -> str:
    """One sentence on what went wrong, and one on what the repository holds now: a lost answer may hide a success."""
    reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
    if error.__cause__ is not None:
        reason += f" ({type(error.__cause__).__name__}: {' '.join(str(error.__cause__).split())})"
    try:
        is_unchanged = before is None or api.repo_info(repo_id, revision=revision).sha == before
    except Exception:  # whatever stopped the push stops the question too
        state = f"Look at {repo_id} when the Hub answers again; a checkpoint there is whole or as it was."
    else:
        state = (
            "Nothing was published; the same call goes on from here."
            if is_unchanged
            else f"But {repo_id} has a new commit: look at it before pushing again."
        )
    return f"{folder}: not pushed to {repo_id}: {reason} {state}"

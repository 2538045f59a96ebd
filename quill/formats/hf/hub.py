"""Downloads a repository's model files from the Hugging Face Hub into the Hub's own cache.

The cache (HF_HOME), the server (HF_ENDPOINT), offline mode (HF_HUB_OFFLINE) and the token for private
repositories are those of the huggingface_hub package, so nothing is downloaded twice.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from quill.errors import InputError, NotFoundError, QuillError, ResourceError
from quill.formats import base

# Only safetensors: repositories also have the same weights as pickles or for other programs.
_WANTED = (
    "config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json",
    "model-*-of-*.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt",
)  # fmt: skip
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def fetch(repo: str, observer: Callable[[str], None] | None = None) -> Path:
    """Download a model's files into the Hub's cache, unless they are there.

    Args:
        repo: "gpt2" or "org/name", with "@revision" for a branch, tag or commit.
        observer: Receives a message before the download.

    Returns:
        The snapshot's folder, whose files are links into the cache.

    Raises:
        InputError: It is not a repository's name, or huggingface_hub is not installed.
        NotFoundError: The Hub has no such repository or revision, or you may not read it.
        ResourceError: The Hub cannot be reached, or the disk is full.
    """
    name, _, revision = repo.partition("@")
    if not _REPOSITORY.fullmatch(name) or ".." in name or ("@" in repo and not revision):
        why = "a repository is hf:NAME or hf:OWNER/NAME, optionally with @REVISION"
        raise InputError(f"'hf:{repo}' is not a repository", why=why, hint="quill import hf:gpt2")
    try:
        hub: Any = import_module("huggingface_hub")
    except ImportError:
        raise base.needs("huggingface_hub", "hf") from None
    if observer is not None:
        observer(f"downloading {name} from {_constants().ENDPOINT}")
    try:
        with silent():
            found = hub.snapshot_download(
                name, revision=revision or None, allow_patterns=list(_WANTED), ignore_patterns=["*/*"]
            )
    except Exception as e:
        raise _translated(e, name, revision) from e
    return Path(found)


def _translated(error: Exception, name: str, revision: str) -> QuillError:
    """The error as quill's own, with the commands that work without a network."""
    errors: Any = import_module("huggingface_hub.errors")
    constants = _constants()
    at = f"{constants.ENDPOINT}/{name}"
    option = f" --revision {revision}" if revision else ""
    local = name.rpartition("/")[2]
    by_hand = (
        f"on a computer with a network, run: hf download {name}{option} --local-dir {local}; copy the folder "
        f"here, then run: quill import ./{local}"
    )
    if isinstance(error, errors.GatedRepoError):
        return NotFoundError(
            f"you have no access to '{name}'",
            why=f"accept its terms first: {at}",
            hint="hf auth login",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return NotFoundError(f"'{name}' has no revision '{revision}'", why=at, hint=f"quill import hf:{name}")
    if isinstance(error, errors.RepositoryNotFoundError):
        why = f"{at} does not exist, or is private"
        return NotFoundError(f"no repository '{name}'", why=why, hint="hf auth login")
    if isinstance(error, errors.HFValidationError):
        return InputError(f"'hf:{name}' is not a repository", why=str(error).splitlines()[0])
    why = "offline mode is on (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else reason(error)
    return ResourceError(f"cannot download '{name}'", why=f"{at}: {why}", hint=by_hand)


def reason(error: BaseException) -> str:
    """The innermost cause of an error, in one line."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return (str(error).splitlines() or [""])[0][:200] or type(error).__name__


def _constants() -> Any:
    """The package's settings, read from the environment when it was first imported."""
    return import_module("huggingface_hub.constants")


@contextmanager
def silent() -> Iterator[None]:
    """Turn off the package's progress bars."""
    utils: Any = import_module("huggingface_hub.utils")
    if utils.are_progress_bars_disabled():
        yield
        return
    utils.disable_progress_bars()
    try:
        yield
    finally:
        utils.enable_progress_bars()

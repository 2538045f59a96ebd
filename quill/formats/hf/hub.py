"""The Hugging Face Hub: a repository's model files, brought into the Hub's own cache.

The cache, its place (HF_HOME), the server (HF_ENDPOINT), offline mode (HF_HUB_OFFLINE) and the token of
private repositories are those of the huggingface_hub package, so nothing is fetched twice.
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

# Weights as safetensors alone: what else repositories hold are the same weights as pickles or for others.
_WANTED = (
    "config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json",
    "model-*-of-*.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt",
)  # fmt: skip
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def fetch(repo: str, observer: Callable[[str], None] | None = None) -> Path:
    """Bring a model's files into the Hub's cache; what is there already is not fetched again.

    Args:
        repo: "gpt2" or "org/name", with "@revision" for a branch, tag or commit.
        observer: Is told what is about to be done.

    Returns:
        The snapshot's folder, whose files are links into the cache.

    Raises:
        InputError: It is no name of a repository, or huggingface_hub is not installed.
        NotFoundError: The Hub has no such repository or revision, or not for you.
        ResourceError: The Hub cannot be reached, or the disk is full.
    """
    name, _, revision = repo.partition("@")
    if not _REPOSITORY.fullmatch(name) or ".." in name or ("@" in repo and not revision):
        why = "a repository is NAME or ORGANISATION/NAME, with @REVISION if need be"
        raise InputError(f"'hf:{repo}' names no repository", why=why, hint="quill import hf:gpt2")
    try:
        hub: Any = import_module("huggingface_hub")
    except ImportError:
        raise base.needs("huggingface_hub", "hf") from None
    if observer is not None:
        observer(f"fetching {name} from {_constants().ENDPOINT}")
    try:
        with _silent():
            found = hub.snapshot_download(
                name, revision=revision or None, allow_patterns=list(_WANTED), ignore_patterns=["*/*"]
            )
    except Exception as e:
        raise _translated(e, name, revision) from e
    return Path(found)


def _translated(error: Exception, name: str, revision: str) -> QuillError:
    """What went wrong in quill's words, with the way to place the files by hand."""
    errors: Any = import_module("huggingface_hub.errors")
    constants = _constants()
    at = f"{constants.ENDPOINT}/{name}"
    option = f" --revision {revision}" if revision else ""
    by_hand = (
        f"where there is a network: hf download {name}{option} --local-dir {name.rpartition('/')[2]}; "
        f"then here: quill import ./{name.rpartition('/')[2]}"
    )
    if isinstance(error, errors.GatedRepoError):
        return NotFoundError(
            f"'{name}' is not open to you",
            why=f"{at} asks for its terms to be accepted",
            hint="hf auth login",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return NotFoundError(f"'{name}' has no revision '{revision}'", why=at, hint=f"quill import hf:{name}")
    if isinstance(error, errors.RepositoryNotFoundError):
        why = f"{at} is not there, or is private"
        return NotFoundError(f"no repository '{name}'", why=why, hint="hf auth login, if it is private")
    if isinstance(error, errors.HFValidationError):
        return InputError(f"'hf:{name}' names no repository", why=str(error).splitlines()[0])
    reason = "offline mode is on (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else _reason(error)
    return ResourceError(f"cannot fetch '{name}'", why=f"{at}: {reason}", hint=by_hand)


def _reason(error: BaseException) -> str:
    """The innermost cause, one line."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return (str(error).splitlines() or [""])[0][:200] or type(error).__name__


def _constants() -> Any:
    """The package's settings, from the environment as it was when it was first imported."""
    return import_module("huggingface_hub.constants")


@contextmanager
def _silent() -> Iterator[None]:
    """Without the package's own progress bars."""
    utils: Any = import_module("huggingface_hub.utils")
    if utils.are_progress_bars_disabled():
        yield
        return
    utils.disable_progress_bars()
    try:
        yield
    finally:
        utils.enable_progress_bars()

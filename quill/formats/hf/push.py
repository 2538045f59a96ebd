"""Uploads a model to the Hugging Face Hub, as the folder that an export to hf makes."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quill import fsio
from quill.errors import InputError, QuillError, RefusedError, ResourceError, shorten
from quill.formats import base, exporting
from quill.formats.hf import FOLDER_LINE, hub

if TYPE_CHECKING:
    from quill.registry.version import Version

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_PREFIX = "hf:"


def push(
    version: Version,
    repository: str,
    *,
    private: bool = False,
    dtype: str | None = None,
    verify: bool = False,
    notice: Callable[[str], None] | None = None,
) -> str:
    """Upload a model to the Hub, in one commit. The repository is created if it does not exist.

    Args:
        version: The model.
        repository: "hf:OWNER/REPO".
        private: Create a private repository, and refuse a public one that exists.
        dtype: The dtype of the weights; unset: float32.
        verify: Compare transformers' logits with quill's first.
        notice: Receives a message before the upload.

    Returns:
        The repository's address.

    Raises:
        InputError: It is not a repository, transformers has no class for the model, or huggingface_hub is not
            installed.
        RefusedError: The repository is public, or your token may not write to it.
        ResourceError: The Hub cannot be reached, or you are not logged in.
    """
    name = repository.removeprefix(_PREFIX)
    if not repository.startswith(_PREFIX) or not _REPOSITORY.fullmatch(name) or ".." in name:
        why = "a repository is hf:OWNER/REPO"
        hint = f"quill push {version.reference} hf:OWNER/{version.name}"
        raise InputError(f"{shorten(repository)} is not a repository", why=why, hint=hint)
    try:
        package: Any = import_module("huggingface_hub")
    except ImportError:
        raise base.needs("huggingface_hub", "hf") from None
    api = package.HfApi()
    with tempfile.TemporaryDirectory(prefix="quill-push-") as place:
        folder = Path(place) / "model"
        exporting.export(version, "hf", folder, dtype=dtype, verify=verify)
        card = (folder / "README.md").read_text(encoding="utf-8").replace(FOLDER_LINE, f'name = "{name}"')
        fsio.write_bytes(folder / "README.md", card.encode(), durable=False)
        if notice is not None:
            notice(f"uploading {version.reference} to {api.endpoint}/{name}")
        try:
            with hub.silent():
                api.create_repo(name, private=private, exist_ok=True)
                if private and not api.repo_info(name).private:
                    raise RefusedError(
                        f"'{name}' already exists and is public",
                        why="private=True would not make it private",
                        hint="choose another repository",
                    )
                api.upload_folder(
                    repo_id=name, folder_path=folder, commit_message=f"Upload {version.reference}"
                )
        except QuillError:
            raise
        except Exception as e:
            raise _translated(e, name, api.endpoint) from e
    return f"{api.endpoint}/{name}"


def _translated(error: Exception, name: str, endpoint: str) -> QuillError:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401 or type(error).__name__ == "LocalTokenNotFoundError":
        return ResourceError(
            f"cannot upload to '{name}'", why=f"you are not logged in to {endpoint}", hint="hf auth login"
        )
    if status == 403:
        why = "your token may not write there"
        return RefusedError(f"cannot upload to '{name}'", why=why, hint="hf auth login")
    return ResourceError(f"cannot upload to '{name}'", why=f"{endpoint}: {hub.reason(error)}")

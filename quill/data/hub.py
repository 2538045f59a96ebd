"""Datasets of the Hugging Face Hub, copied to disk as JSON lines, since text is read more than once.

The server (HF_ENDPOINT), offline mode (HF_HUB_OFFLINE) and the token for private repositories are those of
the huggingface_hub package. Code in a repository is never executed: the datasets package no longer does.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import shlex
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from quill import fsio
from quill.data.named_sources import OnBytes
from quill.errors import InputError, NotFoundError, QuillError, ResourceError, shorten

PREFIX = "hf:"
# Datasets with a name.
NAMED = {"openwebtext": "hf:Skylion007/openwebtext"}
# What the copy is called; it is read as any such file.
COPY = "documents.jsonl.gz"

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# Characters of JSON that are compressed at a time.
_MEMBER = 1 << 22


@dataclass(frozen=True)
class Repository:
    """A split of a dataset on the Hub, or of a folder that is laid out as a repository.

    Attributes:
        source: The source as it was given.
        path: OWNER/NAME, or the path of a folder.
        config: Name of its configuration; empty for its default.
        split: Name of its split.
        revision: The commit; empty for a folder.
    """

    source: str
    path: str
    config: str
    split: str
    revision: str

    def copy(self, folder: Path, text_field: str, on_bytes: OnBytes | None) -> Path:
        """Stream the texts into a file.

        Args:
            folder: Where it is written.
            text_field: Field of a record that contains the text.
            on_bytes: Called with "downloading", the characters so far, and None.

        Raises:
            NotFoundError: There is no such dataset.
            InputError: It has no such configuration, split or field.
            ResourceError: The network or the disk does not allow it.
        """
        path = folder / COPY
        with fsio.guard(path, "write"):
            fsio.create(path, self._members(text_field, on_bytes))
        return path

    def _members(self, text_field: str, on_bytes: OnBytes | None) -> Iterator[bytes]:
        lines: list[str] = []
        size = done = 0
        for text in self._texts(text_field):
            lines.append(json.dumps({text_field: text}, ensure_ascii=False) + "\n")
            size += len(text)
            if size >= _MEMBER:
                yield gzip.compress("".join(lines).encode(), 1)
                done += size
                lines, size = [], 0
                if on_bytes:
                    on_bytes("downloading", done, None)
        yield gzip.compress("".join(lines).encode(), 1)

    def _texts(self, text_field: str) -> Iterator[str]:
        try:
            datasets = _datasets(self.source)
            with _silent(datasets):
                records: Iterable[dict[str, Any]] = datasets.load_dataset(
                    self.path,
                    name=self.config or None,
                    split=self.split,
                    revision=self.revision or None,
                    streaming=True,
                )
            for number, record in enumerate(records, 1):
                text = record.get(text_field)
                if isinstance(text, str):
                    yield text
                elif text_field not in record or text is not None:
                    raise _not_text(self.source, record, text_field, number)
        except QuillError:
            raise
        except Exception as e:
            raise _translated(e, self.source) from e


def is_hub(source: str) -> bool:
    """Whether a source is a dataset of the Hub."""
    return source.startswith(PREFIX) or source in NAMED


def find(source: str) -> Repository:
    """Find the dataset of a source and the commit that its revision means now.

    Args:
        source: hf:OWNER/NAME, optionally followed by @REVISION, :CONFIG and :SPLIT; or a key of NAMED. In
            place of OWNER/NAME, a folder: an absolute path, or one that starts with a dot.

    Raises:
        InputError: It is written in another way, or the packages are not installed.
        NotFoundError: There is no such dataset or revision.
        ResourceError: The Hub cannot be reached.
    """
    address = NAMED.get(source, source).removeprefix(PREFIX)
    path, *selected = address.split(":")
    config, split = (*selected, "", "")[:2]
    if path.startswith(("/", ".")):
        if not os.path.isdir(path):
            raise NotFoundError(f"no folder '{path}'", hint="check the path")
        _datasets(source)
        return Repository(source, path, config, split or "train", "")
    path, at, revision = path.partition("@")
    if len(selected) > 2 or ".." in path or not _REPOSITORY.fullmatch(path) or (at and not revision):
        raise InputError(
            f"'{source}' is not a dataset of the Hub",
            why="it is written hf:OWNER/NAME, optionally followed by @REVISION, :CONFIG and :SPLIT",
            hint="quill prepare hf:Salesforce/wikitext:wikitext-2-raw-v1",
        )
    if os.path.isdir(path):
        # The datasets package would read the folder.
        raise InputError(
            f"'{path}' is also a folder here",
            why="which one to read is not clear",
            hint=f"quill prepare {shlex.quote(f'{PREFIX}./{path}')}",
        )
    _datasets(source)
    try:
        api: Any = import_module("huggingface_hub").HfApi()
        commit = str(api.dataset_info(path, revision=revision or None).sha)
    except Exception as e:
        raise _translated(e, source) from e
    return Repository(source, path, config, split or "train", commit)


def _datasets(source: str) -> Any:
    try:
        return import_module("datasets")
    except ImportError:
        raise InputError(
            f"cannot read '{source}'",
            why="datasets of the Hugging Face Hub need the datasets package",
            hint="pip install 'quill-gpt[hub]'",
        ) from None


@contextmanager
def _silent(datasets: Any) -> Iterator[None]:
    """Turn off the package's progress bars."""
    if datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()


def _not_text(source: str, record: dict[str, Any], text_field: str, number: int) -> InputError:
    other = next((k for k, v in record.items() if isinstance(v, str) and k.isidentifier()), None)
    hint = f"set data.text_field={other}" if other and len(other) <= 40 else ""
    field = shorten(text_field)
    if text_field in record:
        why = f"it is {shorten(record[text_field])}"
        return InputError(
            f"'{source}' record {number:,}: the field {field} is not a string", why=why, hint=hint
        )
    why = f"it has {', '.join(map(shorten, list(record)[:8])) or 'none'}"
    return InputError(f"'{source}' has no field {field}", why=why, hint=hint)


def _translated(error: Exception, source: str) -> QuillError:
    """The error as quill's own. Those of the Hub are found by name, as not all of them are always there."""
    names = {kind.__name__ for kind in type(error).__mro__}
    why = (str(error).splitlines() or [""])[0][:300] or type(error).__name__
    if "GatedRepoError" in names:
        return NotFoundError(
            f"you have no access to '{source}'", why="accept its terms on the Hub first", hint="hf auth login"
        )
    if "RevisionNotFoundError" in names:
        return NotFoundError(f"'{source}' has no such revision", why=why, hint="check the revision")
    if names & {"RepositoryNotFoundError", "DatasetNotFoundError"}:
        why = "it does not exist on the Hub, or is private"
        return NotFoundError(f"no dataset '{source}'", why=why, hint="hf auth login")
    network = isinstance(error, OSError) or names & {"HTTPError", "HfHubHTTPError", "TransportError"}
    if network and "DataFilesNotFoundError" not in names:
        return ResourceError(
            f"cannot read '{source}'",
            why=why,
            hint="check the network; or download its files elsewhere, and prepare the folder",
        )
    return InputError(f"cannot read '{source}'", why=why, hint="check its configuration and split on the Hub")

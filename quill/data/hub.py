"""Datasets of the Hugging Face Hub, copied to disk as JSON lines, since text is read more than once.

The server (HF_ENDPOINT), offline mode (HF_HUB_OFFLINE) and the token for private repositories are those of
the huggingface_hub package. Code in a repository is never executed: the datasets package no longer does.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import shlex
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

from quill import fsio, strictjson
from quill.data.named_sources import OnBytes
from quill.errors import CorruptError, InputError, NotFoundError, QuillError, ResourceError, shorten

PREFIX = "hf:"
# Datasets with a name.
NAMED = {"openwebtext": "hf:Skylion007/openwebtext"}

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# Characters that are compressed at a time, and how often that is done for one file of a copy.
_MEMBER, _MEMBERS = 1 << 22, 64
_RECORD = "copied.json"
_LONGEST_RECORD = 1 << 24
# Part of the folder's name: raised when a copy would be written in another way.
_SCHEMA = 1


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

    def folder(self, root: Path, text_field: str) -> AbstractContextManager[Path]:
        """Open the folder for a copy: what an interruption left of it, else an empty one.

        Args:
            root: The data root.
            text_field: Field of a record that contains the text.
        """
        fsio.make_dir(root)
        if not self.revision:
            return fsio.scratch(root)
        made_of = ["hub", self.path, self.config, self.split, self.revision, text_field, _SCHEMA]
        return fsio.lasting(root, hashlib.sha256(strictjson.canonical(made_of)).hexdigest(), _RECORD)

    def copy(self, folder: Path, text_field: str, on_bytes: OnBytes | None) -> list[Path]:
        """Stream the texts into files; what the folder has already is not streamed again.

        Args:
            folder: Where they are written, from `folder`.
            text_field: Field of a record that contains the text.
            on_bytes: Called with "downloading", the characters so far, and the total if it can be estimated.

        Returns:
            The files, in order, to be read as any JSON lines.

        Raises:
            NotFoundError: There is no such dataset.
            InputError: It has no such configuration, split or field.
            ResourceError: The network or the disk does not allow it.
        """
        copied = _Copied.read(folder)
        if not copied.whole:
            records = self._records(copied.state)
            members = self._members(records, text_field, copied, on_bytes)
            while not copied.whole:
                path = folder / _name(copied.files)
                fsio.delete(path)  # Not recorded, so incomplete.
                with fsio.guard(path, "write"):
                    fsio.create(path, islice(members, _MEMBERS))
                    copied.whole = not path.stat().st_size
                if not copied.whole:
                    copied.files += 1
                copied.state = records.state_dict()
                copied.write(folder)
        return [folder / _name(number) for number in range(copied.files)]

    def _records(self, state: Any) -> Any:
        """Open the stream of records, where it was left."""
        try:
            datasets = _datasets(self.source)
            with _silent(datasets):
                records = datasets.load_dataset(
                    self.path,
                    name=self.config or None,
                    split=self.split,
                    revision=self.revision or None,
                    streaming=True,
                )
            if state is not None:
                records.load_state_dict(state)
        except QuillError:
            raise
        except Exception as e:
            raise _translated(e, self.source) from e
        return records

    def _members(
        self, records: Any, text_field: str, copied: _Copied, on_bytes: OnBytes | None
    ) -> Iterator[bytes]:
        """Compress the texts, several at a time; between two, `copied` counts what the stream has given."""
        expected = getattr((records.info.splits or {}).get(self.split), "num_examples", None)
        stream = self._translating(records)
        size = 1
        while size:
            lines: list[str] = []
            size = 0
            for record in stream:
                copied.records += 1
                text = record.get(text_field)
                if isinstance(text, str):
                    lines.append(json.dumps({text_field: text}, ensure_ascii=False) + "\n")
                    size += len(text)
                elif text_field not in record or text is not None:
                    raise _not_text(self.source, record, text_field, copied.records)
                if size >= _MEMBER:
                    break
            copied.characters += size
            if on_bytes:
                total = expected and copied.characters * max(expected, copied.records) // max(
                    copied.records, 1
                )
                on_bytes("downloading", copied.characters, total or None)
            if lines:
                yield gzip.compress("".join(lines).encode(), 1, mtime=0)

    def _translating(self, records: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        try:
            yield from records
        except Exception as e:
            raise _translated(e, self.source) from e


@dataclass
class _Copied:
    """How far a copy is.

    Attributes:
        files: Number of files that are complete.
        records: Number of records in them, and of those without text.
        characters: Characters of their texts.
        state: Where the stream continues, as the datasets package has it.
        whole: Whether there are no more records.
    """

    files: int = 0
    records: int = 0
    characters: int = 0
    state: Any = None
    whole: bool = False

    @classmethod
    def read(cls, folder: Path) -> _Copied:
        path = folder / _RECORD
        try:
            raw = fsio.read_plain(path, _LONGEST_RECORD)
        except FileNotFoundError:
            return cls()
        return cls(**strictjson.parse(raw, origin=str(path), error=CorruptError))

    def write(self, folder: Path) -> None:
        """Record it, durably."""
        fsio.settle(folder)
        fsio.write_json(folder / _RECORD, asdict(self))


def _name(number: int) -> str:
    return f"documents-{number:05}.jsonl.gz"


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

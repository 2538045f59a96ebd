"""Merge the shards of a text, each prepared by a job of its own, into one dataset.

A shard is a dataset, NAME-2-of-8, of the ids that the whole has there, so put together they are those of the
whole. Only the places where files are cut differ, and merging cuts them where the whole would be cut.

The tasks of a datatrove pipeline each write a shard of documents that no other task sees. These are joined by
what separates documents, and the key of the whole is made of theirs.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from quill import fsio, naming
from quill.data import locks, matching, remove, shards, store
from quill.data.dataset import SPLITS, TOKENIZER, Dataset, Split
from quill.data.named_sources import OnBytes
from quill.errors import InputError, LockedError, NotFoundError

if TYPE_CHECKING:
    from quill.tokenizers.base import Ids

# Ids read at a time.
_STEP = 1 << 20


def merge(name: str, root: Path, *, force: bool = False, on_bytes: OnBytes | None = None) -> Dataset:
    """Make one dataset of all shards of a text, and remove them.

    Args:
        name: The name that the shards were prepared for, which the dataset gets.
        root: The data root.
        force: Replace another dataset of that name.
        on_bytes: Called with "verifying" or "merging", the bytes done, and the total.

    Raises:
        InputError: Shards are missing, or differ in more than their place in the text.
        NotFoundError: There are no shards.
        CorruptError: A file of one is damaged.
        RefusedError: The name belongs to another dataset.
    """
    naming.check(name, "dataset")
    found = _find(root, name)
    names = [dataset.name for dataset in found]
    _check_alike(name, found)
    settings = {k: v for k, v in found[0].settings.items() if k != matching.SHARD}
    key = found[0].manifest["whole"] or _hash(dataset.key for dataset in found)
    wanted = matching.Wanted(key, settings, found[0].origin)
    _, there = matching.choose(root, [name], wanted, force=force, on_bytes=on_bytes)
    target = root / name
    if not there or there.key != wanted.key or force:
        replace = force or there is not None
        with ExitStack() as stack:
            for path in (target, *(dataset.path for dataset in found)):
                stack.enter_context(locks.shared(path))
            with store.stage(target, wanted.key, replace=replace) as staged:
                facts = _write(staged, found, on_bytes)
                store.write_manifest(staged, wanted.key, settings, facts)
    # Open datasets are locked.
    found.clear()
    with suppress(LockedError):
        remove.plan(root, names, missing_ok=True).execute()
    return Dataset.open(target)


def _find(root: Path, name: str) -> list[Dataset]:
    """Open the shards of a text, in order."""
    entries = [e.name for e in store.entries(root) if re.fullmatch(rf"{re.escape(name)}-\d+-of-\d+", e.name)]
    if not entries:
        raise NotFoundError(
            f"there are no shards of '{name}' in {root}",
            why=f"those of two would be {name}-1-of-2 and {name}-2-of-2",
        )
    counts = sorted({int(entry.rpartition("-")[2]) for entry in entries})
    if len(counts) > 1:
        raise InputError(
            f"the shards of '{name}' are of {' and of '.join(f'{n:,}' for n in counts)}",
            why="a text is put together from shards of one division",
            hint="remove those that do not belong together",
        )
    wanted = [f"{name}-{number}-of-{counts[0]}" for number in range(1, counts[0] + 1)]
    missing = [number for number, entry in enumerate(wanted, 1) if entry not in entries]
    if missing:
        raise InputError(
            f"{len(missing):,} of the {counts[0]:,} shards of '{name}' are missing: "
            f"{', '.join(map(str, missing[:20]))}{' ...' if len(missing) > 20 else ''}",
            why="all of them are needed, in one folder of datasets",
            hint=store.find(root, entries[0]).prepare_command(
                name=name, settings={matching.SHARD: f"{missing[0]}/{counts[0]}"}
            ),
        )
    return [store.find(root, entry) for entry in wanted]


def _check_alike(name: str, found: Sequence[Dataset]) -> None:
    """Refuse shards of different texts, settings, tokenizers or releases."""
    first = found[0]
    for number, dataset in enumerate(found, 1):
        place = f"{number}/{len(found)}"
        if dataset.settings.get(matching.SHARD) != place:
            raise InputError(
                f"dataset '{dataset.name}' is not shard {place} of '{name}'",
                why=f"its manifest says {dataset.settings.get(matching.SHARD) or 'that it is a whole text'}",
            )
        for what in ("whole", "tokenizer", "dtype", "quill"):
            ours, theirs = dataset.manifest.get(what), first.manifest.get(what)
            if ours != theirs:
                difference = {
                    "whole": "another text, or has other settings",
                    "quill": f"quill {ours}, not {theirs}",
                }
                raise InputError(
                    f"shards '{first.name}' and '{dataset.name}' do not belong together",
                    why=f"the second is of {difference.get(what, f'another {what}')}",
                    hint=dataset.prepare_command(force=True),
                )


def _write(staged: Path, found: Sequence[Dataset], on_bytes: OnBytes | None) -> dict[str, Any]:
    """Write the files of the whole; return the manifest's facts about them."""
    total = sum(dataset.size for dataset in found)
    fsio.require_space(staged, total, "the tokens")
    for dataset in found:
        dataset.verify(on_bytes, again=False)
    done = 0

    first = found[0].manifest
    separator = [] if first["whole"] else _separator(found[0])
    joins = dict.fromkeys(SPLITS, 0)

    def ids(split: Split) -> Iterator[Ids]:
        nonlocal done
        there = False
        for dataset in found:
            tokens = dataset.split(split)
            if separator and there and len(tokens):
                joins[split] += 1
                yield np.array(separator, tokens.dtype)
            there = there or len(tokens) > 0
            for at in range(0, len(tokens), _STEP):
                read = tokens[at : at + _STEP]
                done += read.nbytes
                if on_bytes:
                    on_bytes("merging", done, total)
                yield read

    files: dict[str, dict[str, Any]] = {}
    splits: dict[str, dict[str, int]] = {}
    for split in SPLITS:
        written = shards.write(staged, staged, split, ids(split))
        files |= {name: {"bytes": w.bytes, "sha256": w.sha256} for name, w in written.items()}
        splits[split] = {
            of: sum(d.manifest["splits"][split][of] for d in found) + joins[split]
            for of in first["splits"][split]
        } | {"tokens": sum(w.tokens for w in written.values())}
    fsio.create(staged / TOKENIZER, [fsio.read_plain(found[0].path / TOKENIZER, 1 << 30)])
    files[TOKENIZER] = first["files"][TOKENIZER]
    return {
        "source": _source(found),
        "tokenizer": first["tokenizer"],
        "dtype": first["dtype"],
        "splits": splits,
        "files": files,
    }


def _separator(dataset: Dataset) -> list[int]:
    """Return the ids that stand between two documents."""
    tokenizer = dataset.tokenizer
    return tokenizer.encode("\n") if tokenizer.eot_id is None else [tokenizer.eot_id]


def _source(found: Sequence[Dataset]) -> dict[str, Any]:
    """Return the manifest's facts about the text of the whole."""
    first, stamps = found[0].manifest, {d.stamp for d in found}
    sources = [d.manifest["source"] for d in found]
    if first["whole"]:
        return {**sources[0], "stamp": found[0].stamp if len(stamps) == 1 else None}
    counts = {of: sum(source[of] for source in sources) for of in ("documents", "bytes")}
    sha256 = _hash(source["sha256"] for source in sources)
    return {**counts, "sha256": sha256, "given": [], "whence": None, "stamp": None}


def _hash(hashes: Iterable[str]) -> str:
    return hashlib.sha256("".join(hashes).encode()).hexdigest()

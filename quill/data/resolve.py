"""The dataset that a run's settings mean: found by name or by its text, or prepared."""

from __future__ import annotations

import glob
import os
from contextlib import suppress
from pathlib import Path

from quill.config.settings import DataConfig
from quill.data import hub, matching, sources, store
from quill.data.dataset import MANIFEST, Dataset
from quill.data.named_sources import NAMED
from quill.data.prepare import Observer, prepare, reporter
from quill.errors import CorruptError, NotFoundError
from quill.tokenizers import base


def ensure(
    config: DataConfig,
    root: Path,
    observer: Observer | None = None,
    tokenizer: base.Tokenizer | None = None,
) -> Dataset:
    """Return the dataset that a run's settings name, preparing it if it does not exist.

    A source without "/" is a prepared dataset, else a named source, else a file in the working directory. For
    a named source, a dataset of the same text and settings will do under any name.

    Args:
        config: The run's data settings.
        root: The data root.
        observer: Called with progress and notices.
        tokenizer: As for `prepare`.

    Raises:
        InputError: A dataset of that name was prepared with other settings.
        NotFoundError: There is no dataset, named source or file of that name.
    """
    given = [config.source] if isinstance(config.source, str) else config.source
    source = given[0] if len(given) == 1 else ""
    if not source or "/" in source or source == sources.STDIN or source.startswith(hub.PREFIX):
        return prepare(config, root, observer=observer, tokenizer=tokenizer)
    if os.path.lexists(root / source / MANIFEST):
        try:
            dataset = Dataset.open(root / source)
            dataset.verify(reporter(observer), again=False)
        except CorruptError:
            # A named source can be prepared again.
            if source not in NAMED:
                raise
        else:
            conflicts = matching.conflicts(config, dataset, tokenizer)
            if not conflicts:
                return dataset
            if source not in NAMED:
                raise matching.refuse(dataset, conflicts, config, tokenizer)
    elif not (source in NAMED or source in hub.NAMED or os.path.exists(source) or glob.has_magic(source)):
        have = ", ".join(d.name for d in store.datasets(root))
        raise NotFoundError(
            f"no dataset named '{source}' in {root}",
            why=f"datasets: {have or 'none'}; named sources: {', '.join((*NAMED, *hub.NAMED))}",
            hint="name one of them, or a text file",
        )
    if source in NAMED and (same := _same_text(source, config, root, observer, tokenizer)):
        return same
    return prepare(config, root, observer=observer, tokenizer=tokenizer)


def _same_text(
    source: str, config: DataConfig, root: Path, observer: Observer | None, tokenizer: base.Tokenizer | None
) -> Dataset | None:
    """Find a dataset that was made of a named text with these settings, wherever the text came from."""
    key = matching.key_of(matching.settings_of(config, tokenizer), NAMED[source].sha256)
    for dataset in store.datasets(root):
        if dataset.key == key:
            with suppress(CorruptError):
                dataset.verify(reporter(observer), again=False)
                return dataset
    return None

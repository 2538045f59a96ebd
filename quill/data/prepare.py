"""Text into a prepared dataset, once: text that was tokenized before is found again under any name.

Each split is encoded separately. The validation split is the end of the text, as nanoGPT does it, or of many
documents those that a hash of their content chooses.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from quill import fsio, naming, strictjson
from quill.config.settings import DataConfig
from quill.data import (
    duplicates,
    encode,
    locks,
    matching,
    named_sources,
    shards,
    sources,
    store,
    survey,
    unfinished,
)
from quill.data.dataset import SPLITS, TOKENIZER, Dataset
from quill.data.named_sources import NAMED, OnBytes
from quill.data.unfinished import Unfinished
from quill.errors import CorruptError, InputError, shorten
from quill.tokenizers import base
from quill.units import plural

# Bytes of the largest id.
_WIDEST = max(shards.WIDTHS.values())
_MOST_SHARDS = 9999
# Documents held out on average from which on a text is split by documents if nothing else is set.
_MANY = 10


@dataclass(frozen=True)
class Progress:
    """How far a stage is.

    Attributes:
        stage: receiving, downloading, verifying, comparing, reading, learning or encoding.
        done_bytes: Bytes of the source read so far.
        total_bytes: Bytes in total, where that is known.
    """

    stage: str
    done_bytes: int
    total_bytes: int | None


@dataclass(frozen=True)
class Notice:
    """A warning: the result differs from what was asked for."""

    message: str


Observer = Callable[[Progress | Notice], None]


def prepare(
    config: DataConfig,
    root: Path,
    *,
    name: str | None = None,
    force: bool = False,
    workers: int | None = None,
    observer: Observer | None = None,
    tokenizer: base.Tokenizer | None = None,
    shard: tuple[int, int] | None = None,
    apart: bool = False,
) -> Dataset:
    """Prepare a dataset, unless it exists.

    Args:
        config: The text and how to turn it into tokens.
        root: The data root.
        name: The dataset's name; None: made from the source, followed by the tokenizer if that is taken or
            `tokenizer` is given.
        force: Prepare it even if it exists, and replace another dataset of that name.
        workers: Threads that encode; None: one per processor.
        observer: Called with progress and notices.
        tokenizer: The tokenizer to encode with, such as a model's; None: made as the settings say.
        shard: Prepare only the second of eight shards of the text, for (2, 8), as the dataset NAME-2-of-8;
            see `merge`.
        apart: The source is the text of this shard alone, which may be empty; other shards have others.

    Returns:
        The dataset, new or not.

    Raises:
        InputError: The text or a setting does not allow it.
        NotFoundError: There is no such file.
        RefusedError: The name belongs to another dataset.
        ResourceError: Disk, permission or network.
    """
    settings = matching.settings_of(config, tokenizer)
    if shard is not None:
        if not 1 <= shard[0] <= shard[1] <= _MOST_SHARDS:
            raise InputError(
                f"shard {shard[0]}/{shard[1]} is out of range",
                why=f"shards go from 1/n to n/n, n <= {_MOST_SHARDS:,}",
            )
        settings[matching.SHARD] = f"{shard[0]}/{shard[1]}"
    if name is not None:
        name = naming.check(f"{name}{_suffix(shard)}", "dataset")
    for source in [config.source] if isinstance(config.source, str) else config.source:
        if source in NAMED:
            _restore(source, root)
    with (
        sources.find(
            config.source,
            root,
            encoding=config.encoding,
            text_field=config.text_field,
            on_bytes=reporter(observer),
        ) as text,
        ExitStack() as stack,
    ):
        preparation = _Preparation(
            text,
            settings,
            root,
            workers,
            observer,
            tokenizer,
            config.unknown or "error",
            shard,
            apart,
            config.split,
            stack,
        )
        stack.enter_context(locks.shared(root / (name or text.label)))
        return preparation.run(name, force=force)


def _suffix(shard: tuple[int, int] | None) -> str:
    return f"-{shard[0]}-of-{shard[1]}" if shard else ""


def _restore(source: str, root: Path) -> None:
    """Write a named text from any dataset of it, to save downloading it."""
    named = NAMED[source]
    path = named_sources.path_of(source, root)
    if named.file or os.path.lexists(path) or path.parent.is_symlink():
        return
    for dataset in store.datasets(root):
        if dataset.manifest["source"]["sha256"] == named.sha256:
            with suppress(CorruptError):
                splits = (dataset.train, dataset.val)
                text = "".join(dataset.tokenizer.decode(ids[:].tolist()) for ids in splits)
                # Not every tokenizer can spell every text.
                if hashlib.sha256(text.encode()).hexdigest() == named.sha256:
                    fsio.make_dir(path.parent)
                    fsio.write_bytes(path, text.encode())
                    return


def reporter(observer: Observer | None) -> OnBytes:
    """Return a callback that passes progress on to an observer."""

    def report(stage: str, done: int, total: int | None) -> None:
        if observer:
            observer(Progress(stage, done, total))

    return report


class _Preparation:
    """One text on its way to a dataset."""

    def __init__(
        self,
        text: sources.Text,
        settings: dict[str, Any],
        root: Path,
        workers: int | None,
        observer: Observer | None,
        tokenizer: base.Tokenizer | None,
        unknown: Literal["add", "skip", "error"],
        shard: tuple[int, int] | None,
        apart: bool,
        split: Literal["end", "documents"] | None,
        stack: ExitStack,
    ) -> None:
        self.text = text
        self.settings = settings
        self.root = root
        self.workers = workers
        self.observer = observer
        self.tokenizer = tokenizer
        self.kind = base.load(settings["tokenizer"])
        self.unknown = unknown
        self.skipped = ""
        self.shard = shard
        self.apart = apart
        # Each of its shards alone cannot know how many documents there are.
        self.split = "end" if apart and split is None else split
        self.stack = stack
        self.dropped: dict[str, Any] = {}

    def run(self, name: str | None, *, force: bool) -> Dataset:
        """Find the dataset, or make it under the first name that is free."""
        known = [] if force else store.datasets(self.root)
        stamp = self.text.stamp()
        surveyed = None
        same = next((d for d in known if self._is_stamped(d, stamp) and self._is_intact(d)), None)
        if same is None:
            self._drop_duplicates()
            surveyed = self._survey()
            self._handle_unknown(surveyed)
            key = self._key_of(self.settings, surveyed)
            same = self._find_same(known, key, surveyed)
        if same is not None:
            key = same.key
            self._take_split(same)
        there: Dataset | None
        if name is not None:
            name, there = self._choose([name], key, force=force)
        elif same is not None:
            name, there = same.name, same
        else:
            name, there = self._choose(self._names(key), key, force=False)
        if there and there.key == key and not force:
            if stamp and there.origin == self.text.origin and there.stamp != stamp:
                there.restamp(stamp)
            return there
        target = self.root / name
        fsio.make_dir(self.root)
        with (
            locks.shared(target),
            self._resumed(key, surveyed) as work,
            store.stage(target, key, replace=force or there is not None) as staged,
        ):
            if same:
                facts = store.link(staged, same)
            else:
                facts = self._build(staged, surveyed or self._survey(), work)
            if self.shard:
                facts["whole"] = self._key_of_whole(same, surveyed)
            facts["source"] |= {"whence": self.text.origin, "stamp": stamp, **self.text.facts()}
            if surveyed:
                facts["source"].pop("duplicates", None)  # Of another text that came to the same.
                facts["source"] |= self.dropped
            store.write_manifest(staged, key, self.settings, facts)
        return Dataset.open(target)

    def _find_same(self, known: Sequence[Dataset], key: str, surveyed: survey.Survey) -> Dataset | None:
        """Find a dataset of the text; one that exists keeps its split, unless another is set."""
        keys = [key]
        if self.split is None:
            keys.append(self._key_of(matching.without_split(self.settings), surveyed))
        equal = sorted((d for d in known if d.key in keys), key=lambda d: keys.index(d.key))
        return next(filter(self._is_intact, equal), None)

    def _take_split(self, same: Dataset) -> None:
        split = {k: v for k, v in same.settings.items() if k == matching.SPLIT}
        self.settings = {**matching.without_split(self.settings), **split}

    def _drop_duplicates(self) -> None:
        """Find the documents that repeat another one, and leave them out of every further reading."""
        how = self.settings.get("dedup")
        if how is None:
            return
        finding = duplicates.found(self.text, self.root, how, self.workers, reporter(self.observer))
        found = self.stack.enter_context(finding)
        self.text.dropped = found
        self.dropped["duplicates"] = {"documents": found.documents, "exact": found.exact, "near": found.near}
        if found.documents == 1 and self.observer:
            self.observer(
                Notice("there are no duplicates: the text is one document, as each plain text file is")
            )

    def _key_of_whole(self, same: Dataset | None, surveyed: survey.Survey | None) -> str | None:
        """Return the key of the dataset that a shard belongs to, if the whole text is known."""
        if self.apart:
            return None
        if surveyed is None:
            assert same is not None
            return str(same.manifest["whole"])
        settings = {k: v for k, v in self.settings.items() if k != matching.SHARD}
        return self._key_of(settings, surveyed)

    def _key_of(self, settings: Mapping[str, Any], surveyed: survey.Survey) -> str:
        return matching.key_of(settings, surveyed.sha256, surveyed.layout)

    def _resumed(self, key: str, surveyed: survey.Survey | None) -> AbstractContextManager[Unfinished | None]:
        """Open what an interrupted preparation left of a text that may fill more than one file."""
        # A token has at least one byte.
        if surveyed is None or surveyed.bytes * _WIDEST <= shards.SHARD_BYTES:
            return nullcontext()
        return unfinished.resumed(self.root, key, reporter(self.observer))

    def _build(self, staged: Path, surveyed: survey.Survey, work: Unfinished | None) -> dict[str, Any]:
        """Make the tokenizer, encode both splits and write them; return the manifest's facts about them."""
        tokenizer = self.tokenizer or self._make_tokenizer(surveyed)
        if work:
            work.begin(tokenizer.fingerprint)
        width = tokenizer.dtype.itemsize
        # A byte-pair token is about four bytes of text.
        needed = surveyed.characters if tokenizer.learns == "characters" else surveyed.bytes // 4
        done = sum(w.bytes for split in SPLITS for w in work.shards(split)) if work else 0
        of = self.shard[1] if self.shard and not self.apart else 1
        fsio.require_space(staged, needed * width // of - done, "the tokens")
        characters = self._characters(surveyed)
        reading: encode.Reading | encode.ReadingByDocument
        if matching.SPLIT in self.settings:
            reading = encode.ReadingByDocument(self.text, self.settings["val_fraction"], "encoding")
        else:
            reading = encode.Reading(self.text, characters["train"], "encoding")
        files: dict[str, dict[str, Any]] = {}
        splits: dict[str, dict[str, int]] = {}
        for split, chunks in (("train", reading.first()), ("val", reading.second())):
            kept = encode.without(chunks, self.skipped) if self.skipped else chunks
            try:
                written, splits[split] = self._encode(split, kept, tokenizer, staged, work, characters[split])
            except InputError:
                # The survey accepted this text, so what fails now is another text.
                self.text.require_unchanged()
                raise
            files |= {name: {"bytes": w.bytes, "sha256": w.sha256} for name, w in written.items()}
        if reading.sha256 != surveyed.sha256:
            raise sources.changed(self.text.names[0])
        raw = strictjson.encode(tokenizer.to_dict())
        sha256 = fsio.create(staged / TOKENIZER, [raw])
        files[TOKENIZER] = {"bytes": len(raw), "sha256": sha256}
        return {
            "source": {"documents": surveyed.documents, "bytes": surveyed.bytes, "sha256": surveyed.sha256},
            "tokenizer": {
                "kind": tokenizer.kind,
                "vocab_size": tokenizer.vocab_size,
                "sha256": tokenizer.fingerprint,
            },
            "dtype": tokenizer.dtype.name,
            "splits": splits,
            "files": files,
        }

    def _encode(
        self,
        split: str,
        chunks: Iterable[sources.Chunk],
        tokenizer: base.Tokenizer,
        staged: Path,
        work: Unfinished | None,
        characters: int,
    ) -> tuple[dict[str, shards.Written], dict[str, int]]:
        """Encode one split; return its files by name, and its counts."""
        extent = encode.Extent(start=work.position(split) if work else encode.Position())
        if self.shard and not self.apart:
            number, of = self.shard
            extent.first, extent.last = (characters * n // of for n in (number - 1, number))
        arrays = encode.encode(chunks, tokenizer, workers=self.workers, extent=extent)

        def note(shard: shards.Written, left: int) -> None:
            if work:
                self.text.require_unchanged()
                work.note(split, shard, extent.reached(left))

        done = work.shards(split) if work else []
        written = shards.write(work.folder if work else staged, staged, split, arrays, done, note)
        counts = {
            "tokens": sum(shard.tokens for shard in written.values()),
            "bytes": extent.bytes,
            "characters": extent.characters,
        }
        return written, counts

    def _make_tokenizer(self, surveyed: survey.Survey) -> base.Tokenizer:
        vocab_size, vocabulary = self.settings["vocab_size"], self.settings["vocabulary"]
        if self.kind.learns == "nothing" and vocab_size is None and vocabulary is None:
            # A copy stored with another dataset needs no network.
            for dataset in store.datasets(self.root):
                if dataset.kind == self.kind.kind:
                    with suppress(CorruptError):
                        return dataset.tokenizer
        texts: Any = [surveyed.alphabet]
        if self.kind.learns != "characters":
            texts = self._training_texts(surveyed.characters)
        tokenizer = self.kind.train(texts, vocab_size=vocab_size, vocabulary=vocabulary)
        if vocab_size and tokenizer.vocab_size < vocab_size and self.observer:
            self.observer(
                Notice(
                    f"the vocabulary has {tokenizer.vocab_size:,} tokens instead of {vocab_size:,}: "
                    "this text has no more to learn"
                )
            )
        return tokenizer

    def _training_texts(self, characters: int) -> Iterator[str]:
        """Read what the tokenizer learns from: the whole text, or an evenly spread share of it."""
        share = min(1.0, (self.kind.learn_chars or characters) / characters)
        tasks = encode.tasks(self.text.chunks("learning"), self.kind.boundary, joined=True)
        for i, task in enumerate(tasks):
            if int((i + 1) * share) > int(i * share):
                yield from (text for text in task if text is not None)

    def _survey(self) -> survey.Survey:
        """Read the text once, and refuse one that a model cannot learn from."""
        share = self.settings["val_fraction"]
        found = survey.survey(self.text, alphabet=self.kind.learns == "characters", share=share)
        if self.apart:
            return found
        if self.split is None and _can_split(found, share):
            self.settings = {**self.settings, matching.SPLIT: matching.DOCUMENTS}
        n, cut = found.characters, self._characters(found)["train"]
        hint = "name a longer text"
        if n == 0:
            fault = "is empty"
        elif found.blank:
            fault = "is blank"
        elif found.uniform:
            fault = "repeats one character"
        elif cut == 0:
            fault = "leaves nothing to train on"
        elif share and self.split == matching.DOCUMENTS and not found.held_out:
            fault, hint = "has no document to hold out", "set data.split=end"
        else:
            return found
        files = len(self.text.files)
        raise InputError(
            f"'{self.text.given[0]}' {fault}: {n:,} characters in {plural(files, 'file')}",
            why=f"with val_fraction {share} the training split has {cut:,}, "
            "and a model learns from at least two different characters",
            hint=hint,
        )

    def _handle_unknown(self, surveyed: survey.Survey) -> None:
        """Add the text's new characters to a given vocabulary, or leave them out, as the settings say."""
        vocabulary = self.settings["vocabulary"]
        if vocabulary is None or self.unknown == "error":
            return
        new = sorted(set(surveyed.alphabet).difference(vocabulary))
        if not new:
            return
        if self.unknown == "add":
            self.settings = {**self.settings, "vocabulary": [*vocabulary, *new]}
            self.tokenizer = self.kind.train([], vocabulary=[*vocabulary, *new])
            done = "added to the vocabulary"
        else:
            self.settings = {**self.settings, "unknown": "skip"}
            self.skipped = "".join(new)
            done = "skipped"
        if self.observer:
            characters = "1 new character is" if len(new) == 1 else f"{len(new):,} new characters are"
            self.observer(Notice(f"{characters} {done}: {shorten(''.join(new))}"))

    def _characters(self, surveyed: survey.Survey) -> dict[str, int]:
        """Characters of each split; at the end of a text as nanoGPT counts them: int(n * 0.9)."""
        if matching.SPLIT in self.settings:
            return {"train": surveyed.kept_characters, "val": surveyed.held_out_characters}
        cut = int(surveyed.characters * (1 - self.settings["val_fraction"]))
        return {"train": cut, "val": surveyed.characters - cut}

    def _is_stamped(self, dataset: Dataset, stamp: str | None) -> bool:
        wanted = self._wanted(dataset.key)
        return stamp is not None and dataset.stamp == stamp and wanted.matches(dataset.settings)

    def _is_intact(self, dataset: Dataset) -> bool:
        try:
            dataset.verify(reporter(self.observer), again=False)
        except CorruptError:
            return False
        return True

    def _names(self, key: str) -> list[str]:
        """Names to try, in order; the last one is free unless the dataset exists."""
        label, kind, end = self.text.label, self.settings["tokenizer"], _suffix(self.shard)
        suffixes = (f"{kind}{end}", f"{kind}-{key[:8]}{end}")
        # The text's own name does not stand for tokens of a vocabulary that is another model's.
        plain = [f"{label}{end}"] if self.tokenizer is None else []
        return [*plain, *(f"{label[: 63 - len(suffix)]}-{suffix}" for suffix in suffixes)]

    def _choose(self, names: Sequence[str], key: str, *, force: bool) -> tuple[str, Dataset | None]:
        on_bytes = reporter(self.observer)
        return matching.choose(self.root, names, self._wanted(key), force=force, on_bytes=on_bytes)

    def _wanted(self, key: str) -> matching.Wanted:
        return matching.Wanted(key, self.settings, self.text.origin, any_split=self.split is None)


def _can_split(surveyed: survey.Survey, share: float) -> bool:
    """Whether documents are so many that about the share of them is held out."""
    return surveyed.documents * share >= _MANY and 0 < surveyed.held_out < surveyed.documents

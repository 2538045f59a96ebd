"""Text into a prepared dataset, once: what was tokenized before, under whatever name, is found again.

A dataset is known by its key, a hash of the text and of the settings that make tokens of it. Split and
joined as nanoGPT does it: the validation split is the text's end, and each split is encoded by itself.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from quill import __version__, fsio, naming, strictjson
from quill.config.settings import DataConfig
from quill.data import build, named_sources, sources, survey
from quill.data.store import MANIFEST, SCHEMA_VERSION, Dataset, datasets
from quill.errors import CorruptError, InputError, NotFoundError, RefusedError
from quill.tokenizers import base

DEFAULT_TOKENIZER = "char"

_SETTINGS = ("tokenizer", "vocab_size", "vocabulary", "val_fraction", "encoding", "text_field")
# Of these the encoding and the field tell how to find the text, and the text's own hash tells the rest.
_KEYED = ("tokenizer", "vocab_size", "vocabulary", "val_fraction")
# Beside them, where a tokenizer was given that another text had taught: its fingerprint.
_GIVEN = "tokenizer_sha256"


@dataclass(frozen=True)
class Progress:
    """How far a stage is.

    Attributes:
        stage: receiving, downloading, reading, learning or encoding.
        done_bytes: Bytes of the source read so far.
        total_bytes: Bytes there are, where that is known.
    """

    stage: str
    done_bytes: int
    total_bytes: int | None


@dataclass(frozen=True)
class Notice:
    """Something that went otherwise than was asked for, and is worth knowing."""

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
) -> Dataset:
    """Make a dataset of a text, unless there is one.

    Args:
        config: The text and how it becomes tokens.
        root: The data root.
        name: What to call it; unset: after the text, with the tokenizer's name behind it where that is taken.
        force: Make it again even if there is one, and replace another of that name.
        workers: Threads that encode; unset: one for each processor.
        observer: Told of progress and of surprises.
        tokenizer: What to encode with, as a model's own; unset: one is made as the settings say.

    Returns:
        The dataset, which may have existed.

    Raises:
        InputError: The text or a setting does not allow it.
        NotFoundError: There is no such file.
        RefusedError: Another dataset has that name.
        ResourceError: Disk, permission or network.
    """
    if name is not None:
        naming.check(name, "dataset")
    settings = _settings(config, tokenizer)
    on_bytes = _on_bytes(observer)
    with sources.find(
        config.source, root, encoding=config.encoding, text_field=config.text_field, on_bytes=on_bytes
    ) as text:
        names = [name] if name else [text.label, _suffixed(text.label, settings["tokenizer"])]
        preparation = _Preparation(text, settings, root, workers, observer, tokenizer)
        return preparation.run(names, named=bool(name), force=force)


def ensure(
    config: DataConfig,
    root: Path,
    observer: Observer | None = None,
    tokenizer: base.Tokenizer | None = None,
) -> Dataset:
    """The dataset that a run's settings mean, prepared if it is not yet.

    A name without "/" is a prepared dataset, else a named source, else a file in the working directory.

    Args:
        config: The run's data settings.
        root: The data root.
        observer: Told of progress and of surprises.
        tokenizer: As for `prepare`.

    Raises:
        InputError: A dataset of that name was prepared with other settings.
        NotFoundError: Nothing of that name exists.
    """
    given = [config.source] if isinstance(config.source, str) else config.source
    source = given[0] if len(given) == 1 else ""
    is_name = bool(source) and "/" not in source and source != sources.STDIN
    if is_name and (root / source / MANIFEST).is_file():
        try:
            dataset = Dataset.open(root / source)
            differing = _differing(config, dataset, tokenizer)
            if not differing:
                return dataset
            if source not in named_sources.NAMED and tokenizer is not None:
                raise _other_tokenizer(dataset, tokenizer)
            if source not in named_sources.NAMED:
                raise _prepared_otherwise(source, differing, config)
        except CorruptError:
            # A named source can be had again, so it is.
            if source not in named_sources.NAMED:
                raise
    elif is_name and source not in named_sources.NAMED and not os.path.exists(source):
        have = [d.name for d in datasets(root)]
        raise NotFoundError(
            f"no dataset named '{source}' in {root}",
            why=f"there is {', '.join(have) or 'none prepared'}; "
            f"named sources are {', '.join(named_sources.NAMED)}",
            hint=f"quill prepare FILE --name {source}",
        )
    return prepare(config, root, observer=observer, tokenizer=tokenizer)


class _Preparation:
    """One text on its way to being a dataset."""

    def __init__(
        self,
        text: sources.Text,
        settings: dict[str, Any],
        root: Path,
        workers: int | None,
        observer: Observer | None,
        tokenizer: base.Tokenizer | None,
    ) -> None:
        self.text = text
        self.settings = settings
        self.root = root
        self.workers = workers
        self.observer = observer
        self.tokenizer = tokenizer
        self.kind = base.load(settings["tokenizer"])

    def run(self, names: Sequence[str], *, named: bool, force: bool) -> Dataset:
        """Find the dataset, or make it under the first of the names that is free for it."""
        known = [] if force else datasets(self.root)
        stamp = self.text.stamp()
        surveyed = None
        same = next((d for d in known if self._is_stamped(d, stamp)), None)
        if same is None:
            surveyed = self._survey()
            key = self._key(surveyed)
            same = next((d for d in known if d.key == key), None)
        else:
            key = same.key
        if named:
            name, there = self._choose(names, key, force=force)
        elif same:
            name, there = same.name, same
        else:
            last = _suffixed(names[0], f"{self.settings['tokenizer']}-{key[:8]}")
            name, there = self._choose([*names, last], key)
        if there and there.key == key and not force:
            self._restamp(there, stamp)
            return there
        with fsio.stage(self.root) as staged:
            facts = build.link(staged, same) if same else self._build(staged, surveyed)
            manifest = {
                "schema": SCHEMA_VERSION,
                "name": name,
                "key": key,
                "created": datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
                "quill": __version__,
                "settings": self.settings,
                **facts,
            }
            manifest["source"] |= {"given": list(self.text.given), "whence": self.text.whence, "stamp": stamp}
            fsio.write_json(staged / MANIFEST, manifest, durable=False)
            return self._publish(staged, self.root / name, key, replace=force or there is not None)

    def _build(self, staged: Path, surveyed: survey.Survey | None) -> dict[str, Any]:
        return build.build(
            staged,
            self.text,
            surveyed or self._survey(),
            self.settings,
            tokenizer=self.tokenizer,
            stored=datasets(self.root),
            workers=self.workers,
            notice=lambda message: self.observer(Notice(message)) if self.observer else None,
        )

    def _survey(self) -> survey.Survey:
        found = survey.survey(self.text, alphabet=self.kind.learns == "characters")
        n, what = found.characters, f"'{self.text.given[0]}'"
        cut = build.cut(n, self.settings["val_fraction"])
        if found.blank or found.uniform or cut == 0:
            said = "is empty" if n == 0 else "is blank" if found.blank else "holds one symbol"
            if n and not (found.blank or found.uniform):
                said = "leaves nothing to train on"
            raise InputError(
                f"{what} {said}: {n:,} characters in {len(self.text.files):,} "
                f"file{'s' if len(self.text.files) != 1 else ''}",
                why=f"with val_fraction {self.settings['val_fraction']} the training split has {cut:,}, "
                "and a model learns from at least two different characters",
                hint="name a longer text",
            )
        return found

    def _key(self, surveyed: survey.Survey) -> str:
        settings = {k: self.settings[k] for k in (*_KEYED, _GIVEN) if k in self.settings}
        made_of = {"schema": SCHEMA_VERSION, "text": surveyed.sha256, "layout": surveyed.layout, **settings}
        return hashlib.sha256(strictjson.canonical(made_of)).hexdigest()

    def _is_stamped(self, dataset: Dataset, stamp: str | None) -> bool:
        return (
            stamp is not None
            and dataset.manifest["source"].get("stamp") == stamp
            and dataset.settings == self.settings
        )

    def _restamp(self, dataset: Dataset, stamp: str | None) -> None:
        """Note that the files, touched but the same, need not be read the next time."""
        source = dataset.manifest["source"]
        if stamp and source.get("whence") == self.text.whence and source.get("stamp") != stamp:
            dataset.manifest = {**dataset.manifest, "source": {**source, "stamp": stamp}}
            fsio.write_json(dataset.path / MANIFEST, dataset.manifest)

    def _choose(self, names: Sequence[str], key: str, *, force: bool = False) -> tuple[str, Dataset | None]:
        """The first name that may be used, and the dataset that has it now.

        A name may be used that is free, or whose dataset is this one or an older state of it. What is damaged
        goes at once: nothing is lost with it, and asking for a dataset is asking for a whole one.
        """
        taken = RefusedError("no name is free")
        for name in names:
            path = self.root / name
            if not os.path.lexists(path):
                return name, None
            try:
                there = Dataset.open(path)
            except CorruptError:
                fsio.discard(path, self.root / fsio.TRASH)
                return name, None
            except NotFoundError:
                why, hint = "quill replaces only what it made", "choose another name: --name NAME"
                taken = RefusedError(f"'{path}' is there and is no dataset", why=why, hint=hint)
                continue
            whence = there.manifest["source"].get("whence")
            ours = whence is not None and whence == self.text.whence and there.settings == self.settings
            if there.key == key or ours or force:
                return name, there
            taken = RefusedError(
                f"a dataset named '{name}' exists already",
                why=_difference(there, self.settings) or "it was made of another text",
                hint="choose another --name, or replace it with --force",
            )
        raise taken

    def _publish(self, staged: Path, target: Path, key: str, *, replace: bool) -> Dataset:
        fsio.settle(staged)  # Before the old one goes, so that it is missed for no longer than two renames.
        if replace and os.path.lexists(target):
            fsio.discard(target, self.root / fsio.TRASH)
        try:
            fsio.publish(staged, target)
        except RefusedError:
            # Someone else was quicker; if it is the same dataset, that is all that was wanted.
            there = Dataset.open(target)
            if there.key != key:
                raise
            return there
        return Dataset.open(target)


def _settings(config: DataConfig, tokenizer: base.Tokenizer | None) -> dict[str, Any]:
    settings = {k: getattr(config, k) for k in _SETTINGS}
    if tokenizer is not None:
        settings["tokenizer"] = tokenizer.kind
        if tokenizer.learns == "text":
            settings |= {_GIVEN: tokenizer.fingerprint, "vocab_size": None}
    settings["tokenizer"] = settings["tokenizer"] or DEFAULT_TOKENIZER
    return settings


def _on_bytes(observer: Observer | None) -> named_sources.OnBytes | None:
    if observer is None:
        return None
    return lambda stage, done, total: observer(Progress(stage, done, total))


def _suffixed(label: str, suffix: str) -> str:
    return f"{label[: 63 - len(suffix)]}-{suffix}"


def _difference(dataset: Dataset, settings: Mapping[str, Any]) -> str:
    """Which settings an existing dataset was made with that differ from those asked for now."""
    was = dataset.settings
    return ", ".join(
        f"its {k} is {_short(was.get(k))}, not {_short(settings[k])}"
        for k in _SETTINGS
        if was.get(k) != settings[k]
    )


def _differing(
    config: DataConfig, dataset: Dataset, tokenizer: base.Tokenizer | None
) -> dict[str, tuple[Any, Any]]:
    """Settings that ask for something else than a dataset is; what is unset asks for nothing."""
    was = dataset.settings
    sizes = (was.get("vocab_size"), dataset.manifest["tokenizer"]["vocab_size"])
    found: dict[str, tuple[Any, Any]] = {}
    if tokenizer is not None:
        if dataset.tokenizer.fingerprint != tokenizer.fingerprint:
            found["tokenizer"] = (was["tokenizer"], tokenizer.kind)
    elif config.tokenizer not in (None, was["tokenizer"]):
        found["tokenizer"] = (was["tokenizer"], config.tokenizer)
    elif config.vocab_size is not None and config.vocab_size not in sizes:
        found["vocab_size"] = (sizes[1], config.vocab_size)
    elif config.vocabulary is not None and dataset.tokenizer.to_dict().get("vocabulary") != "".join(
        config.vocabulary
    ):
        found["vocabulary"] = (f"of {sizes[1]} characters", f"the one of {len(config.vocabulary)} given")
    default = DataConfig.model_fields["val_fraction"].default
    if config.val_fraction not in (default, was["val_fraction"]):
        found["val_fraction"] = (was["val_fraction"], config.val_fraction)
    return found


def _other_tokenizer(dataset: Dataset, wanted: base.Tokenizer) -> InputError:
    """The refusal to give a model tokens of another vocabulary than its own."""
    of = "other characters" if dataset.tokenizer.kind == wanted.kind == "char" else "another tokenizer"
    given = dataset.manifest["source"].get("given") or ["FILE"]
    return InputError(
        f"dataset '{dataset.name}' has {of} than the model that training starts from",
        why="its tokens mean something else to that model; it reads the text itself with its own tokenizer",
        hint=f"--data {given[0]}" if "/" in str(given[0]) else f"--data ./{given[0]}",
    )


def _prepared_otherwise(
    source: str, differing: Mapping[str, tuple[Any, Any]], config: DataConfig
) -> InputError:
    wanted = _suffixed(source, config.tokenizer or "2")
    flags = "".join(
        f" --{k.replace('_', '-')} {new}" for k, (_, new) in differing.items() if k != "vocabulary"
    )
    return InputError(
        f"dataset '{source}' was prepared otherwise",
        why=", ".join(f"its {k} is {old}, not {new}" for k, (old, new) in differing.items()),
        hint=f"quill prepare FILE --name {wanted}{flags}",
    )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "..."

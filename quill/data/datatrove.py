"""A step of a datatrove pipeline that writes a dataset: each task writes a shard, and `merge` joins them.

datatrove (extra `datatrove`) reads, filters and deduplicates text, and runs the tasks of a pipeline locally,
under Slurm or on Ray.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from quill import fsio
from quill.config import reading
from quill.config.settings import DataConfig
from quill.data.prepare import prepare
from quill.data.store import locate
from quill.errors import InputError
from quill.tokenizers import base

try:
    from datatrove.pipeline import base as pipeline  # type: ignore[import-untyped, import-not-found, unused-ignore]
except ImportError:
    raise InputError(
        "the step of a pipeline needs the datatrove package",
        why="datatrove runs the pipeline",
        hint="pip install 'quill-gpt[datatrove]'",
    ) from None


class QuillWriter(pipeline.PipelineStep):  # type: ignore[misc, unused-ignore]
    """Write the documents of each task as a shard of a dataset; the last step of a pipeline.

    After all tasks, `quill.merge(name)` or `quill prepare --merge NAME` makes them one dataset. The
    documents of a task are stored on disk until its shard is complete.

    Args:
        name: Name of the dataset.
        registry: Path of the registry, on a disk shared by all tasks; the dataset is stored next to it.
        tokenizer: gpt2, cl100k_base or o200k_base; the others learn from the text.
        workers: Threads that encode, in each task.
        force: Replace shards of the same names.
        **settings: Further fields of DataConfig, such as val_fraction=0.01.

    Raises:
        InputError: A setting is invalid.
    """

    name = "quill"
    type = "💽 - WRITER"

    def __init__(
        self,
        name: str,
        registry: str | PathLike[str],
        *,
        tokenizer: str = "gpt2",
        workers: int = 1,
        force: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__()
        self.dataset = name
        self.registry = fspath(registry)
        self.settings = {**settings, "tokenizer": tokenizer}
        self.workers = workers
        self.force = force
        reading.check(DataConfig, self.settings, origin="the arguments")
        if base.load(tokenizer).learns != "nothing":
            raise InputError(
                f"the tokenizer {tokenizer} learns from the text",
                why="each task sees only its own documents, and all need the same vocabulary",
                hint="set data.tokenizer=gpt2",
            )

    def run(self, data: Iterable[Any], rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """Write the documents of one task.

        Args:
            data: Documents.
            rank: The task, from 0.
            world_size: Number of tasks.

        Raises:
            RefusedError: The name of the shard belongs to another dataset.
            ResourceError: Disk or permission.
        """
        root = locate(Path(self.registry))
        fsio.make_dir(root)
        with fsio.scratch(root) as folder:
            path = folder / "text.jsonl"
            with fsio.guard(path, "write"):
                fsio.create(path, self._lines(data))
            settings = {**self.settings, "source": str(path), "text_field": "text"}
            with self.track_time("task"):
                prepare(
                    reading.check(DataConfig, settings, origin="the arguments"),
                    root,
                    name=self.dataset,
                    force=self.force,
                    workers=self.workers,
                    shard=(rank + 1, world_size),
                    apart=True,
                )
        yield from ()

    def _lines(self, data: Iterable[Any]) -> Iterator[bytes]:
        for document in data:
            self.stat_update("total")
            self.update_doc_stats(document)
            yield json.dumps({"text": document.text}).encode() + b"\n"

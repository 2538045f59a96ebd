"""Tensors that several processes write and read together, each its share, by torch.distributed.checkpoint.

Each process writes a safetensors file, whose header says which part of each tensor it has. A folder of such
files, or of one with whole tensors, is read by any number of processes.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from quill import fsio
from quill.errors import ResourceError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Layout(NamedTuple):
    """A tensor of a folder.

    Attributes:
        dtype: Its dtype.
        shape: Its whole shape.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]


def write(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors, in every process that has a share of them.

    Args:
        folder: Where to, in a place that `fsio.stage` gave; the same in all processes.
        tensors: By name; each a DTensor, or the same in all processes.

    Raises:
        ResourceError: The disk is too full.
        OSError: The disk of one of the processes failed or refused.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    fsio.require_space(folder, sum(t.numel() * t.itemsize for t in tensors.values()), f"'{folder.name}'")
    try:
        save(dict(tensors), storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except CheckpointException as e:
        _raise_cause(e)


def layout(folder: Path) -> dict[str, Layout]:
    """The tensors of a folder by name."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {
        name: Layout(t.properties.dtype, tuple(t.size))
        for name, t in found.items()
        if isinstance(t, TensorStorageMetadata)
    }


def read(folder: Path, tensors: dict[str, Any], *, together: bool = True) -> None:
    """Read tensors in place.

    Args:
        folder: The same in all processes.
        tensors: By name; DTensors get this process's share.
        together: Whether the other processes of the run read at the same time.

    Raises:
        ResourceError: A process cannot read them.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    with warnings.catch_warnings(), fsio.guard(folder, "read"):
        # That one process reads alone is meant.
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        try:
            load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=not together)
        except CheckpointException as e:
            _raise_cause(e)


def read_whole(folder: Path) -> dict[str, Tensor]:
    """Read all tensors of a folder in one process.

    Raises:
        ResourceError: They cannot be read.
    """
    import torch

    tensors = {n: torch.empty(t.shape, dtype=t.dtype) for n, t in layout(folder).items()}
    read(folder, tensors, together=False)
    return tensors


def _raise_cause(error: Any) -> NoReturn:
    """Raise what failed in the first of the processes in which something did."""
    rank, (cause, _) = min(error.failures.items())
    if isinstance(cause, OSError | RuntimeError):
        raise cause from error
    raise ResourceError(
        f"process {rank} of the run could not read or write its share of a resume state",
        why=str(cause).partition("\n")[0][:200],
        hint="put the registry and its data on a filesystem that all computers share",
    ) from error

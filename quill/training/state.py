"""What a resume state has besides tensors, and which tensors it must have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from quill.checkpoint.shards import Layout
from quill.errors import CorruptError, shorten

_Count = Annotated[int, Field(ge=0, le=2**31 - 1)]
_DType = Literal["float32", "bfloat16", "float16"]
_SHOWN = 3


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class Trained(_Part):
    """Where a trainer is. Defaults are for states of earlier versions."""

    step: _Count
    first: _Count = 0
    scale: Annotated[float, Field(gt=0)]
    good_steps: _Count
    # Earlier versions evaluated in float32.
    evaluates_in: _DType = "float32"


class Machine(_Part):
    """The choices of a device."""

    device: str
    dtype: _DType
    compiled: bool
    micro_batch_size: Annotated[int, Field(ge=1)] | None = None
    gradient_checkpointing: bool = False


class State(_Part):
    """Where a run is. Defaults are for states of earlier versions."""

    trainer: Trained
    machine: Machine | None = None
    best_val_loss: float | None
    best_step: _Count
    best_averaged: bool = False
    best_temperature: Annotated[float, Field(gt=0)] = 1.0
    bad_evaluations: _Count
    evaluated: bool = True
    seconds: Annotated[float, Field(ge=0)]
    id: str | None = None


def parse(info: dict[str, Any]) -> dict[str, Any]:
    """Check what a resume state says, and complete it.

    Raises:
        CorruptError: Something is missing or impossible.
    """
    try:
        return State.model_validate(info).model_dump()
    except ValidationError as e:
        first = e.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise CorruptError("state.json is not a run's", why=f"{where}: {first['msg'].lower()}") from None


def refuse_others(found: Mapping[str, Layout], wanted: Mapping[str, Layout]) -> None:
    """Check that tensors are those of the run.

    Args:
        found: The tensors of a resume state by name.
        wanted: Those that the run needs.

    Raises:
        CorruptError: One is missing, unknown, or has another dtype or shape; three are named.
    """
    wrong = [f"{name} is missing" for name in wanted if name not in found]
    wrong += [f"{shorten(name, 60)} is unknown" for name in found if name not in wanted]
    for name, layout in wanted.items():
        if name in found and (found[name].dtype, found[name].shape) != (layout.dtype, layout.shape):
            wrong.append(f"{name} is {found[name].dtype} of shape {tuple(found[name].shape)}")
    if wrong:
        more = f"; and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise CorruptError(
            "the resume state's tensors are not those of the run",
            why="; ".join(wrong[:_SHOWN]) + more,
            hint='pass resume="never" to start over',
        )

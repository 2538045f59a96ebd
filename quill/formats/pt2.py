"""torch.export's archive: a model that PyTorch runs, compiles and serves with none of quill's code.

`torch.export.load(path).module()(input_ids)` returns float32 logits for any batch size and any length up to
the context length. Format: https://docs.pytorch.org/docs/stable/export/pt2_archive.html. quill only exports
it, because reading one may run code from the file.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from quill import fsio, strictjson
from quill.checkpoint.precision import refuse_overflow
from quill.errors import CorruptError
from quill.formats import base

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.export import ExportedProgram

    from quill.checkpoint.load import Checkpoint
    from quill.model.gpt import GPT

# The archive's files other than the program, by their names in the extra_files of torch.export.load.
CONFIG, TOKENIZER = "config.json", "tokenizer.json"


class Pt2(base.Format):
    """A file of torch.export."""

    suffix: ClassVar[str] = ".pt2"
    dtypes: ClassVar[tuple[str, ...]] = ("float32", "bfloat16", "float16")
    runtime: ClassVar[str] = "torch.export"
    tolerance: ClassVar[Mapping[str, float]] = {"float32": 1e-4, "bfloat16": 0.1, "float16": 1e-2}

    def write(self, checkpoint: Checkpoint, path: Path, dtype: str) -> tuple[str, ...]:
        """Write the traced model, with its tokenizer and config in the same archive."""
        import torch

        refuse_overflow(checkpoint.model.state_dict(), dtype)
        program = _trace(checkpoint.model, getattr(torch, dtype))
        extra = {
            CONFIG: strictjson.dumps(checkpoint.config.to_dict()),
            TOKENIZER: strictjson.dumps(checkpoint.tokenizer.to_dict()),
        }

        size = sum(t.nbytes for t in program.state_dict.values())
        fsio.require_space(path.parent, size, f"'{path.name}'")
        with fsio.guard(path, "write"), _Sink(path, "w") as sink:
            torch.export.save(program, sink, extra_files=extra)
            if sink.error:
                raise sink.error
        if dtype != "float32":
            return (f"weights and arithmetic are {dtype}; the logits are float32",)
        return ()

    def logits(self, path: Path, idx: Tensor) -> Mapping[int, Tensor]:
        """What PyTorch makes of token ids, with the program from the archive."""
        import torch

        try:
            with open(path, "rb") as file:
                module = torch.export.load(file).module()
            with torch.inference_mode():
                logits: Tensor = module(idx)
        except Exception as e:
            # torch raises exceptions of many types for a damaged archive.
            reason = (str(e).strip().splitlines() or [type(e).__name__])[0][:300]
            raise CorruptError(f"torch.export cannot run '{path}'", why=reason) from e
        return dict(enumerate(logits[0]))


class _Sink(io.FileIO):
    """A file that records a failed write instead of raising it, at which torch's writer ends the process.

    Attributes:
        error: The first failure; nothing was written after it.
    """

    error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write all of it, or record why not."""
        view = memoryview(data).cast("B")
        at = 0
        while at < view.nbytes and self.error is None:
            try:
                at += super().write(view[at:]) or 0
            except OSError as e:
                self.error = e
        return view.nbytes


def _trace(model: GPT, dtype: torch.dtype) -> ExportedProgram:
    """Trace a model for any batch size and length; float32 weights are shared with it."""
    import torch
    from torch.export import Dim

    from quill.model.gpt import outline

    class Program(torch.nn.Module):
        # It has the model's modules as its own, so that the weights keep quill's names.
        def __init__(self, model: GPT) -> None:
            super().__init__()
            self._logits = model.forward
            for name, module in model.named_children():
                self.add_module(name, module)

        def forward(self, input_ids: Tensor) -> Tensor:
            return self._logits(input_ids).float()

    twin = outline(model.shape)
    twin.load_state_dict({n: t.detach().to(dtype) for n, t in model.state_dict().items()}, assign=True)
    twin.eval().requires_grad_(False)
    context = model.shape.block_size
    if twin.uses_rotations:
        # A table that exists already becomes a constant; one made while tracing is made in every call.
        twin.rotations()
    dynamic = {0: Dim("batch", min=1)}
    if context > 1:
        dynamic[1] = Dim("length", min=1, max=context)
    # torch.export treats a size of 1 as a constant.
    example = torch.zeros(2, min(context, 3), dtype=torch.long)
    program = torch.export.export(Program(twin).eval(), (example,), dynamic_shapes=(dynamic,))
    # They would be saved as a pickle, which nothing needs.
    program.example_inputs = None
    for node in program.graph.nodes:
        # The traces contain the paths of quill's source on this computer.
        node.meta.pop("stack_trace", None)
    return program

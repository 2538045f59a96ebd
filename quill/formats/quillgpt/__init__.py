"""QuillGPT's checkpoints, and those of AkashDataScience/nanogpt, which have the same names.

A `.pt` file contains a state dict and nothing else; the characters are in a separate JSON config. Each head
has its own query, key and value. Sources: https://github.com/NotShrirang/QuillGPT, core/layers/layers.py
and scripts/train_gpt.py; https://github.com/AkashDataScience/nanogpt, nanogpt.py.

The two differ in the name of the causal mask, `tril` and `trill`, and in the scale of attention scores:
QuillGPT divides by the root of a head's width, nanogpt by the root of the model's. The mask's name tells them
apart.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from quill import fsio
from quill.config import reading
from quill.config.settings import ModelConfig
from quill.errors import CorruptError, InputError, NotFoundError, shorten
from quill.formats import nanogpt
from quill.formats.base import Format, Incoming, LazyTensors, Supplied
from quill.formats.quillgpt.config import CONFIG, find_vocabulary
from quill.formats.torch_files.torch_file import Stored, TorchFile, save, unwrapped

if TYPE_CHECKING:
    from torch import Tensor

    from quill.checkpoint.load import Checkpoint
    from quill.config.shape import Shape
    from quill.tokenizers.base import Tokenizer

MARK = b"token_embedding_table.weight"
_MASK = re.compile(r"blocks\.\d{1,9}\.sa\.heads\.\d{1,9}\.(trill?)")
_HEAD = re.compile(r"blocks\.(\d{1,9})\.sa\.heads\.(\d{1,9})\.(?:query|key|value)\.weight")
_ENDINGS = (".pt", ".pth")
# In a Hugging Face folder, a .pt file is an optimizer's state or the like.
_OTHERS = (".safetensors", ".bin")
# QuillGPT's names and quill's, outside the layers and, for each block that it has, inside them.
_OUTSIDE = {
    "token_embedding_table.weight": "wte.weight",
    "position_embedding_table.weight": "wpe.weight",
    "ln_f.weight": "ln_f.weight",
    "ln_f.bias": "ln_f.bias",
    "lm_head.weight": "lm_head.weight",
    "lm_head.bias": "lm_head.bias",
}
_INSIDE = {
    "gpt2": {
        "sa.proj": "attn.c_proj",
        "ffwd.net.0": "mlp.c_fc",
        "ffwd.net.2": "mlp.c_proj",
        "ln1": "ln_1",
        "ln2": "ln_2",
    }
}
_PROJECTIONS = ("query", "key", "value")
# QuillGPT cannot evaluate a whole split.
_EVAL_ITERS = 200


class QuillGPT(Format):
    """A folder with NAME.pt and config.json, for QuillGPT's scripts and server."""

    suffix: ClassVar[str] = "-quillgpt"
    dtypes: ClassVar[tuple[str, ...]] = ("float32",)

    def refusal(self, shape: Shape, tokenizer: Tokenizer) -> str | None:
        """Why QuillGPT cannot represent a model, as a clause; None if it can."""
        if shape.block not in _INSIDE:
            return f"QuillGPT has no block {shape.block}, only {', '.join(_INSIDE)}"
        if shape.n_layer == 0:
            return "QuillGPT's bigram model is another program"
        if shape.activation != "relu":
            return f"QuillGPT's activation is relu, not {shape.activation}"
        if shape.qkv_bias:
            return "QuillGPT's query, key and value have no biases, so qkv_bias is false"
        if shape.head_size != shape.n_embd // shape.n_head:
            return f"QuillGPT's head_size is n_embd // n_head, not {shape.head_size}"
        if shape.mlp_size != 4 * shape.n_embd:
            return f"QuillGPT's mlp_size is 4 n_embd, not {shape.mlp_size}"
        if _mask(shape) is None:
            scales = "head_size ** -0.5 or, in AkashDataScience/nanogpt, n_embd ** -0.5"
            return f"QuillGPT's attention_scale is {scales}, not {shape.attention_scale:g}"
        if shape.norm_eps != 1e-5:
            return f"QuillGPT's norm_eps is 1e-5, not {shape.norm_eps:g}"
        if tokenizer.kind != "char":
            return f"QuillGPT's tokens are characters, not those of {tokenizer.kind}"
        return None

    def write(self, checkpoint: Checkpoint, path: Path, dtype: str) -> tuple[str, ...]:
        """Write the state dict, and the config with its sizes and its characters."""
        assert dtype in self.dtypes, dtype
        shape, tokenizer, run = checkpoint.model.shape, checkpoint.tokenizer, checkpoint.config.train
        weights = {n: t.detach() for n, t in checkpoint.model.state_dict().items()}
        notes = []
        if rows := shape.vocab_size - tokenizer.vocab_size:
            # Its server would sample a token that has no character, and answer with an error.
            for name in {"wte.weight", "lm_head.weight", "lm_head.bias"} & set(weights):
                weights[name] = weights[name][: tokenizer.vocab_size].clone()
            notes.append(f"{rows} rows without a character are left out.")
        if shape.tie_embeddings:
            notes.append(
                "QuillGPT's output head does not share the embedding's weights, so it has a copy of them."
            )
        if not (shape.bias and shape.head_bias):
            notes.append("QuillGPT has biases everywhere; those missing in the model are zeros.")
        mask = _mask(shape) or "tril"
        if mask == "trill":
            notes.append(
                "It has the attention_scale of AkashDataScience/nanogpt, and is written with its mask."
            )
        if shape.n_embd % shape.n_head:
            notes.append(
                f"QuillGPT refuses {shape.n_head} heads in {shape.n_embd} since November 2024; "
                "its revision bd407e3 loads them."
            )
        characters = tokenizer.to_dict()["vocabulary"]
        settings: dict[str, Any] = {
            "vocab_size": tokenizer.vocab_size,
            "batch_size": run.batch_size,
            "block_size": shape.block_size,
            "max_iters": run.max_iters,
            "eval_interval": run.eval_interval,
            "learning_rate": run.learning_rate,
            "eval_iters": run.eval_iters or _EVAL_ITERS,
            "n_embd": shape.n_embd,
            "n_head": shape.n_head,
            "n_layer": shape.n_layer,
            "dropout": shape.dropout,
            "encode": {c: i for i, c in enumerate(characters)},
            "decode": {str(i): c for i, c in enumerate(characters)},
        }
        with fsio.guard(path, "write"):
            path.mkdir()
        save(
            weights,
            dict(_their_tensors(weights, shape, mask)),
            path / f"{checkpoint.version.name or 'quill'}.pt",
        )
        # QuillGPT reads it in the encoding of the system, so it must be ASCII.
        text = json.dumps(settings, indent=4, allow_nan=False) + "\n"
        fsio.write_bytes(path / CONFIG, text.encode("ascii"), durable=False)
        return tuple(notes)

    def recognises(self, path: Path) -> bool:
        """Whether it is a torch file that is not nanoGPT's, or a folder with one such file."""
        if path.is_dir():
            with suppress(OSError):
                files = _files(path)
                if len(files) != 1 or any(f.suffix in _OTHERS for f in path.iterdir()):
                    return False
                path = files[0]
        return path.suffix in _ENDINGS and not nanogpt.NanoGPT().recognises(path)

    def read(self, path: Path, supplied: Supplied) -> Incoming:
        """Read a state dict and find its characters."""
        if path.is_dir():
            path = _only_file(path)
        file = TorchFile(path)
        stored, mask = _stored(file.value, path)
        settings = _settings(stored, mask, path)
        tokenizer, dropout, notes = find_vocabulary(path, settings, supplied, mask)
        if dropout is not None:
            settings["dropout"] = dropout
        model = reading.check(ModelConfig, settings, origin=f"the shape of {path}", error=CorruptError)
        weights = _our_tensors(file, stored, model.shape(), path)
        file.verify(stored)
        if mask == "trill":
            notes.append("Its attention scores are scaled by n_embd ** -0.5, as in AkashDataScience/nanogpt.")
        return Incoming(model, weights, tokenizer, {}, tuple(notes))


def _mask(shape: Shape) -> str | None:
    """What the causal mask is called in the project that has a model's attention scale."""
    if math.isclose(shape.attention_scale, shape.head_size**-0.5, rel_tol=1e-7):
        return "tril"
    return "trill" if math.isclose(shape.attention_scale, shape.n_embd**-0.5, rel_tol=1e-7) else None


def _their_tensors(weights: Mapping[str, Tensor], shape: Shape, mask: str) -> Iterator[tuple[str, Tensor]]:
    """A model by QuillGPT's names, in the order of its modules, with zeros for missing biases."""
    import torch

    inner, heads = shape.n_head * shape.head_size, shape.n_head
    triangle = torch.tril(torch.ones(shape.block_size, shape.block_size))
    yield "token_embedding_table.weight", weights["wte.weight"]
    yield "position_embedding_table.weight", weights["wpe.weight"]
    for i in range(shape.n_layer):
        # Rows of c_attn: all heads' queries, then all keys, then all values.
        fused = weights[f"h.{i}.attn.c_attn.weight"].view(3, heads, inner // heads, shape.n_embd)
        for h in range(heads):
            head = f"blocks.{i}.sa.heads.{h}"
            yield f"{head}.{mask}", triangle
            for name in ("key", "query", "value"):
                yield f"{head}.{name}.weight", fused[_PROJECTIONS.index(name), h].clone()
        for theirs, ours in _INSIDE[shape.block].items():
            yield from _with_bias(weights, f"blocks.{i}.{theirs}", f"h.{i}.{ours}")
    yield from _with_bias(weights, "ln_f", "ln_f")
    yield from _with_bias(weights, "lm_head", "wte" if shape.tie_embeddings else "lm_head")


def _with_bias(weights: Mapping[str, Tensor], theirs: str, ours: str) -> Iterator[tuple[str, Tensor]]:
    weight = weights[f"{ours}.weight"]
    bias = weights.get(f"{ours}.bias")
    yield f"{theirs}.weight", weight
    yield f"{theirs}.bias", weight.new_zeros(weight.shape[0]) if bias is None else bias


def _files(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if f.suffix in _ENDINGS and f.is_file())


def _only_file(folder: Path) -> Path:
    """The torch file of a folder.

    Raises:
        NotFoundError: There is none.
        InputError: There are several.
    """
    files = _files(folder)
    if not files:
        raise NotFoundError(f"no model in '{folder}'", why=f"no file in it ends in {' or '.join(_ENDINGS)}")
    if len(files) > 1:
        raise InputError(
            f"there are several models in '{folder}'",
            why=", ".join(f.name for f in files[:5]),
            hint=f"quill import {shlex.quote(str(files[0]))}",
        )
    return files[0]


def _stored(value: Any, path: Path) -> tuple[dict[str, Stored], str]:
    """The weights of a file without its masks, and what the masks are called."""
    stored: dict[str, Stored] = {}
    masks = set()
    for name, tensor in value.items() if isinstance(value, dict) else ():
        if not isinstance(name, str) or not isinstance(tensor, Stored):
            stored.clear()
            break
        name = unwrapped(name)
        if found := _MASK.fullmatch(name):
            masks.add(found[1])
        elif name in stored:
            raise _incomplete(path, f"it has two tensors for {shorten(name)}")
        else:
            stored[name] = tensor
    if MARK.decode() not in stored:
        raise InputError(
            f"'{path}' is not a model that quill imports",
            why="its tensors have neither QuillGPT's names nor nanoGPT's",
            hint="export it to a Hugging Face folder or GGUF, and import that",
        )
    if len(masks) != 1:
        raise _incomplete(
            path, "its masks are called both tril and trill" if masks else "it has no causal mask"
        )
    return stored, masks.pop()


def _settings(stored: Mapping[str, Stored], mask: str, path: Path) -> dict[str, Any]:
    """The settings that tensors show: all but the dropout and the characters."""

    def of(name: str) -> tuple[int, ...]:
        if name not in stored or len(stored[name].shape) != 2:
            raise _incomplete(path, f"it has no matrix {name}")
        return stored[name].shape

    (rows, width), (context, _) = of("token_embedding_table.weight"), of("position_embedding_table.weight")
    found = [(int(m[1]), int(m[2])) for name in stored if (m := _HEAD.fullmatch(name))]
    settings = {
        "block": "gpt2", "n_layer": len({i for i, _ in found}), "n_head": len({h for _, h in found}),
        "n_embd": width, "head_size": of("blocks.0.sa.heads.0.query.weight")[0], "block_size": context,
        "vocab_size": rows, "activation": "relu", "bias": True, "qkv_bias": False, "tie_embeddings": False,
        "head_bias": True,
    }  # fmt: skip
    if mask == "trill" and settings["head_size"] != width:
        settings["attention_scale"] = width**-0.5
    return settings


def _our_tensors(file: TorchFile, stored: Mapping[str, Stored], shape: Shape, path: Path) -> LazyTensors:
    """The model by quill's names; the heads of a layer are joined when they are looked up."""
    import torch

    left, makers = dict(stored), {}

    def rename(theirs: str, ours: str) -> None:
        if theirs in left:
            makers[ours] = partial(file.tensor, left.pop(theirs))

    def join(heads: list[Stored]) -> Tensor:
        return torch.cat([file.tensor(head) for head in heads])

    for theirs, ours in _OUTSIDE.items():
        rename(theirs, ours)
    for i in range(shape.n_layer):
        for theirs, ours in _INSIDE[shape.block].items():
            for kind in ("weight", "bias"):
                rename(f"blocks.{i}.{theirs}.{kind}", f"h.{i}.{ours}.{kind}")
        heads = []
        for projection in _PROJECTIONS:
            for h in range(shape.n_head):
                name = f"blocks.{i}.sa.heads.{h}.{projection}.weight"
                if name not in left:
                    raise _incomplete(path, f"{name} is missing")
                head = left.pop(name)
                if head.shape != (shape.head_size, shape.n_embd):
                    raise _incomplete(
                        path, f"{name} has shape {head.shape} instead of {(shape.head_size, shape.n_embd)}"
                    )
                heads.append(head)
        if len({head.dtype for head in heads}) > 1:
            raise _incomplete(path, f"layer {i} has heads of several dtypes")
        makers[f"h.{i}.attn.c_attn.weight"] = partial(join, heads)
    # The rest does not belong to this model. The import refuses it by name.
    makers |= {name: partial(file.tensor, s) for name, s in left.items()}
    return LazyTensors(makers)


def _incomplete(path: Path, why: str) -> CorruptError:
    return CorruptError(f"'{path}' is not a complete checkpoint of QuillGPT", why=why)

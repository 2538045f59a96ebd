"""QuillGPT's checkpoints, and those of AkashDataScience/nanogpt, which have its names.

A `.pt` file holds a state dict and nothing else; the characters are in a JSON config of its own. Each head
has its own query, key and value. Sources: https://github.com/NotShrirang/QuillGPT, core/layers/layers.py
and scripts/train_gpt.py; https://github.com/AkashDataScience/nanogpt, nanogpt.py.

The two differ in the name of the causal mask, `tril` and `trill`, and in the scale of attention scores: the
first divides by the root of a head's width, the second by the root of the model's. The mask's name tells.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from quill import fsio
from quill.config import reading
from quill.config.settings import ModelConfig
from quill.errors import CorruptError, InputError, NotFoundError
from quill.formats import nanogpt
from quill.formats.base import Format, Incoming, LazyTensors, Supplied
from quill.formats.quillgpt.config import CONFIG, find_vocabulary
from quill.formats.torch_files.torch_file import Stored, TorchFile, save

if TYPE_CHECKING:
    from torch import Tensor

    from quill.checkpoint.load import Checkpoint
    from quill.tokenizers.base import Tokenizer

MARK = b"token_embedding_table.weight"
_MASK = re.compile(r"blocks\.\d{1,9}\.sa\.heads\.\d{1,9}\.(trill?)")
_HEAD = re.compile(r"blocks\.(\d{1,9})\.sa\.heads\.(\d{1,9})\.(?:query|key|value)\.weight")
_ENDINGS = (".pt", ".pth")
# In a folder of Hugging Face a .pt is an optimizer's state or the like.
_OTHERS = (".safetensors", ".bin")
# Their names and quill's, for what is the same on both sides.
_OUTSIDE = {
    "token_embedding_table.weight": "wte.weight",
    "position_embedding_table.weight": "wpe.weight",
    "ln_f.weight": "ln_f.weight",
    "ln_f.bias": "ln_f.bias",
    "lm_head.weight": "lm_head.weight",
    "lm_head.bias": "lm_head.bias",
}
_INSIDE = {
    "sa.proj": "attn.c_proj",
    "ffwd.net.0": "mlp.c_fc",
    "ffwd.net.2": "mlp.c_proj",
    "ln1": "ln_1",
    "ln2": "ln_2",
}
_PARTS = ("query", "key", "value")
# What QuillGPT's configs have; it cannot evaluate a whole split.
_EVAL_ITERS = 200


class QuillGPT(Format):
    """A folder with NAME.pt and config.json, for QuillGPT's scripts and server."""

    suffix: ClassVar[str] = "-quillgpt"
    dtypes: ClassVar[tuple[str, ...]] = ("float32",)

    def refusal(self, config: ModelConfig, tokenizer: Tokenizer) -> str | None:
        """QuillGPT has one block; tokens are characters."""
        if config.block != "gpt2":
            return f"QuillGPT has no block {config.block}, only gpt2"
        if config.n_layer == 0:
            return "QuillGPT's bigram model is another program"
        if config.activation != "relu":
            return f"QuillGPT's activation is relu, not {config.activation}"
        if config.qkv_bias:
            return "QuillGPT's query, key and value have no biases"
        if config.head_size != config.n_embd // config.n_head:
            return f"QuillGPT's head_size is n_embd // n_head, not {config.head_size}"
        if config.mlp_size != 4 * config.n_embd:
            return f"QuillGPT's mlp_size is 4 n_embd, not {config.mlp_size}"
        if _mask(config) is None:
            scales = "head_size ** -0.5 or, as AkashDataScience/nanogpt has it, n_embd ** -0.5"
            return f"QuillGPT's attention_scale is {scales}, not {config.attention_scale:g}"
        if config.norm_eps != 1e-5:
            return f"QuillGPT's norm_eps is 1e-5, not {config.norm_eps:g}"
        if tokenizer.kind != "char":
            return f"QuillGPT's tokens are characters, not those of {tokenizer.kind}"
        return None

    def write(self, checkpoint: Checkpoint, path: Path, dtype: str) -> tuple[str, ...]:
        """Write the state dict and the config that holds its shape and its characters."""
        assert dtype in self.dtypes, dtype
        config, tokenizer, run = checkpoint.config.model, checkpoint.tokenizer, checkpoint.config.train
        file = path / f"{checkpoint.version.name or 'quill'}.pt"
        weights = {n: t.detach() for n, t in checkpoint.model.state_dict().items()}
        notes = []
        if rows := int(weights["wte.weight"].shape[0]) - tokenizer.vocab_size:
            # Its server would draw a token that has no character, and answer with an error.
            for name in {"wte.weight", "lm_head.weight", "lm_head.bias"} & set(weights):
                weights[name] = weights[name][: tokenizer.vocab_size].clone()
            notes.append(f"{rows} rows without a character are left out.")
        if config.tie_embeddings:
            notes.append("QuillGPT's output head has weights of its own: a copy of the embedding's.")
        if not (config.bias and config.head_bias):
            notes.append("QuillGPT has biases everywhere; those that the model has not are zeros.")
        mask = _mask(config) or "tril"
        if mask == "trill":
            notes.append("Its attention_scale is that of AkashDataScience/nanogpt, whose mask it has.")
        if config.n_embd % config.n_head:
            notes.append(
                f"QuillGPT refuses {config.n_head} heads in {config.n_embd} since November 2024; "
                "its revision bd407e3 loads them."
            )
        settings: dict[str, Any] = {
            "vocab_size": tokenizer.vocab_size,
            "batch_size": run.batch_size,
            "block_size": config.block_size,
            "max_iters": run.max_iters,
            "eval_interval": run.eval_interval,
            "learning_rate": run.learning_rate,
            "eval_iters": run.eval_iters or _EVAL_ITERS,
            "n_embd": config.n_embd,
            "n_head": config.n_head,
            "n_layer": config.n_layer,
            "dropout": config.dropout,
        }
        characters = tokenizer.to_dict()["vocabulary"]
        settings["encode"] = {c: i for i, c in enumerate(characters)}
        settings["decode"] = {str(i): c for i, c in enumerate(characters)}
        with fsio.guard(path, "write"):
            path.mkdir()
        theirs = dict(_their_tensors(weights, config, mask))
        save(weights, theirs, file)
        # Their readers take the encoding of the system, so nothing but ASCII may be in it.
        text = json.dumps(settings, indent=4, allow_nan=False) + "\n"
        fsio.write_bytes(path / CONFIG, text.encode("ascii"), durable=False)
        return tuple(notes)

    def recognises(self, path: Path) -> bool:
        """A file of torch.save that is not nanoGPT's, or a folder with one such file."""
        if path.is_dir():
            with suppress(OSError):
                files = _files(path)
                if len(files) != 1 or any(f.suffix in _OTHERS for f in path.iterdir()):
                    return False
                path = files[0]
        return path.suffix in _ENDINGS and not nanogpt.NanoGPT().recognises(path)

    def read(self, path: Path, supplied: Supplied) -> Incoming:
        """Read a state dict, and find its characters."""
        if path.is_dir():
            files = _files(path)
            if len(files) != 1:
                shown = ", ".join(f.name for f in files[:5]) or "none"
                why = f"one file that ends in {' or '.join(_ENDINGS)} is needed, there is {shown}"
                if not files:
                    raise NotFoundError(f"no model in '{path}'", why=why)
                raise InputError(f"which model in '{path}' is meant?", why=why, hint="give the file itself")
            path = files[0]
        checkpoint = TorchFile(path)
        stored, mask = _state(checkpoint.value, path)
        settings = _shape(stored, mask, path)
        tokenizer, dropout, notes = find_vocabulary(path, settings, supplied, mask)
        if dropout is not None:
            settings["dropout"] = dropout
        config = reading.check(ModelConfig, settings, origin=f"the shape of {path}", error=CorruptError)
        weights = _our_tensors(checkpoint, stored, config, path)
        checkpoint.verify(stored)
        if mask == "trill":
            notes.append(
                "Its attention scores are scaled by n_embd ** -0.5, as AkashDataScience/nanogpt does."
            )
        return Incoming(config, weights, tokenizer, {}, tuple(notes))


def _mask(config: ModelConfig) -> str | None:
    """What the causal mask is called in the project whose attention scale a model has."""
    scale, own = config.attention_scale, (config.head_size or 1) ** -0.5
    if scale is None or math.isclose(scale, own, rel_tol=1e-7):
        return "tril"
    return "trill" if math.isclose(scale, config.n_embd**-0.5, rel_tol=1e-7) else None


def _their_tensors(
    weights: Mapping[str, Tensor], config: ModelConfig, mask: str
) -> Iterator[tuple[str, Tensor]]:
    """A model by their names, in the order of their modules; what it has not is written as it acts."""
    import torch

    inner, width, heads = config.n_head * (config.head_size or 0), config.n_embd, config.n_head
    triangle = torch.tril(torch.ones(config.block_size, config.block_size))
    yield "token_embedding_table.weight", weights["wte.weight"]
    yield "position_embedding_table.weight", weights["wpe.weight"]
    for i in range(config.n_layer):
        # Rows of c_attn: all heads' queries, then all keys, then all values.
        fused = weights[f"h.{i}.attn.c_attn.weight"].view(3, heads, inner // heads, width)
        for h in range(heads):
            head = f"blocks.{i}.sa.heads.{h}"
            yield f"{head}.{mask}", triangle
            for part in ("key", "query", "value"):
                yield f"{head}.{part}.weight", fused[_PARTS.index(part), h].clone()
        for theirs, ours in _INSIDE.items():
            yield from _with_bias(weights, f"blocks.{i}.{theirs}", f"h.{i}.{ours}")
    yield from _with_bias(weights, "ln_f", "ln_f")
    yield from _with_bias(weights, "lm_head", "wte" if config.tie_embeddings else "lm_head")


def _with_bias(weights: Mapping[str, Tensor], theirs: str, ours: str) -> Iterator[tuple[str, Tensor]]:
    weight = weights[f"{ours}.weight"]
    bias = weights.get(f"{ours}.bias")
    yield f"{theirs}.weight", weight
    yield f"{theirs}.bias", weight.new_zeros(weight.shape[0]) if bias is None else bias


def _files(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if f.suffix in _ENDINGS and f.is_file())


def _state(value: Any, path: Path) -> tuple[dict[str, Stored], str]:
    """The weights of a file without its masks, and what those are called."""
    stored: dict[str, Stored] = {}
    masks = set()
    for name, tensor in value.items() if isinstance(value, dict) else ():
        if not isinstance(name, str) or not isinstance(tensor, Stored):
            stored.clear()
            break
        if found := _MASK.fullmatch(name):
            masks.add(found[1])
        else:
            stored[name] = tensor
    if MARK.decode() not in stored:
        raise InputError(
            f"'{path}' holds no model that quill knows",
            why="its names are neither QuillGPT's nor nanoGPT's",
            hint="quill import reads QuillGPT's and nanoGPT's own files, folders of Hugging Face, and GGUF",
        )
    if len(masks) != 1:
        why = "its masks are called both tril and trill" if masks else "it has no mask to tell whose it is"
        raise CorruptError(f"'{path}' is no whole checkpoint of QuillGPT", why=why)
    return stored, masks.pop()


def _shape(stored: Mapping[str, Stored], mask: str, path: Path) -> dict[str, Any]:
    """What tensors tell of a model: everything but its dropout and what its tokens mean."""

    def of(name: str) -> tuple[int, ...]:
        if name not in stored or len(stored[name].shape) != 2:
            raise CorruptError(f"'{path}' is no whole checkpoint of QuillGPT", why=f"it has no matrix {name}")
        return stored[name].shape

    (rows, width), (context, _) = of("token_embedding_table.weight"), of("position_embedding_table.weight")
    found = [(int(m[1]), int(m[2])) for name in stored if (m := _HEAD.fullmatch(name))]
    heads = len({h for _, h in found})
    settings = {
        "block": "gpt2", "n_layer": len({i for i, _ in found}), "n_head": heads, "n_embd": width,
        "head_size": of("blocks.0.sa.heads.0.query.weight")[0], "block_size": context, "vocab_size": rows,
        "activation": "relu", "bias": True, "qkv_bias": False, "tie_embeddings": False, "head_bias": True,
    }  # fmt: skip
    if mask == "trill" and settings["head_size"] != width:
        settings["attention_scale"] = width**-0.5
    return settings


def _our_tensors(
    checkpoint: TorchFile, stored: Mapping[str, Stored], config: ModelConfig, path: Path
) -> LazyTensors:
    """The model by quill's names; a layer's heads are put together when they are asked for."""
    left, makers = dict(stored), {}
    shape = (config.head_size, config.n_embd)

    def one(name: str, where: str) -> None:
        if name in left:
            makers[where] = partial(checkpoint.tensor, left.pop(name))

    def fused(parts: tuple[Stored, ...]) -> Tensor:
        import torch

        return torch.cat([checkpoint.tensor(part) for part in parts])

    for theirs, ours in _OUTSIDE.items():
        one(theirs, ours)
    for i in range(config.n_layer):
        for theirs, ours in _INSIDE.items():
            for kind in ("weight", "bias"):
                one(f"blocks.{i}.{theirs}.{kind}", f"h.{i}.{ours}.{kind}")
        parts = []
        for part in _PARTS:
            for h in range(config.n_head):
                name = f"blocks.{i}.sa.heads.{h}.{part}.weight"
                if name not in left or left[name].shape != shape:
                    found = f"{left[name].shape}, the first head's is {shape}" if name in left else "missing"
                    raise CorruptError(
                        f"'{path}' is no whole checkpoint of QuillGPT", why=f"{name} is {found}"
                    )
                parts.append(left.pop(name))
        if len({p.dtype for p in parts}) > 1:
            raise CorruptError(
                f"'{path}' is no whole checkpoint of QuillGPT", why=f"block {i} has heads of several types"
            )
        makers[f"h.{i}.attn.c_attn.weight"] = partial(fused, tuple(parts))
    # What is left is in no such model; it goes on under its own name, and is refused by it.
    makers |= {name: partial(checkpoint.tensor, s) for name, s in left.items()}
    return LazyTensors(makers)

"""nanoGPT's checkpoints: a folder with ckpt.pt, and meta.pkl where tokens are characters.

ckpt.pt contains {model, optimizer, model_args, iter_num, best_val_loss, config}; the names of its tensors are
GPT-2's with the prefix "transformer.". Its model is GPT-2's block with exact GELU, heads that divide the
width, a tied head, and biases everywhere or nowhere. Source: https://github.com/karpathy/nanoGPT, model.py,
train.py, sample.py.
"""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from quill import fsio
from quill.config import reading
from quill.config.settings import ModelConfig
from quill.errors import CorruptError, InputError, NotFoundError, shorten
from quill.formats import vocabulary
from quill.formats.base import Format, Incoming, LazyTensors, Supplied
from quill.formats.torch_files.torch_file import Stored, TorchFile, looks_like, save, unwrapped

if TYPE_CHECKING:
    from torch import Tensor

    from quill.checkpoint.load import Checkpoint
    from quill.config.settings import TrainConfig
    from quill.config.shape import Shape
    from quill.tokenizers.base import Tokenizer

FILE, META = "ckpt.pt", "meta.pkl"
MARK = b"transformer.wte.weight"
# The modules of a layer, in nanoGPT's order, for each block that it has.
_MODULES = {"gpt2": ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")}
# GPT-2's own vocabulary size, and the multiple of 64 above it that nanoGPT trains with.
_GPT2_ROWS = (50257, 50304)
_PREFIX = "transformer."
# Before PyTorch had fused attention, the causal mask was saved with the weights.
_MASK = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")
_LAYER = re.compile(r"h\.(\d{1,9})\.")
_NO_LOSS_YET = 1e9


class NanoGPT(Format):
    """A folder for nanoGPT's sample.py and train.py."""

    suffix: ClassVar[str] = "-nanogpt"
    dtypes: ClassVar[tuple[str, ...]] = ("float32",)

    def refusal(self, shape: Shape, tokenizer: Tokenizer) -> str | None:
        """Why nanoGPT cannot represent a model, as a clause; None if it can."""
        if shape.block not in _MODULES:
            return f"nanoGPT has no block {shape.block}, only {', '.join(_MODULES)}"
        if shape.n_layer == 0:
            return "nanoGPT has no bigram model"
        if shape.activation != "gelu":
            return f"nanoGPT's activation is the exact gelu, not {shape.activation}"
        if shape.head_size * shape.n_head != shape.n_embd:
            return f"nanoGPT's head_size is n_embd / n_head, not {shape.head_size}"
        if shape.mlp_size != 4 * shape.n_embd:
            return f"nanoGPT's mlp_size is 4 n_embd, not {shape.mlp_size}"
        if not shape.tie_embeddings:
            return "nanoGPT's output head shares the embedding's weights"
        if not math.isclose(shape.attention_scale, shape.head_size**-0.5, rel_tol=1e-7):
            return f"nanoGPT's attention_scale is head_size ** -0.5, not {shape.attention_scale:g}"
        if shape.norm_eps != 1e-5:
            return f"nanoGPT's norm_eps is 1e-5, not {shape.norm_eps:g}"
        if tokenizer.kind not in ("char", "gpt2"):
            return f"nanoGPT's tokens are characters or GPT-2's, not those of {tokenizer.kind}"
        return None

    def write(self, checkpoint: Checkpoint, path: Path, dtype: str) -> tuple[str, ...]:
        """Write ckpt.pt, which sample.py samples from and train.py resumes from, and meta.pkl."""
        assert dtype in self.dtypes, dtype
        shape, tokenizer = checkpoint.model.shape, checkpoint.tokenizer
        facts, name = checkpoint.version.facts, checkpoint.version.name or "quill"
        weights = {n: t.detach() for n, t in checkpoint.model.state_dict().items()}
        notes: list[str] = []
        biased = shape.bias or shape.qkv_bias
        if biased and not (shape.bias and shape.qkv_bias):
            notes.append("nanoGPT has biases everywhere or nowhere; those missing in the model are zeros.")
        rows = shape.vocab_size
        if tokenizer.kind == "char" and rows > tokenizer.vocab_size:
            # sample.py would sample a token that has no character, and fail.
            notes.append(f"{rows - tokenizer.vocab_size} rows without a character are left out.")
            rows = tokenizer.vocab_size
            weights["wte.weight"] = weights["wte.weight"][:rows].clone()
        modules = _MODULES[shape.block]
        model = {_PREFIX + n: t for n, t in _in_order(weights, modules, shape.n_layer, biased)}
        model["lm_head.weight"] = model["transformer.wte.weight"]
        best = facts["best_val_loss"]
        document = {
            "model": model,
            "optimizer": _fresh_optimizer(model, checkpoint.config.train),
            "model_args": {
                "n_layer": shape.n_layer,
                "n_head": shape.n_head,
                "n_embd": shape.n_embd,
                "block_size": shape.block_size,
                "bias": biased,
                "vocab_size": rows,
                "dropout": shape.dropout,
            },
            "iter_num": facts["steps"] or 0,
            "best_val_loss": _NO_LOSS_YET if best is None else best,
            "config": {"dataset": name, "tokenizer": tokenizer.kind},
        }
        with fsio.guard(path, "write"):
            path.mkdir()
        save(model, document, path / FILE)
        if tokenizer.kind == "char":
            meta = pickle.dumps(vocabulary.to_meta(tokenizer), protocol=4)
            fsio.write_bytes(path / META, meta, durable=False)
            notes.append(
                f"nanoGPT's sample.py reads the characters from data/{name}/{META} in its own folder: "
                f"copy {META} there."
            )
        notes.append("To resume, run train.py with --init_from=resume, a larger --max_iters and its data.")
        return tuple(notes)

    def recognises(self, path: Path) -> bool:
        """Whether it is a folder with ckpt.pt, or a torch file with nanoGPT's names."""
        if path.is_dir():
            path = path / FILE
        if path.suffix not in (".pt", ".pth") or not path.is_file():
            return False
        # A ckpt.pt that cannot be read is nanoGPT's too, so that `read` says what is wrong with it.
        named = path.name == FILE and not looks_like(path, b"token_embedding_table.weight")
        return named or looks_like(path, MARK)

    def read(self, path: Path, supplied: Supplied) -> Incoming:
        """Read a checkpoint and find its vocabulary."""
        if supplied.config:
            raise InputError(
                f"a config does not apply to '{path}'",
                why="a checkpoint of nanoGPT contains its own model_args",
                hint="import it without a config",
            )
        if path.is_dir():
            path = path / FILE
            if not path.exists():
                raise NotFoundError(f"no {FILE} in '{path.parent}'", why="nanoGPT saves its model in it")
        file = TorchFile(path)
        document = file.value
        if not isinstance(document, dict):
            raise _incomplete(path, "it is not a dict")
        stored = _stored(document.get("model"), path)
        tied = _is_tied(stored, file)
        model = _model(document.get("model_args"), stored, tied, path)
        assert model.vocab_size is not None
        run = document.get("config")
        tokenizer, notes = _tokenizer(path, run if isinstance(run, dict) else {}, supplied, model.vocab_size)
        if tied:
            stored.pop("lm_head.weight", None)
        else:
            notes.append(
                "Its output head does not share the embedding's weights, unlike nanoGPT's; both are kept."
            )
        file.verify(stored)
        if document.get("optimizer"):
            notes.append("The optimizer's state was not imported; fine-tuning starts with a fresh one.")
        weights = LazyTensors({n: partial(file.tensor, s) for n, s in stored.items()})
        return Incoming(model, weights, tokenizer, _facts(document, file), tuple(notes))


def write_size(path: Path, vocab_size: int) -> None:
    """Write a meta.pkl that tells train.py the size of a vocabulary and nothing else."""
    fsio.write_bytes(path, pickle.dumps({"vocab_size": vocab_size}, protocol=4), durable=False)


def _in_order(
    weights: Mapping[str, Tensor], modules: tuple[str, ...], n_layer: int, biased: bool
) -> Iterator[tuple[str, Tensor]]:
    """Tensors in the order of nanoGPT's modules, with zeros for a bias that only nanoGPT has."""
    for name in ("wte.weight", "wpe.weight"):
        yield name, weights[name]
    for module in [f"h.{i}.{m}" for i in range(n_layer) for m in modules] + ["ln_f"]:
        weight = weights[f"{module}.weight"]
        yield f"{module}.weight", weight
        if biased:
            bias = weights.get(f"{module}.bias")
            yield f"{module}.bias", weight.new_zeros(weight.shape[0]) if bias is None else bias


def _fresh_optimizer(model: Mapping[str, Tensor], run: TrainConfig) -> dict[str, Any]:
    """The state of an AdamW before its first step, in nanoGPT's groups: matrices decay, vectors do not."""
    import torch

    # The head is the embedding, and an optimizer has each parameter once.
    dimensions = [t.dim() for n, t in model.items() if n != "lm_head.weight"]
    groups = [
        {"params": [torch.nn.Parameter(torch.empty(0)) for d in dimensions if (d >= 2) == wide], **decay}
        for wide, decay in ((True, {"weight_decay": run.weight_decay}), (False, {"weight_decay": 0.0}))
    ]
    return torch.optim.AdamW(groups, lr=run.learning_rate, betas=(run.beta1, run.beta2)).state_dict()


def _stored(model: Any, path: Path) -> dict[str, Stored]:
    """The tensors of a checkpoint by quill's names, without the masks."""
    if not isinstance(model, dict) or not model:
        raise _incomplete(
            path,
            "it has no 'model' with the weights; a state dict alone does not say how many heads there are",
        )
    found: dict[str, Stored] = {}
    for name, value in model.items():
        if not isinstance(name, str) or not isinstance(value, Stored):
            raise _incomplete(path, "its 'model' contains something other than weights")
        ours = unwrapped(name).removeprefix(_PREFIX)
        if _MASK.fullmatch(ours) and (not value.shape or len(value.shape) == 4):
            continue
        if ours in found:
            raise _incomplete(path, f"it has two tensors for {shorten(ours)}")
        found[ours] = value
    return found


def _is_tied(stored: Mapping[str, Stored], file: TorchFile) -> bool:
    """Whether the head is the embedding: the same bytes, or equal ones."""
    head, table = stored.get("lm_head.weight"), stored.get("wte.weight")
    if head is None or table is None or head == table:
        return True
    if head.shape != table.shape or head.dtype != table.dtype:
        return False
    return bool((file.tensor(head) == file.tensor(table)).all())


def _model(arguments: Any, stored: Mapping[str, Stored], tied: bool, path: Path) -> ModelConfig:
    """The model's settings: from the tensors where they show them, else from model_args."""
    given = arguments if isinstance(arguments, dict) else {}

    def shape(name: str) -> tuple[int, ...]:
        if name not in stored or len(stored[name].shape) != 2:
            raise _incomplete(path, f"it has no matrix {name}")
        return stored[name].shape

    (rows, width), (context, _) = shape("wte.weight"), shape("wpe.weight")
    layers = {int(m[1]) for name in stored if (m := _LAYER.match(name))}
    shown = {
        "n_layer": len(layers), "n_embd": width, "block_size": context, "vocab_size": rows,
        "bias": "ln_f.bias" in stored,
    }  # fmt: skip
    for name, value in shown.items():
        if name in given and given[name] != value:
            why = f"model_args have {name} {shorten(given[name])}, its tensors {value}"
            raise CorruptError(f"'{path}' contradicts itself", why=why)
    if "n_head" not in given:
        raise _incomplete(path, "its model_args have no n_head")
    settings = {
        **shown,
        "block": "gpt2",
        "n_head": given["n_head"],
        "dropout": given.get("dropout", 0.0),
        "activation": "gelu",
        "tie_embeddings": tied,
    }
    return reading.check(ModelConfig, settings, origin=f"model_args of {path}", error=CorruptError)


def _tokenizer(
    path: Path, run: Mapping[Any, Any], supplied: Supplied, rows: int
) -> tuple[Tokenizer, list[str]]:
    """The vocabulary: supplied, else from a meta.pkl near the checkpoint, else GPT-2's."""
    if supplied.tokenizer:
        return vocabulary.given(supplied.tokenizer, rows), []
    others: list[str] = []
    for place in _places(path.parent, run.get("dataset")):
        try:
            tokenizer = vocabulary.from_meta(place)
        except FileNotFoundError:
            continue
        shown = vocabulary.relative(place, path)
        if tokenizer.vocab_size == rows:
            return tokenizer, [f"Its characters are those of {shown}."]
        others.append(f"{shown} has {tokenizer.vocab_size:,} characters")
    if rows in _GPT2_ROWS or (run.get("tokenizer") == "gpt2" and rows >= _GPT2_ROWS[0]):
        notes = [
            f"{other}, the model {rows:,} tokens: it is from another run, and unused." for other in others
        ]
        return vocabulary.published_tokenizer("gpt2"), notes
    others = others or [f"no {META} is next to it or with its data"]
    raise InputError(
        f"the vocabulary of '{path}' is missing",
        why=f"it has {rows:,} tokens, GPT-2 has {_GPT2_ROWS[0]:,}, and {'; '.join(others)}",
        hint=vocabulary.hint(path),
    )


def _places(folder: Path, dataset: Any) -> Iterator[Path]:
    yield folder / META
    # The name comes from the file: it may lead to folders inside the data folder, and nowhere else.
    if isinstance(dataset, str) and re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)*", dataset):
        for data in (folder.absolute().parent / "data", Path("data")):
            yield data / dataset / META


def _facts(document: Mapping[Any, Any], file: TorchFile) -> dict[str, Any]:
    steps, loss = document.get("iter_num"), document.get("best_val_loss")
    if isinstance(loss, Stored) and loss.numel == 1:
        loss = file.tensor(loss).item()
    facts: dict[str, Any] = {}
    if type(steps) is int and steps >= 0:
        facts["steps"] = steps
    # NaN fails both comparisons.
    if isinstance(loss, float) and 0 <= loss < _NO_LOSS_YET:
        facts["best_val_loss"] = loss
    return facts


def _incomplete(path: Path, why: str) -> CorruptError:
    return CorruptError(f"'{path}' is not a checkpoint of nanoGPT", why=why)

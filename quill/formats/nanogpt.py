"""nanoGPT's checkpoints: a folder with ckpt.pt, and meta.pkl where tokens are characters.

ckpt.pt holds {model, optimizer, model_args, iter_num, best_val_loss, config}; its names are GPT-2's with the
prefix "transformer.". Its model is GPT-2's block with exact GELU, heads that divide the width, a tied head,
and biases everywhere or nowhere. Source: https://github.com/karpathy/nanoGPT, model.py, train.py, sample.py.
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
from quill.errors import CorruptError, InputError, NotFoundError
from quill.formats import vocabulary
from quill.formats.base import Format, Incoming, LazyTensors, Supplied
from quill.formats.torch_files.torch_file import Stored, TorchFile, looks_like, save

if TYPE_CHECKING:
    from torch import Tensor

    from quill.checkpoint.load import Checkpoint
    from quill.tokenizers.base import Tokenizer

FILE, META = "ckpt.pt", "meta.pkl"
MARK = b"transformer.wte.weight"
# GPT-2's own size, and the multiple of 64 above it that nanoGPT trains with.
_GPT2_ROWS = (50257, 50304)
_COMPILED = "_orig_mod."
_PREFIX = "transformer."
# Before PyTorch had fused attention the causal mask was kept with the weights.
_MASK = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")
_LAYER = re.compile(r"h\.(\d{1,9})\.")
_NO_LOSS_YET = 1e9


class NanoGPT(Format):
    """A folder for nanoGPT's sample.py and train.py."""

    suffix: ClassVar[str] = "-nanogpt"
    dtypes: ClassVar[tuple[str, ...]] = ("float32",)

    def refusal(self, config: ModelConfig, tokenizer: Tokenizer) -> str | None:
        """nanoGPT has one block; tokens are characters or GPT-2's."""
        if config.block != "gpt2":
            return f"nanoGPT has no block {config.block}, only gpt2"
        if config.n_layer == 0:
            return "nanoGPT has no bigram model"
        if config.activation != "gelu":
            return f"nanoGPT's activation is the exact gelu, not {config.activation}"
        if (config.head_size or 0) * config.n_head != config.n_embd:
            return f"nanoGPT's head_size is n_embd / n_head, not {config.head_size}"
        if config.mlp_size != 4 * config.n_embd:
            return f"nanoGPT's mlp_size is 4 n_embd, not {config.mlp_size}"
        if not config.tie_embeddings:
            return "nanoGPT's output head shares the embedding's weights"
        if config.attention_scale is not None and not math.isclose(
            config.attention_scale, (config.head_size or 1) ** -0.5, rel_tol=1e-7
        ):
            return f"nanoGPT's attention_scale is head_size ** -0.5, not {config.attention_scale:g}"
        if config.norm_eps != 1e-5:
            return f"nanoGPT's norm_eps is 1e-5, not {config.norm_eps:g}"
        if tokenizer.kind not in ("char", "gpt2"):
            return f"nanoGPT's tokens are characters or GPT-2's, not those of {tokenizer.kind}"
        return None

    def write(self, checkpoint: Checkpoint, path: Path, dtype: str) -> tuple[str, ...]:
        """Write ckpt.pt, which sample.py draws from and train.py resumes from, and meta.pkl."""
        assert dtype in self.dtypes, dtype
        config, tokenizer, run = checkpoint.config.model, checkpoint.tokenizer, checkpoint.config.train
        manifest, name = checkpoint.manifest or {}, checkpoint.version.name or "quill"
        weights = {n: t.detach() for n, t in checkpoint.model.state_dict().items()}
        notes: list[str] = []
        biased = bool(config.bias or config.qkv_bias)
        if biased and not (config.bias and config.qkv_bias):
            notes.append("nanoGPT has biases everywhere or nowhere; those that the model has not are zeros.")
        rows = int(weights["wte.weight"].shape[0])
        if tokenizer.kind == "char" and rows > tokenizer.vocab_size:
            # sample.py would draw a token that has no character, and end.
            weights["wte.weight"] = weights["wte.weight"][: tokenizer.vocab_size].clone()
            notes.append(f"{rows - tokenizer.vocab_size} rows without a character are left out.")
        model = {_PREFIX + n: t for n, t in _in_order(weights, config.n_layer, biased)}
        model["lm_head.weight"] = model["transformer.wte.weight"]
        groups = [[t for n, t in model.items() if (t.dim() >= 2) == wide] for wide in (True, False)]
        # The head is the embedding: an optimizer has it once.
        counts = (len(groups[0]) - 1, len(groups[1]))
        best = manifest.get("best_val_loss")
        document = {
            "model": model,
            "optimizer": _fresh_optimizer(
                counts, run.learning_rate, (run.beta1, run.beta2), run.weight_decay
            ),
            "model_args": {
                "n_layer": config.n_layer,
                "n_head": config.n_head,
                "n_embd": config.n_embd,
                "block_size": config.block_size,
                "bias": biased,
                "vocab_size": int(model["lm_head.weight"].shape[0]),
                "dropout": config.dropout,
            },
            "iter_num": manifest.get("steps") or 0,
            "best_val_loss": _NO_LOSS_YET if best is None else best,
            "config": {"dataset": name, "tokenizer": tokenizer.kind},
        }
        with fsio.guard(path, "write"):
            path.mkdir()
        save(model, document, path / FILE)
        if tokenizer.kind == "char":
            meta = pickle.dumps(vocabulary.meta(tokenizer), protocol=4)
            fsio.write_bytes(path / META, meta, durable=False)
            notes.append(
                f"nanoGPT's sample.py looks for the characters in data/{name}/{META} of its own folder: "
                f"copy {META} there."
            )
        notes.append(
            "To go on training, give train.py --init_from=resume, a larger --max_iters and its data."
        )
        return tuple(notes)

    def recognises(self, path: Path) -> bool:
        """A folder with ckpt.pt, or a file of torch.save with nanoGPT's names."""
        if path.is_dir():
            path = path / FILE
        if path.suffix not in (".pt", ".pth") or not path.is_file():
            return False
        # A ckpt.pt that cannot be looked into is nanoGPT's all the same, and `read` says what is wrong.
        named = path.name == FILE and not looks_like(path, b"token_embedding_table.weight")
        return named or looks_like(path, MARK)

    def read(self, path: Path, supplied: Supplied) -> Incoming:
        """Read a checkpoint and find its vocabulary."""
        if supplied.config:
            raise InputError(
                f"--config does not apply to '{path}'",
                why="a checkpoint of nanoGPT holds its own model_args",
                hint="leave --config out",
            )
        if path.is_dir():
            path = path / FILE
            if not path.exists():
                raise NotFoundError(f"no {FILE} in '{path.parent}'", why="nanoGPT keeps its model in it")
        checkpoint = TorchFile(path)
        document = checkpoint.value
        if not isinstance(document, dict):
            raise CorruptError(f"'{path}' is no checkpoint of nanoGPT", why="it holds no dict")
        stored = _by_our_names(document.get("model"), path)
        tied = _is_tied(stored, checkpoint)
        config = _config(document.get("model_args"), stored, tied, path)
        config_beside = document.get("config")
        tokenizer, notes = _tokenizer(
            path, config_beside if isinstance(config_beside, dict) else {}, supplied, config.vocab_size or 0
        )
        if tied:
            stored.pop("lm_head.weight", None)
        else:
            notes.append("Its output head has weights of its own, which nanoGPT's never has; they are kept.")
        checkpoint.verify(stored)
        if document.get("optimizer"):
            notes.append("The optimizer's state is left behind; fine-tuning starts with a fresh one.")
        weights = LazyTensors({n: partial(checkpoint.tensor, s) for n, s in stored.items()})
        return Incoming(config, weights, tokenizer, _facts(document, checkpoint), tuple(notes))


def _in_order(weights: Mapping[str, Tensor], n_layer: int, biased: bool) -> Iterator[tuple[str, Tensor]]:
    """Quill's tensors in the order of nanoGPT's modules; a bias that is missing where it has one is zeros."""
    inside = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    modules = [f"h.{i}.{m}" for i in range(n_layer) for m in inside] + ["ln_f"]
    for name in ("wte.weight", "wpe.weight"):
        yield name, weights[name]
    for module in modules:
        weight = weights[f"{module}.weight"]
        yield f"{module}.weight", weight
        if biased:
            bias = weights.get(f"{module}.bias")
            yield f"{module}.bias", weight.new_zeros(weight.shape[0]) if bias is None else bias


def _fresh_optimizer(
    counts: tuple[int, int], rate: float, betas: tuple[float, float], decay: float
) -> dict[str, Any]:
    """The state of an AdamW before its first step, in nanoGPT's groups: matrices decay, vectors do not."""
    import torch

    groups = [
        {"params": [torch.nn.Parameter(torch.empty(0)) for _ in range(n)], "weight_decay": d}
        for n, d in zip(counts, (decay, 0.0), strict=True)
    ]
    return torch.optim.AdamW(groups, lr=rate, betas=betas).state_dict()


def _by_our_names(model: Any, path: Path) -> dict[str, Stored]:
    if not isinstance(model, dict) or not model:
        raise CorruptError(
            f"'{path}' is no checkpoint of nanoGPT",
            why="it has no 'model' with the weights",
            hint="a file that holds weights alone lacks the number of heads: keep the whole checkpoint",
        )
    found: dict[str, Stored] = {}
    for name, value in model.items():
        if not isinstance(name, str) or not isinstance(value, Stored):
            raise CorruptError(
                f"'{path}' is no checkpoint of nanoGPT", why="its 'model' holds more than weights"
            )
        name = name.removeprefix(_COMPILED).removeprefix(_PREFIX)
        if _MASK.fullmatch(name) and (not value.shape or len(value.shape) == 4):
            continue
        found[name] = value
    return found


def _is_tied(stored: Mapping[str, Stored], checkpoint: TorchFile) -> bool:
    """Whether the head is the embedding: the same bytes, or equal ones."""
    head, table = stored.get("lm_head.weight"), stored.get("wte.weight")
    if head is None or table is None or head == table:
        return True
    if head.shape != table.shape or head.dtype != table.dtype:
        return False
    return bool((checkpoint.tensor(head) == checkpoint.tensor(table)).all())


def _config(arguments: Any, stored: Mapping[str, Stored], tied: bool, path: Path) -> ModelConfig:
    """The shape: what tensors tell is taken from them, the rest from model_args."""
    given = arguments if isinstance(arguments, dict) else {}

    def shape(name: str) -> tuple[int, ...]:
        if name not in stored or len(stored[name].shape) != 2:
            raise CorruptError(f"'{path}' is no checkpoint of nanoGPT", why=f"it has no matrix {name}")
        return stored[name].shape

    (rows, width), (context, _) = shape("wte.weight"), shape("wpe.weight")
    layers = {int(m[1]) for name in stored if (m := _LAYER.match(name))}
    told = {
        "n_layer": len(layers), "n_embd": width, "block_size": context, "vocab_size": rows,
        "bias": "ln_f.bias" in stored,
    }  # fmt: skip
    for name, value in told.items():
        if name in given and given[name] != value:
            why = f"model_args say {name} {_short(given[name])}, its tensors {value}"
            raise CorruptError(f"'{path}' does not fit itself", why=why)
    if "n_head" not in given:
        raise CorruptError(f"'{path}' is no checkpoint of nanoGPT", why="its model_args have no n_head")
    settings = {
        **told,
        "block": "gpt2",
        "n_head": given["n_head"],
        "dropout": given.get("dropout", 0.0),
        "activation": "gelu",
        "tie_embeddings": tied,
    }
    return reading.check(ModelConfig, settings, origin=f"model_args of {path}", error=CorruptError)


def _tokenizer(
    path: Path, config: Mapping[Any, Any], supplied: Supplied, rows: int
) -> tuple[Tokenizer, list[str]]:
    """The vocabulary: what was given, else meta.pkl beside the checkpoint or with its data, else GPT-2's."""
    if supplied.tokenizer:
        return vocabulary.given(supplied.tokenizer, rows), []
    others: list[str] = []
    for place in _places(path.parent, config.get("dataset")):
        try:
            tokenizer = vocabulary.from_meta(place)
        except FileNotFoundError:
            continue
        found = vocabulary.shown(place, path)
        if tokenizer.vocab_size == rows:
            return tokenizer, [f"Its characters are those of {found}."]
        others.append(f"{found} has {tokenizer.vocab_size:,} characters")
    notes = [f"{other}, the model {rows:,} tokens: it is of another run, and left out." for other in others]
    named = config.get("tokenizer") == "gpt2" and rows >= _GPT2_ROWS[0]
    if named or rows in _GPT2_ROWS:
        return vocabulary.published_tokenizer("gpt2"), notes
    others = others or [f"there is no {META} beside it or with its data"]
    raise InputError(
        f"the vocabulary of '{path}' is missing",
        why=f"it has {rows:,} tokens, which is not GPT-2's number, and {'; '.join(others)}",
        hint=f"--tokenizer {META}, or --tokenizer TEXT for the text that it was trained on",
    )


def _places(folder: Path, dataset: Any) -> Iterator[Path]:
    yield folder / META
    # The name comes out of the file: it may lead down from the data's folder, and nowhere else.
    if isinstance(dataset, str) and re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)*", dataset):
        for data in (folder.absolute().parent / "data", Path("data")):
            yield data / dataset / META


def _facts(document: Mapping[Any, Any], checkpoint: TorchFile) -> dict[str, Any]:
    steps, loss = document.get("iter_num"), document.get("best_val_loss")
    if isinstance(loss, Stored) and loss.numel == 1:
        loss = checkpoint.tensor(loss).item()
    facts: dict[str, Any] = {}
    if type(steps) is int and steps >= 0:
        facts["steps"] = steps
    if isinstance(loss, float) and 0 <= loss < _NO_LOSS_YET:
        facts["best_val_loss"] = loss
    return facts


def _short(value: object) -> str:
    shown = ascii(value)
    return shown if len(shown) <= 40 else shown[:37] + "..."

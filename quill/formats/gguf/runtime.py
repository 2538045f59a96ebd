"""Runs a GGUF file in llama.cpp, by whichever binding is installed.

xllamacpp is llama.cpp's own server inside this process, prebuilt. It reports probabilities of the token after
a prompt, so each position needs its own prompt. llama-cpp-python reports all logits.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quill.errors import CorruptError
from quill.formats import base
from quill.formats.tokenizer_json.byte_level import unspell

if TYPE_CHECKING:
    from torch import Tensor

# Prompts that one comparison runs at most.
_MOST_PROMPTS = 24


def log_probabilities(path: Path, ids: Sequence[int]) -> dict[int, Tensor]:
    """Log probabilities of the next token at some positions, up to a constant each.

    Args:
        path: The file.
        ids: Token ids, at most the context length.

    Returns:
        By position. xllamacpp needs room for the token that it generates, so the last position of a full
        context is missing; of long prompts it runs the first and last positions.

    Raises:
        InputError: No binding is installed.
        CorruptError: llama.cpp cannot load the file.
    """
    if _installed("xllamacpp"):
        return _by_server(path, ids)
    if _installed("llama_cpp"):
        return _by_bindings(path, ids)
    raise base.needs("xllamacpp", "gguf")


def _installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ValueError:  # sys.modules has None for it
        return False


def _by_server(path: Path, ids: Sequence[int]) -> dict[int, Tensor]:
    import torch

    xllamacpp: Any = import_module("xllamacpp")
    context, rows, plain = _facts(path)
    options = xllamacpp.CommonParams()
    options.model.path, options.n_ctx, options.verbosity = str(path), context, -1
    options.n_parallel, options.warmup = 1, False
    options.cache_type_k = options.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    options.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    try:
        server = xllamacpp.Server(options)
    except RuntimeError as e:
        raise CorruptError(f"llama.cpp cannot load '{path}'", why=str(e)) from None
    found: dict[int, Tensor] = {}
    lengths = list(range(1, min(len(ids), context - 1) + 1)) or [1]
    if len(lengths) > _MOST_PROMPTS:
        lengths = lengths[: _MOST_PROMPTS // 2] + lengths[-_MOST_PROMPTS // 2 :]
    for length in lengths:
        # Nothing is reported if the end of text or part of a character is drawn, so another token is forced.
        # The probabilities are those before this bias.
        body = {"prompt": list(ids[:length]), "max_tokens": 1, "logprobs": rows, "logit_bias": [[plain, 1e9]]}
        answer = server.handle_completions({**body, "temperature": 0})
        if not (answer.get("choices") and answer["choices"][0]["logprobs"]):
            raise CorruptError(f"llama.cpp cannot run '{path}'", why=str(answer)[:300])
        (step,) = answer["choices"][0]["logprobs"]["content"]
        values = torch.full((rows,), float("-inf"))
        for token in step["top_logprobs"]:
            values[token["id"]] = token["logprob"]
        found[length - 1] = values
    return found


def _by_bindings(path: Path, ids: Sequence[int]) -> dict[int, Tensor]:
    import torch

    llama_cpp: Any = import_module("llama_cpp")
    # It writes warnings to stderr even if it is not verbose.
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            loaded = llama_cpp.Llama(
                str(path),
                n_ctx=len(ids),
                n_batch=len(ids),
                n_ubatch=len(ids),
                logits_all=True,
                type_k=llama_cpp.GGML_TYPE_F32,
                type_v=llama_cpp.GGML_TYPE_F32,
                verbose=False,
            )
        except (ValueError, RuntimeError) as e:
            why = (said.getvalue().strip().splitlines() or [str(e)])[-1]
            raise CorruptError(f"llama.cpp cannot load '{path}'", why=why) from None
        try:
            loaded.eval(list(ids))
            return dict(enumerate(torch.from_numpy(loaded.scores[: len(ids)].copy())))
        finally:
            loaded.close()


def _facts(path: Path) -> tuple[int, int, int]:
    """A file's context length, its number of tokens, and a token that is whole characters."""
    from quill.formats.gguf.file import File

    file = File(path)
    architecture = file.get("general.architecture", str)
    tokens = file.get("tokenizer.ggml.tokens", list)
    plain = next((i for i, token in enumerate(tokens) if _is_text(token)), 0)
    return file.get(f"{architecture}.context_length", int), len(tokens), plain


def _is_text(token: str) -> bool:
    try:
        return unspell(token).decode().isprintable()
    except (KeyError, UnicodeDecodeError):
        return False

"""GPT-2's tokenizer: 50,257 byte-pair tokens. Radford et al. 2019."""

from __future__ import annotations

from typing import ClassVar

from quill.tokenizers._ranks import PublishedTokenizer


class Gpt2Tokenizer(PublishedTokenizer):
    """GPT-2's ranks, as its models and nanoGPT use them."""

    urls: ClassVar[tuple[str, ...]] = (
        "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe",
        "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/encoder.json",
    )

"""GPT-4's tokenizer: 100,277 ids, of which 100,256 are byte-pair tokens and 5 are special."""

from __future__ import annotations

from typing import ClassVar

from quill.tokenizers._ranks import PublishedTokenizer


class Cl100kBaseTokenizer(PublishedTokenizer):
    """GPT-4's ranks."""

    urls: ClassVar[tuple[str, ...]] = (
        "https://openaipublic.blob.core.windows.net/encodings/cl100k_base.tiktoken",
    )

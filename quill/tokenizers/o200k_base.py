"""GPT-4o's tokenizer: 200,019 ids, of which 199,998 are byte-pair tokens and 2 are special."""

from __future__ import annotations

from typing import ClassVar

from quill.tokenizers._ranks import PublishedTokenizer


class O200kBaseTokenizer(PublishedTokenizer):
    """GPT-4o's ranks."""

    urls: ClassVar[tuple[str, ...]] = (
        "https://openaipublic.blob.core.windows.net/encodings/o200k_base.tiktoken",
    )

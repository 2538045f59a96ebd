"""The programs that people use, against a running server."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

import quill

PAGE = Path(quill.__file__).parent / "docs" / "serve.md"


@pytest.fixture
def openai(server):
    """OpenAI's client."""
    library = pytest.importorskip("openai")
    return library.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0)


def test_openai_completes_streams_scores_and_chats(openai):
    fields = {"model": "tiny", "prompt": "3 bells", "max_tokens": 30, "seed": 4, "temperature": 0.8}
    whole = openai.completions.create(**fields)
    chunks = list(openai.completions.create(**fields, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert chunks[-1].usage == whole.usage
    scored = openai.completions.create(model="tiny", prompt="3 bells", max_tokens=0, echo=True, logprobs=1)
    assert len(scored.choices[0].logprobs.token_logprobs) == 7
    message = {"role": "user", "content": "3 bells"}
    chat = {"model": "tiny", "messages": [message], "max_tokens": 30, "seed": 4, "temperature": 0.8}
    assert openai.chat.completions.create(**chat).choices[0].message.content == whole.choices[0].text
    parts = openai.chat.completions.create(**chat, stream=True)
    assert "".join(p.choices[0].delta.content or "" for p in parts) == whole.choices[0].text
    assert [m.id for m in openai.models.list()] == ["tiny"]
    assert openai.models.retrieve("tiny:v1").id == "tiny:v1"


def test_openai_understands_the_errors(openai):
    import openai as library

    with pytest.raises(library.NotFoundError, match="nope") as e:
        openai.completions.create(model="nope", prompt="3")
    assert (e.value.code, e.value.param) == ("model_not_found", "model")
    assert e.value.request_id
    with pytest.raises(library.BadRequestError):
        openai.completions.create(model="tiny", prompt="3", n=100)


def test_the_commands_of_the_manual_run(server):
    text = PAGE.read_text(encoding="utf-8").replace("\\\n", " ")
    commands = [c for c in re.findall(r"^curl .*$", text, re.MULTILINE) if "/v1/completions" in c]
    assert commands
    for command in commands:
        command = command.replace("8000", str(server.port)).replace("shakespeare", "tiny")
        command = command.replace("JULIET:", "3 bells")
        done = subprocess.run(
            f"{command} --silent --fail", shell=True, capture_output=True, timeout=60, check=False
        )
        assert done.returncode == 0
        assert b'"text_completion"' in done.stdout

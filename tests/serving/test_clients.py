"""The programs that people use, against a running server."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

import quill
from quill.checkpoint.load import load_checkpoint
from quill.cli.app import main

PAGE = Path(quill.__file__).parent / "docs" / "serve.md"
PROMPT = "3 bells"
FIELDS = {"max_tokens": 30, "seed": 4, "temperature": 0.8}


@pytest.fixture
def openai(server):
    """OpenAI's client."""
    library = pytest.importorskip("openai")
    return library.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def wanted(server) -> str:
    """The text that every client must get."""
    return server.complete(prompt=PROMPT, **FIELDS).json["choices"][0]["text"]


def test_openai_completes_streams_scores_and_chats(openai, wanted):
    fields = {"model": "tiny", "prompt": PROMPT, **FIELDS}
    whole = openai.completions.create(**fields)
    assert whole.choices[0].text == wanted
    chunks = list(openai.completions.create(**fields, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].text for c in chunks if c.choices) == wanted
    assert chunks[-1].usage == whole.usage
    scored = openai.completions.create(model="tiny", prompt=PROMPT, max_tokens=0, echo=True, logprobs=1)
    assert len(scored.choices[0].logprobs.token_logprobs) == 7
    chat = {"model": "tiny", "messages": [{"role": "user", "content": PROMPT}], **FIELDS}
    assert openai.chat.completions.create(**chat).choices[0].message.content == wanted
    parts = openai.chat.completions.create(**chat, stream=True)
    assert "".join(p.choices[0].delta.content or "" for p in parts) == wanted
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


def test_langchain_completes_streams_and_scores(server, wanted):
    library = pytest.importorskip("langchain_openai")
    model = library.OpenAI(
        base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", model="tiny", max_retries=0, **FIELDS
    )
    assert model.invoke(PROMPT) == wanted
    assert "".join(model.stream(PROMPT)) == wanted
    # It sends 20 prompts at once, and takes the answers by their places.
    prompts = [f"{i} bells" for i in range(25)]
    many = model.model_copy(update={"n": 2}).generate(prompts, max_tokens=2, echo=True)
    for prompt, found in zip(prompts, many.generations, strict=True):
        assert len(found) == 2
        assert all(g.text.startswith(prompt) for g in found)
    assert many.llm_output["token_usage"]["completion_tokens"] == 100
    [[scored]] = model.generate([PROMPT], logprobs=2, echo=True, max_tokens=0).generations
    assert len(scored.generation_info["logprobs"]["token_logprobs"]) == 7


def test_llm_completes_streams_and_scores(server, wanted, tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    entry = {"model_id": "quill-tiny", "model_name": "tiny", "completion": True}
    entry["api_base"] = f"http://127.0.0.1:{server.port}/v1"
    # YAML contains JSON.
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps([entry]), encoding="utf-8")
    library = pytest.importorskip("llm")
    model = library.get_model("quill-tiny")
    assert model.prompt(PROMPT, stream=False, **FIELDS).text() == wanted
    stream = model.prompt(PROMPT, **FIELDS)
    assert "".join(stream) == wanted
    assert stream.response_json["usage"]["completion_tokens"] == 30
    scored = model.prompt(PROMPT, stream=False, logprobs=2, **FIELDS)
    assert scored.text() == wanted
    scores = scored.response_json["choices"][0]["logprobs"]
    assert len(scores["token_logprobs"]) == 30


@pytest.fixture
def harness(server, tiny):
    """lm-evaluation-harness; it is not installed with the others, as it needs pandas, pyarrow and scipy."""
    pytest.importorskip("lm_eval")
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    ids = load_checkpoint(tiny).tokenizer.encode("3")
    return LocalCompletionsAPI(
        base_url=f"http://127.0.0.1:{server.port}/m/tiny/v1/completions",
        model="tiny",
        # It keeps one token for the answer and one for what comes before a text.
        max_length=16 + 2,
        custom_prefix_token_id=ids[0],
        batch_size=4,
    )


def asked(kind: str, *arguments: object) -> list[object]:
    """A request to the harness."""
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=arguments, idx=0)]


def test_the_harness_measures_the_loss_of_quill_eval(
    harness, tiny, tiny_registry, tmp_path, monkeypatch, capsys
):
    # Whole windows: the harness would read more before a shorter last one.
    text = ("3 bells, 12 nails, and 4 handles. " * 7)[: 14 * 16 + 1]
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    monkeypatch.setenv("QUILL_REGISTRY", str(tiny_registry.root))
    assert main(["eval", "tiny", "--data", str(tmp_path / "text.txt"), "--device=cpu", "--json"]) == 0
    [figures] = json.loads(capsys.readouterr().out)["models"]
    assert figures["tokens"] == len(text) - 1
    # `quill eval` does not predict the first token.
    [total] = harness.loglikelihood_rolling(asked("loglikelihood_rolling", text[1:]), disable_tqdm=True)
    assert -total / (len(text) - 1) == pytest.approx(figures["loss"], abs=1e-4)


def test_the_harness_scores_and_generates(harness, server, tiny):
    [(score, greedy)] = harness.loglikelihood(asked("loglikelihood", "3 be", "lls"), disable_tqdm=True)
    found = server.complete(prompt="3 bells", max_tokens=0, echo=True, logprobs=1).json["choices"][0]
    assert score == pytest.approx(sum(found["logprobs"]["token_logprobs"][-3:]), abs=1e-4)
    wanted = server.complete(prompt="3 be", max_tokens=3, temperature=0).json["choices"][0]["text"]
    assert greedy == (wanted == "lls")
    [(_, certain)] = harness.loglikelihood(asked("loglikelihood", "3 be", wanted), disable_tqdm=True)
    assert certain
    settings = {"until": ["\n"], "max_gen_toks": 8, "temperature": 0}
    [text] = harness.generate_until(asked("generate_until", "3 be", settings), disable_tqdm=True)
    free = server.complete(prompt="3 be", max_tokens=8, temperature=0, stop="\n").json["choices"][0]["text"]
    assert text == free


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

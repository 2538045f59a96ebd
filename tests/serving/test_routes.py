"""The routes as their clients use them: OpenAI's, QuillGPT's, and those of the server itself."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch

from quill.checkpoint.load import load_checkpoint
from quill.cli.app import main
from quill.generation.generator import Generator

PROMPT = "3 bells"


@pytest.fixture(scope="session")
def generator(tiny) -> Generator:
    loaded = load_checkpoint(tiny)
    return Generator(loaded.model, loaded.tokenizer)


@pytest.mark.parametrize("length", [1, 20, 60])
def test_a_request_alone_has_the_text_of_quill_sample(server, tiny_registry, monkeypatch, capsys, length):
    monkeypatch.setenv("QUILL_REGISTRY", str(tiny_registry.root))
    more = ["--no-echo", "--seed=7", f"--max-new-tokens={length}", "--device=cpu", "--json"]
    assert main(["sample", "tiny", PROMPT, *more]) == 0
    [wanted] = json.loads(capsys.readouterr().out)["samples"]
    answer = server.complete(prompt=PROMPT, seed=7, temperature=0.8, max_tokens=length)
    assert answer.json["choices"][0]["text"] == wanted


def test_a_completion_is_whole(server):
    answer = server.complete(prompt=PROMPT, max_tokens=5)
    assert answer.status == 200
    found = answer.json
    assert found["object"] == "text_completion"
    assert found["model"] == "tiny:v1"
    [choice] = found["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"] is None
    assert found["usage"] == {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}
    assert answer.headers["x-request-id"]


def test_null_is_not_given_and_unknown_fields_are_ignored(server):
    names = (
        "suffix", "max_tokens", "temperature", "top_p", "n", "stream", "logprobs", "echo", "stop", "best_of",
        "presence_penalty", "frequency_penalty", "logit_bias", "user", "seed", "top_k", "min_p",
        "repetition_penalty", "stream_options", "ignore_eos", "return_tokens_as_token_ids",
    )  # fmt: skip
    answer = server.complete(prompt=PROMPT, nonsense={"a": [1]}, **dict.fromkeys(names))
    assert answer.status == 200
    assert answer.json["usage"]["completion_tokens"] == 16


def test_the_four_forms_of_a_prompt(server, generator):
    ids = generator.tokenizer.encode(PROMPT)
    for prompt, n in ((PROMPT, 1), ([PROMPT, "4"], 2), (ids, 1), ([ids, ids[:2]], 2)):
        found = server.complete(prompt=prompt, max_tokens=4, temperature=0, echo=True).json
        assert len(found["choices"]) == n
        assert found["choices"][0]["text"].startswith(PROMPT)
    assert server.complete(max_tokens=3).status == 200


def test_choices_are_ordered_by_prompt_and_sample(server):
    prompts = [f"{i} bells" for i in range(5)]
    found = server.complete(prompt=prompts, n=3, max_tokens=3, echo=True, seed=1).json["choices"]
    assert [c["index"] for c in found] == list(range(15))
    assert all(c["text"].startswith(prompts[i // 3]) for i, c in enumerate(found))


def test_samples_of_one_request_are_those_of_the_library_up_to_rounding(server, generator):
    wanted = generator.generate(PROMPT, num_samples=4, max_new_tokens=40, seed=3, temperature=0.8)
    found = server.complete(prompt=PROMPT, n=4, max_tokens=40, seed=3, temperature=0.8).json["choices"]
    assert sum(c["text"] == text for c, text in zip(found, wanted, strict=True)) >= 3


def test_scores_are_those_of_the_model(server, generator):
    ids = generator.tokenizer.encode("12 bells, 12")
    found = server.complete(prompt=[ids], max_tokens=0, echo=True, logprobs=2).json["choices"][0]
    table = generator.model.predict(torch.tensor([ids])).log_softmax(-1)[0]
    wanted = [table[i, token].item() for i, token in enumerate(ids[1:])]
    assert found["text"] == "12 bells, 12"
    assert found["finish_reason"] == "length"
    scores = found["logprobs"]
    assert scores["token_logprobs"][0] is None
    assert scores["top_logprobs"][0] is None
    assert scores["token_logprobs"][1:] == pytest.approx(wanted, abs=1e-4)
    assert "".join(scores["tokens"]) == found["text"]
    assert scores["text_offset"] == list(range(12))
    for value, token, top in zip(
        scores["token_logprobs"][1:], scores["tokens"][1:], scores["top_logprobs"][1:], strict=True
    ):
        assert top[token] == value
        assert 2 <= len(top) <= 3


def test_a_prompt_of_the_whole_context_and_its_next_token_is_scored_and_continued(server, generator):
    size = generator.model.shape.block_size
    ids = (generator.tokenizer.encode("12 bells, 12 bells, and"))[: size + 1]
    fields = {"max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0}
    scores = server.complete(prompt=[ids], **fields).json["choices"][0]["logprobs"]
    assert len(scores["tokens"]) == size + 2
    assert scores["text_offset"] == list(range(size + 2))
    table = generator.model.predict(torch.tensor([ids[:-1]])).log_softmax(-1)[0]
    wanted = [table[i, token].item() for i, token in enumerate(ids[1:])]
    assert scores["token_logprobs"][1:-1] == pytest.approx(wanted, abs=1e-4)
    # The likeliest token is the one that temperature 0 draws.
    assert scores["token_logprobs"][-1] == max(scores["top_logprobs"][-1].values())
    longer = server.complete(prompt=[[*ids, ids[0]]], **fields)
    assert (longer.status, longer.code) == (400, "context_length_exceeded")


def test_f69_a_long_text_is_cut_and_the_answer_says_so(server, generator, monkeypatch):
    encode, encoded = type(generator.tokenizer).encode, []

    def counted(self, text, **options):
        encoded.append(len(text))
        return encode(self, text, **options)

    monkeypatch.setattr(type(generator.tokenizer), "encode", counted)
    text = "12 bells, 12 bells, and " * 2000
    answer = server.complete(prompt=text, max_tokens=2, seed=1)
    assert answer.status == 200
    assert "the last 16" in answer.headers["x-quill-notice"]
    assert answer.json["usage"] == {"prompt_tokens": 16, "completion_tokens": 2, "total_tokens": 18}
    assert sum(encoded) < 1000
    short = server.complete(prompt=text[-16:], max_tokens=2, seed=1)
    assert "x-quill-notice" not in short.headers
    assert answer.json["choices"] == short.json["choices"]
    every = server.complete(prompt=text, max_tokens=2, repetition_penalty=1.1)
    assert every.json["usage"]["prompt_tokens"] == len(text)


def test_stop_strings_end_a_sample_and_cut_its_tokens(server):
    fields = {"prompt": PROMPT, "max_tokens": 60, "seed": 5, "temperature": 0.8, "logprobs": 0}
    free = server.complete(**fields).json["choices"][0]["text"]
    stop = free[9:12]
    [choice] = server.complete(**fields, stop=stop).json["choices"]
    assert choice["text"] == free[: free.index(stop)]
    assert choice["finish_reason"] == "stop"
    assert "".join(choice["logprobs"]["tokens"]) == choice["text"]


def test_h12_a_stream_joins_to_the_whole(server):
    fields = {"prompt": PROMPT, "max_tokens": 60, "seed": 5, "temperature": 0.8, "logprobs": 1, "stop": "zz"}
    whole = server.complete(**fields).json
    answer = server.complete(**fields, stream=True, stream_options={"include_usage": True})
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.body.endswith(b"data: [DONE]\n\n")
    *chunks, last = answer.chunks
    assert last["choices"] == []
    assert last["usage"] == whole["usage"]
    assert all(c["usage"] is None and c["object"] == "text_completion" for c in chunks)
    assert "".join(c["choices"][0]["text"] for c in chunks) == whole["choices"][0]["text"]
    reasons = [c["choices"][0]["finish_reason"] for c in chunks]
    assert reasons[-1] == whole["choices"][0]["finish_reason"]
    assert set(reasons[:-1]) <= {None}
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        joined = [x for c in chunks for x in c["choices"][0]["logprobs"][name]]
        assert joined == whole["choices"][0]["logprobs"][name]


def test_token_ids_name_the_text_and_continue_it(server, generator):
    fields = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0, "logprobs": 3, "return_token_ids": True}
    [whole] = server.complete(**fields).json["choices"]
    ids = generator.tokenizer.encode(PROMPT)
    assert whole["prompt_token_ids"] == ids
    assert generator.tokenizer.decode(whole["token_ids"]) == whole["text"]
    table = whole["logprobs"]
    for names, numbers in zip(table["top_logprobs"], table["top_token_ids"], strict=True):
        assert {name: generator.tokenizer.encode(name) for name in names} == {
            n: [i] for n, i in numbers.items()
        }
    rest = server.complete(prompt=[[*ids, *whole["token_ids"][:5]]], max_tokens=7, temperature=0)
    assert rest.json["choices"][0]["text"] == whole["text"][5:]


def test_token_ids_come_without_log_probabilities_and_in_streams(server):
    fields = {"prompt": PROMPT, "max_tokens": 8, "seed": 3, "n": 2, "return_token_ids": True}
    whole = server.complete(**fields).json["choices"]
    assert [c["logprobs"] for c in whole] == [None, None]
    chunks = [c["choices"][0] for c in server.complete(**fields, stream=True).chunks]
    for i, choice in enumerate(whole):
        mine = [c for c in chunks if c["index"] == i]
        assert [t for c in mine for t in c["token_ids"]] == choice["token_ids"]
        assert ["prompt_token_ids" in c for c in mine] == [True] + [False] * (len(mine) - 1)
        assert mine[0]["prompt_token_ids"] == choice["prompt_token_ids"]
    assert "token_ids" not in server.complete(prompt=PROMPT).json["choices"][0]


def test_h12_a_stream_without_options_has_no_usage(server):
    chunks = server.complete(prompt=PROMPT, max_tokens=4, stream=True, n=3).chunks
    assert all("usage" not in c and len(c["choices"]) == 1 for c in chunks)
    ended = [c["choices"][0]["index"] for c in chunks if c["choices"][0]["finish_reason"]]
    assert sorted(ended) == [0, 1, 2]


def test_h12_errors_before_the_first_byte_are_plain(server):
    answer = server.complete(prompt="€", stream=True)
    assert (answer.status, answer.code) == (400, "unknown_character")


def test_a_chat_is_the_messages_joined(server):
    messages = [
        {"role": "system", "content": "3"},
        {"role": "user", "content": [{"type": "text", "text": " bells"}]},
    ]
    fields = {"seed": 1, "temperature": 0.8, "max_tokens": 20}
    chat = server.post("/v1/chat/completions", {"model": "tiny", "messages": messages, **fields})
    found = chat.json["choices"][0]
    wanted = server.complete(prompt="3\n bells", **fields).json["choices"][0]["text"]
    assert found["message"]["content"] == wanted
    assert chat.json["object"] == "chat.completion"
    stream = {"model": "tiny", "messages": messages, **fields, "stream": True}
    chunks = server.post("/v1/chat/completions", stream).chunks
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all(c["object"] == "chat.completion.chunk" for c in chunks)
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == wanted
    scored = {"model": "tiny", "messages": messages, **fields, "logprobs": True, "top_logprobs": 2}
    content = server.post("/v1/chat/completions", scored).json["choices"][0]["logprobs"]["content"]
    assert "".join(t["token"] for t in content) == wanted
    assert all(len(t["top_logprobs"]) == 2 for t in content)


@pytest.mark.parametrize("more", [{"tools": [{}]}, {"response_format": {"type": "json_object"}}])
def test_what_a_chat_cannot_do_is_refused(server, more):
    message = {"role": "user", "content": "3"}
    answer = server.post("/v1/chat/completions", {"model": "tiny", "messages": [message], **more})
    assert answer.status == 400


def test_the_tokenizer_routes(server, generator):
    ids = generator.tokenizer.encode(PROMPT)
    for start in ("", "/m/tiny"):
        assert server.post(f"{start}/tokenize", {"prompt": PROMPT}).json["tokens"] == ids
        assert server.post(f"{start}/detokenize", {"tokens": ids}).json == {"prompt": PROMPT}
        info = server.get(f"{start}/tokenizer_info").json
        assert info["eos_token"] is None
    skipped = server.post("/tokenize", {"prompt": "3€", "add_special_tokens": False}).json
    assert (skipped["tokens"], skipped["skipped"]) == (ids[:1], 1)
    answer = server.post("/detokenize", {"tokens": [10**6]})
    assert (answer.status, answer.json["error"]["param"]) == (400, "tokens")


def test_quillgpts_routes(server):
    query = "?prompt=3%20bells&max_length=20&temperature=0.7&seed=2"
    found = server.call("POST", f"/generate{query}").json
    assert found["prompt"] == PROMPT
    wanted = server.complete(prompt=PROMPT, max_tokens=20, temperature=0.7, seed=2).json["choices"][0]["text"]
    assert found["response"] == wanted
    stream = server.call("POST", f"/generate_stream{query}")
    assert stream.headers["content-type"].startswith("text/plain")
    assert stream.body.decode() == wanted
    body = {"prompt": PROMPT, "max_length": 20, "temperature": 0.7, "seed": 2}
    assert server.post("/generate", body).json["response"] == wanted
    form = {"content-type": "application/x-www-form-urlencoded"}
    assert server.call("POST", "/generate", query[1:].encode(), form).json["response"] == wanted
    assert server.get("/").json["message"] == "GPT FastAPI Service is running."


def test_the_models_are_listed(server):
    found = server.get("/v1/models").json
    assert found["object"] == "list"
    [model] = found["data"]
    assert (model["id"], model["object"], model["max_model_len"]) == ("tiny", "model", 16)
    assert server.get("/v1/models/tiny").json["quill"]["reference"] == "tiny:v1"
    assert server.get("/v1/models/tiny%3Av1").json["id"] == "tiny:v1"
    assert server.get("/v1/models?versions=all").json["data"][0]["id"] == "tiny:v1"


def test_the_server_tells_how_it_is(server):
    assert server.get("/health").json == {"status": "ok"}
    assert server.get("/ready").json == {"status": "ready"}
    server.complete(prompt=PROMPT)
    text = server.get("/metrics").body.decode()
    assert 'quill_generation_tokens_total{model_name="tiny:v1"}' in text
    assert 'quill_num_requests_running{model_name="tiny:v1"} 0.0' in text


def test_answers_and_refusals_are_counted_by_route(server):
    def counted(line: str) -> float:
        found = [x for x in server.get("/metrics").body.decode().splitlines() if x.startswith(f"{line} ")]
        return float(found[0].rpartition(" ")[2]) if found else 0.0

    wanted = {
        'quill_requests_total{code="200",route="/v1/completions"}': 2,
        'quill_requests_total{code="404",route="/v1/completions"}': 1,
        'quill_requests_total{code="404",route="none"}': 1,
        'quill_requests_total{code="403",route="none"}': 1,
        'quill_requests_rejected_total{reason="model_not_found"}': 1,
        'quill_requests_rejected_total{reason="host_not_allowed"}': 1,
    }
    before = {line: counted(line) for line in wanted}
    server.complete(prompt=PROMPT)
    server.post("/m/tiny/v1/completions", {"prompt": PROMPT, "stream": True})
    server.complete(model="nope", prompt=PROMPT)
    server.get("/nowhere")
    server.get("/health", host="evil.example")
    assert {line: counted(line) - n for line, n in before.items()} == wanted


def test_the_document_describes_every_route(server, registry):
    from quill.config.settings import ServeConfig
    from quill.serving.app import Api
    from quill.serving.catalog import Catalog

    document = server.get("/openapi.json").json
    api = Api(ServeConfig(), Catalog(registry), "cpu")
    routes = {
        (route.path.replace(":path", ""), method.lower())
        for route in api.routes()
        for method in route.methods or ()
    }
    described = {(path, method) for path, methods in document["paths"].items() for method in methods}
    assert {r for r in routes if r[1] != "head"} == described
    page = server.get("/docs")
    assert b"<script" not in page.body and b"<style" not in page.body
    assert b"http:" not in page.body and b"https:" not in page.body


def test_pages_may_load_what_the_server_sends_and_no_more(server):
    for path in ("/docs", "/"):
        page = server.get(path, accept="text/html")
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        loaded = re.findall(r'(?:src|href)="([^"#]+)"', page.body.decode())
        assert "static/icon.svg" in loaded
        for name in loaded:
            assert server.get(f"/{name}").status == 200, name
    assert server.get("/", accept="*/*").json["message"]


def test_a_file_of_the_page_is_sent_once(server):
    first = server.get("/static/explain.js")
    assert first.headers["content-type"] == "text/javascript; charset=utf-8"
    assert first.headers["cache-control"] == "no-cache"
    again = server.get("/static/explain.js", **{"if-none-match": first.headers["etag"]})
    assert (again.status, again.body) == (304, b"")


def test_an_explanation_is_that_of_the_library(server, generator):
    from quill.config.settings import SampleConfig
    from quill.explanation.explanation import Explanation

    fields = {"prompt": PROMPT, "temperature": 0.5, "top_k": 3, "last": 5}
    found = server.post("/v1/quill/explain", {"model": "tiny", **fields})
    assert found.status == 200
    config = SampleConfig(temperature=0.5, top_k=3)
    wanted = Explanation(generator, PROMPT, config, last=5).to_dict()
    assert found.json["reference"] == "tiny:v1"
    assert found.json["left_out"] == 2
    assert [row["sampled"] for row in found.json["next"]["likeliest"]] == pytest.approx(
        [row["sampled"] for row in wanted["next"]["likeliest"]]
    )
    assert found.json["layers"][0]["heads"] == wanted["layers"][0]["heads"]
    for wrong, param in (({"last": 129}, "last"), ({"prompt": "€"}, "prompt"), ({"model": "none"}, "model")):
        answer = server.post("/v1/quill/explain", {"model": "tiny", **fields, **wrong})
        assert answer.status in (400, 404)
        assert answer.json["error"]["param"] == param


@pytest.mark.parametrize(
    ("shape", "most"),
    [
        ({"n_layer": 6, "n_head": 4, "n_embd": 256, "vocab_size": 65}, 209),
        ({"n_layer": 12, "n_head": 12, "n_embd": 768, "vocab_size": 50257}, 85),
        ({"n_layer": 48, "n_head": 25, "n_embd": 1600, "vocab_size": 50257}, 12),
        ({"n_layer": 0, "n_head": 1, "n_embd": 65, "vocab_size": 65}, 1024),
        ({"n_layer": 1000, "n_head": 1000, "n_embd": 1000, "vocab_size": 10**6}, 1),
    ],
)
def test_an_explanation_of_a_large_model_is_short(shape, most):
    from types import SimpleNamespace

    from quill.serving.inside import most_tokens

    assert most_tokens(SimpleNamespace(**shape)) == most


def test_a_card_tells_how_a_model_was_made(server, tiny):
    found = server.get("/v1/quill/card/tiny").json
    assert found["reference"] == "tiny:v1"
    assert found["parameters"] == tiny.facts["parameters"]
    assert found["data"]["name"] == "tiny"
    assert found["model"]["n_embd"] == 8
    assert found["curves"]["val"][-1] == found["curves"]["best"] == [5, tiny.facts["best_val_loss"]]
    assert found["card"].startswith("# tiny:v1")
    assert str(tiny.path.parent.parent) not in json.dumps(found)
    assert server.get("/v1/quill/card/none").code == "model_not_found"


def test_long_curves_are_thinned():
    from quill.evaluation.curves import Point
    from quill.serving.cards import thinned

    points = [Point(i, float(i)) for i in range(12_345)]
    found = thinned(points)
    assert 300 < len(found) <= 401
    assert (found[0], found[-1]) == (points[0], points[-1])
    assert thinned(points[:3]) == points[:3]
    assert thinned([]) == []


def test_elsewhere_is_nothing(server):
    assert server.get("/v2").code == "not_found"
    assert "/v1/completions" in server.post("/v1/responses").json["error"]["message"]
    assert server.get("/v1/completions").status == 405
    assert server.call("HEAD", "/health").status == 200


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 0}, "n"),
        ({"n": 17}, "n"),
        ({"n": 10**9}, "n"),
        ({"n": True}, "n"),
        ({"n": "2"}, "n"),
        ({"n": 1.5}, "n"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 10**9}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"logprobs": 21}, "logprobs"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": ["a" * 257]}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"best_of": 3}, "best_of"),
        ({"suffix": "x"}, "suffix"),
        ({"presence_penalty": 1}, "presence_penalty"),
        ({"logit_bias": {"1": 5}}, "logit_bias"),
        ({"prompt": [[10**6]]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [1.5]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"seed": 2**70}, "seed"),
        ({"model": 5}, "model"),
    ],
    ids=str,
)
def test_h2_values_out_of_bounds_are_refused(server, fields, param):
    answer = server.complete(**{"prompt": PROMPT, **fields})
    assert answer.status == 400
    assert answer.json["error"]["param"] == param


def test_h2_rows_are_counted_before_they_are_made(server):
    answer = server.complete(prompt=["3"] * 20, n=16)
    assert (answer.status, answer.json["error"]["param"]) == (400, "n")
    assert server.complete(prompt=["3"] * 129).status == 400
    assert server.complete(prompt=["3"] * 20, n=6, max_tokens=1).status == 200


def test_h2_the_log_probabilities_of_an_answer_are_counted_before_they_are_made(server):
    for more in ({"logprobs": 20}, {"logprobs": 2, "echo": True, "prompt": [[1] * 17] * 8}):
        answer = server.complete(**{"prompt": ["3"] * 8, "n": 16, "max_tokens": 4096, **more})
        assert (answer.status, answer.json["error"]["param"]) == (400, "logprobs")
        assert "524,288" in answer.json["error"]["message"]


@pytest.mark.parametrize(
    "fields", [{"n": 2.0}, {"stop": ["a", "b"]}, {"top_p": 0}, {"top_k": -1}, {"logprobs": True}]
)
def test_what_clients_send_is_accepted(server, fields):
    assert server.complete(prompt=PROMPT, max_tokens=2, **fields).status == 200


def test_no_number_is_infinite(server):
    text = server.complete(prompt=PROMPT, max_tokens=8, logprobs=20, temperature=1000).body.decode()
    assert "Infinity" not in text
    assert "NaN" not in text
    scores = json.loads(text)["choices"][0]["logprobs"]
    assert all(math.isfinite(x) for x in scores["token_logprobs"])

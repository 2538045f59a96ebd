"""The routes, and what they have in common: find the model, admit the request, generate, answer.

Starlette rather than FastAPI: requests are validated by quill's own models, answered with OpenAI's errors,
and described in a document made from the same models, so FastAPI would add its weight and none of its use.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from quill import __version__
from quill.config.settings import SampleConfig, ServeConfig
from quill.errors import InputError, QuillError
from quill.generation.generator import Generator
from quill.serving import bodies, inside, openapi, playground, replies, requests, streams
from quill.serving.cards import describe_card
from quill.serving.catalog import Catalog
from quill.serving.engine import Engine
from quill.serving.errors import ApiError, dump, explain, invalid
from quill.serving.guard import REFUSED
from quill.serving.jobs import Gone, Job, Piece
from quill.serving.metrics import CONTENT_TYPE, Metrics
from quill.serving.residents import Resident

T = TypeVar("T")

# Log probabilities in an answer, of prompts and samples; more would take hundreds of megabytes.
_MOST_REPORTED = 1 << 19
# Longer prompts are tokenized off the event loop.
_LONG_PROMPT = 1 << 13
_ROUTES_ELSEWHERE = {
    "/v1/responses": "use /v1/completions",
    "/v1/embeddings": "quill's models make no embeddings; use /v1/completions",
    "/api/generate": "use /v1/completions",
    "/api/chat": "use /v1/chat/completions",
    "/api/tags": "use /v1/models",
}


@dataclass(frozen=True)
class Prompt:
    """A prompt as the model reads it.

    Attributes:
        text: Its text, to be echoed.
        ids: The tokens that count: the model's first token where there are none, and the last of a long text.
        notice: What the client should know of it.
    """

    text: str
    ids: list[int]
    notice: str = ""


class Api:
    """What answers requests.

    Args:
        config: The limits.
        catalog: The models.
        device: The device to compute on.

    Attributes:
        engine: What generates.
        draining: Whether no new work is taken, because the server is about to stop.
    """

    def __init__(self, config: ServeConfig, catalog: Catalog, device: str) -> None:
        self.config, self.catalog = config, catalog
        self.metrics = Metrics()
        self.engine = Engine(config, device, self.metrics.loaded)
        self.metrics.watch(self.engine)
        self.draining = False
        self._paths: dict[Any, str] = {}
        for route in self.routes():
            self._paths.setdefault(route.endpoint, route.path)

    def routes(self) -> list[Route]:
        """All routes."""

        def get(path: str, endpoint: Callable[[Request], Awaitable[Response]]) -> Route:
            return Route(path, endpoint, methods=["GET"])

        def post(path: str, endpoint: Callable[[Request], Awaitable[Response]]) -> Route:
            return Route(path, endpoint, methods=["POST"])

        own = [
            get("/", self.home),
            get("/docs", self.docs),
            get("/static/{name}", self.static),
            get("/health", self.health),
            get("/ready", self.ready),
            get("/metrics", self.show_metrics),
            get("/openapi.json", self.document),
            get("/v1/models", self.models),
            get("/v1/models/{name:path}", self.model),
            get("/v1/quill/card/{name:path}", self.card),
            post("/v1/quill/explain", self.explain),
            post("/generate", self.generate),
            post("/generate_stream", self.generate_stream),
        ]
        # A model may be part of the path, for clients that cannot name one in each request.
        for start in ("", "/m/{name}"):
            own += [
                post(f"{start}/v1/completions", self.completions),
                post(f"{start}/v1/chat/completions", self.chat),
                post(f"{start}/tokenize", self.tokenize),
                post(f"{start}/detokenize", self.detokenize),
                get(f"{start}/tokenizer_info", self.tokenizer_info),
            ]
        return own

    def observe(self, scope: MutableMapping[str, Any], status: int) -> None:
        """Count an answer under its route, which is the same for every model."""
        route = self._paths.get(scope.get("endpoint"), "none")
        self.metrics.answered(route, status, scope.get(REFUSED))

    # What generates

    async def completions(self, request: Request) -> Response:
        """Continue prompts."""
        body = requests.validate(requests.CompletionRequest, await self._json(request))
        config = self._sampling(body, body.max_tokens)
        score = body.echo and body.logprobs is not None
        async with self._leased(request, body.model) as lease:
            prompts = await self._encode(lease.generator, body.prompts, config, whole=score)
            if score and any(not p.text for p in prompts):
                raise invalid("an empty prompt has no tokens to score", "prompt")
            job = Job(
                [p.ids for p in prompts],
                config,
                n=body.n,
                # Tokens are reported only with their log probabilities.
                logprobs=0 if body.logprobs is None and body.return_token_ids else body.logprobs,
                score=score,
                ends=not body.ignore_eos,
            )
            _bound_report(job, "logprobs")
            reply = replies.Completion(
                lease.resident.version,
                lease.generator.tokenizer,
                logprobs=body.logprobs,
                echoed=[p.text for p in prompts for _ in range(body.n)] if body.echo else (),
                by_id=body.return_tokens_as_token_ids,
                prompts=[p.ids for p in prompts for _ in range(body.n)] if body.return_token_ids else None,
            )
            return await self._answer(request, lease, job, reply, body, prompts)

    async def chat(self, request: Request) -> Response:
        """Continue the contents of messages, joined by newlines."""
        body = requests.validate(requests.ChatRequest, await self._json(request))
        config = self._sampling(body, body.limit)
        logprobs = body.top_logprobs if body.logprobs else None
        async with self._leased(request, body.model) as lease:
            prompts = await self._encode(lease.generator, [body.text], config)
            job = Job([prompts[0].ids], config, n=body.n, logprobs=logprobs, ends=not body.ignore_eos)
            _bound_report(job, "top_logprobs")
            reply = replies.Chat(lease.resident.version, lease.generator.tokenizer, logprobs=logprobs)
            return await self._answer(request, lease, job, reply, body, prompts)

    async def generate(self, request: Request) -> Response:
        """QuillGPT's route: the whole continuation."""
        async with self._simple(request) as (body, lease, job):
            self.engine.submit(lease.resident, job)
            pieces = await self._whole(request, lease, job)
            text = "".join(p.text for p in pieces)
            return _json({"prompt": body.prompt, "response": text})

    async def generate_stream(self, request: Request) -> Response:
        """QuillGPT's route: the continuation as plain text, while it is generated."""
        async with self._simple(request) as (_, lease, job):
            self.engine.submit(lease.resident, job)
            timeout = self.config.queue_timeout
            first = await self._first(request, lease, job)
            plain = {"content-type": "text/plain"}
            return streams.Stream(job, first, timeout, self._pace, lease.keep(job), plain)

    @asynccontextmanager
    async def _simple(self, request: Request) -> AsyncIterator[tuple[requests.GenerateRequest, Lease, Job]]:
        parameters = await bodies.read_parameters(request, self.config.max_body)
        body = requests.validate(requests.GenerateRequest, parameters)
        self._bound(body.max_length, "max_length")
        config = SampleConfig(
            max_new_tokens=body.max_length, temperature=body.temperature, top_k=body.top_k, seed=body.seed
        )
        async with self._leased(request, body.model) as lease:
            [prompt] = await self._encode(lease.generator, [body.prompt], config)
            yield body, lease, Job([prompt.ids], config)

    async def _answer(
        self,
        request: Request,
        lease: Lease,
        job: Job,
        reply: replies.Reply,
        body: requests.Sampling,
        prompts: list[Prompt],
    ) -> Response:
        """Generate, and answer whole or as a stream."""
        notices = [p.notice for p in prompts if p.notice]
        headers = {"x-quill-notice": notices[0]} if notices else {}
        read = sum(len(p.ids) for p in prompts)
        self.engine.submit(lease.resident, job)
        if body.stream:
            first = await self._first(request, lease, job)
            return streams.EventStream(
                job,
                first,
                self.config.queue_timeout,
                self._pace,
                lease.keep(job),
                headers,
                reply=reply,
                prompt_tokens=read,
                usage_last=body.stream_options.include_usage,
                usage_always=body.stream_options.continuous_usage_stats,
            )
        pieces = await self._whole(request, lease, job)
        choices = [Piece(i) for i in range(len(prompts) * body.n)]
        for piece in pieces:
            choices[piece.index].add(piece)
        used = replies.usage(read, job.drawn)
        return _json(reply.whole(choices, used), headers)

    def _pace(self) -> float:
        return streams.interval(self.engine.unfinished)

    async def _whole(self, request: Request, lease: Lease, job: Job) -> list[Piece]:
        try:
            async with streams.watching(request.receive, job):
                pieces = await streams.collect(job, self.config.queue_timeout)
        except BaseException as e:
            lease.finish(job, e)
            raise streams.gone(e) if isinstance(e, Gone) else e from None
        lease.finish(job, None)
        return pieces

    async def _first(self, request: Request, lease: Lease, job: Job) -> list[Piece]:
        """Wait a moment for the first token, so that early errors get a status of their own."""
        try:
            async with streams.watching(request.receive, job):
                return await streams.begin(job, self.config.queue_timeout, patience=1.0)
        except BaseException as e:
            lease.finish(job, e)
            raise streams.gone(e) if isinstance(e, Gone) else e from None

    # Tokens

    async def tokenize(self, request: Request) -> Response:
        """Text to tokens; characters without a token are counted and left out."""
        body = requests.validate(requests.TokenizeRequest, await self._json(request))
        async with self._leased(request, body.model) as lease:
            tokenizer = lease.generator.tokenizer
            eot = tokenizer.eot_id
            if eot is not None and body.prompt and body.prompt.encode() == tokenizer.token_bytes(eot):
                return _json({"tokens": [eot], "count": 1, "skipped": 0})
            ids = await _off_loop(len(body.prompt), lambda: tokenizer.encode(body.prompt, unknown="skip"))
            kept = len(tokenizer.decode(ids))
            size = lease.generator.model.shape.block_size
            skipped = max(0, len(body.prompt) - kept)
            return _json({"tokens": ids, "count": len(ids), "max_model_len": size, "skipped": skipped})

    async def detokenize(self, request: Request) -> Response:
        """Tokens to text."""
        body = requests.validate(requests.DetokenizeRequest, await self._json(request))
        async with self._leased(request, body.model) as lease:
            try:
                text = lease.generator.tokenizer.decode(body.tokens)
            except InputError as e:
                raise explain(e, "tokens") from None
            return _json({"prompt": text})

    async def tokenizer_info(self, request: Request) -> Response:
        """What lm-evaluation-harness needs to know of a tokenizer."""
        async with self._leased(request, request.query_params.get("model")) as lease:
            tokenizer = lease.generator.tokenizer
            eot = None if tokenizer.eot_id is None else tokenizer.spelled(tokenizer.eot_id)
            return _json(
                {
                    "tokenizer_class": tokenizer.kind,
                    "vocab_size": tokenizer.vocab_size,
                    "model_max_length": lease.generator.model.shape.block_size,
                    "bos_token": eot,
                    "eos_token": eot,
                    "pad_token": None,
                    "chat_template": None,
                }
            )

    # Models and the server itself

    async def models(self, request: Request) -> Response:
        """The models that may be called."""
        every = request.query_params.get("versions") == "all"

        def listed() -> list[dict[str, Any]]:
            loaded = {r.version for r in self.engine.residents.loaded()}
            found = self.catalog.list(all_versions=every)
            return [
                self.catalog.describe(v, v.reference if every else v.name, loaded=v in loaded) for v in found
            ]

        return _json({"object": "list", "data": await asyncio.to_thread(listed)})

    async def model(self, request: Request) -> Response:
        """One of them."""
        name = request.path_params["name"]
        version = await asyncio.to_thread(self.catalog.find, name)
        loaded = any(r.version == version for r in self.engine.residents.loaded())
        return _json(await asyncio.to_thread(self.catalog.describe, version, name, loaded=loaded))

    async def card(self, request: Request) -> Response:
        """How one of them was made, with its loss curve."""
        version = await asyncio.to_thread(self.catalog.find, request.path_params["name"])
        return _json(await asyncio.to_thread(describe_card, version))

    async def explain(self, request: Request) -> Response:
        """What `quill explain --json` prints."""
        body = requests.validate(requests.ExplainRequest, await self._json(request))
        async with self._leased(request, body.model) as lease:
            generator = lease.generator
            await self._encode(generator, [body.prompt], SampleConfig())
            call = self.engine.call(lambda: inside.explain(generator, body))
            try:
                async with streams.watching(request.receive, call):
                    document = await call.result()
            except Gone as e:
                raise streams.gone(e) from None
        return Response(await asyncio.to_thread(dump, document), media_type="application/json")

    async def health(self, request: Request) -> Response:
        """Whether the server lives."""
        return _json({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """Whether it can generate."""
        trouble = "the server is stopping" if self.draining else self.engine.trouble
        if trouble:
            raise ApiError(503, trouble, "not_ready", headers={"retry-after": "5"})
        return _json({"status": "ready"})

    async def show_metrics(self, request: Request) -> Response:
        """Counts for Prometheus."""
        return Response(self.metrics.render(), headers={"content-type": CONTENT_TYPE})

    async def document(self, request: Request) -> Response:
        """The OpenAPI document."""
        return _json(openapi.document())

    async def docs(self, request: Request) -> Response:
        """The same document for people."""
        return Response(openapi.page(), media_type="text/html", headers=playground.HEADERS)

    async def static(self, request: Request) -> Response:
        """A file of the page."""
        return playground.respond(request.path_params["name"], request.headers)

    async def home(self, request: Request) -> Response:
        """For browsers a page, for QuillGPT's clients its greeting."""
        if "text/html" in request.headers.get("accept", ""):
            return playground.respond("index.html", request.headers)
        return _json({"message": "GPT FastAPI Service is running.", "version": __version__})

    async def _json(self, request: Request) -> Any:
        return await bodies.read_json(request, self.config.max_body)

    def _sampling(self, body: requests.Sampling, max_tokens: int) -> SampleConfig:
        self._bound(max_tokens, "max_tokens")
        return body.config(max_tokens)

    def _bound(self, tokens: int, param: str) -> None:
        if tokens > self.config.max_tokens:
            raise invalid(f"{param} is {tokens:,}; this server allows {self.config.max_tokens:,}", param)

    @asynccontextmanager
    async def _leased(self, request: Request, model: str | None) -> AsyncIterator[Lease]:
        """A model, for as long as a request needs it."""
        if self.draining:
            headers = {"retry-after": "5", "connection": "close"}
            raise ApiError(503, "the server is stopping", "draining", headers=headers)
        name = request.path_params.get("name") or model
        version = self.catalog.known(name)
        if version is None:
            version = await asyncio.to_thread(self.catalog.find, name)
        lease = Lease(self, await self.engine.acquire(version))
        try:
            yield lease
        finally:
            lease.close()

    async def _encode(
        self,
        generator: Generator,
        prompts: list[str | list[int]],
        config: SampleConfig,
        *,
        whole: bool = False,
    ) -> list[Prompt]:
        """Encode prompts.

        Args:
            generator: The model.
            prompts: Texts or token ids.
            config: How to sample.
            whole: Refuse prompts that are longer than the context, of which only the end would be read.
        """
        total = sum(map(len, prompts))
        return await _off_loop(total, lambda: [_encoded(generator, p, config, whole) for p in prompts])


class Lease:
    """A request's hold on a model, which passes to its stream if there is one.

    Args:
        api: The server.
        resident: The model.
    """

    def __init__(self, api: Api, resident: Resident) -> None:
        self._api, self.resident = api, resident
        self._held = True

    @property
    def generator(self) -> Generator:
        """The loaded model."""
        if self.resident.lane is None:
            raise AssertionError("a lease is given out once the model is loaded")
        return self.resident.lane.generator

    def close(self) -> None:
        """Give the model back, unless a job or a stream does."""
        if self._held:
            self._held = False
            self._api.engine.residents.release(self.resident)

    def finish(self, job: Job, error: BaseException | None) -> None:
        """End a job, count it, and give the model back."""
        self._held = False
        name, metrics = self.resident.version.reference, self._api.metrics
        if error is None:
            metrics.finished(name, job)
        else:
            metrics.aborted(name, job.cancelled or "error")
        self._api.engine.finish(self.resident, job)

    def keep(self, job: Job) -> Callable[[Exception | None], None]:
        """Hand the hold over to a stream, which calls the result at its end."""
        self._held = False
        return lambda error: self.finish(job, error)


def build(api: Api) -> Starlette:
    """The application, without the guard."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        api.engine.start()
        yield
        await asyncio.to_thread(api.engine.stop)

    async def refuse(request: Request, error: Exception) -> Response:
        if not isinstance(error, HTTPException):
            known = explain(error)
            request.scope[REFUSED] = known.code
            return _refusal(known)
        path = request.scope["path"]
        message = _ROUTES_ELSEWHERE.get(path, f"no route {path[:80]!a}")
        if error.status_code == 405:
            message = f"{path[:80]!a} does not allow {request.method[:20]!a}"
        return _refusal(ApiError(error.status_code, message, "not_found", headers=error.headers))

    handlers = dict.fromkeys((ApiError, QuillError, HTTPException, Exception), refuse)
    return Starlette(routes=api.routes(), lifespan=lifespan, exception_handlers=handlers)


def _bound_report(job: Job, param: str) -> None:
    if job.logprobs is None:
        return
    tokens = len(job.prompts) * job.config.max_new_tokens + job.score * sum(map(len, job.prompts))
    if (reported := job.n * tokens * (job.logprobs + 1)) > _MOST_REPORTED:
        raise invalid(f"{reported:,} log probabilities; at most {_MOST_REPORTED:,} are reported", param)


def _encoded(generator: Generator, prompt: str | list[int], config: SampleConfig, whole: bool) -> Prompt:
    size = generator.model.shape.block_size
    if isinstance(prompt, str):
        try:
            ids, text = generator.prompt_ids(prompt, config, more=1 if whole else 0), prompt
        except InputError as e:
            code = "unknown_character"
            raise ApiError(400, f"{e.what}: {e.why}", code, param="prompt") from None
    else:
        try:
            ids, text = prompt or [generator.first_token()], generator.tokenizer.decode(prompt)
        except InputError as e:
            raise explain(e, "prompt") from None
    # The last token of a prompt to score is predicted, and needs no room in the context.
    if len(ids) <= size + (1 if whole else 0):
        return Prompt(text, ids)
    if whole or not isinstance(prompt, str):
        message = f"the prompt has more than {size:,} tokens, the model's context length"
        raise invalid(message, "prompt", "context_length_exceeded")
    notice = f"using only the last {size:,} tokens of the prompt: the context length"
    return Prompt(text, ids if config.repetition_penalty != 1 else ids[-size:], notice)


async def _off_loop(size: int, work: Callable[[], T]) -> T:
    """Do what takes long for large inputs without holding up the event loop."""
    return await asyncio.to_thread(work) if size > _LONG_PROMPT else work()


def _refusal(error: ApiError) -> Response:
    return Response(error.body(), error.status, error.headers, "application/json")


def _json(document: Any, headers: dict[str, str] | None = None) -> Response:
    return Response(dump(document), media_type="application/json", headers=headers)

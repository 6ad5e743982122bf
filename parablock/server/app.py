"""The HTTP application: OpenAI's endpoints over the engines."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from jinja2.exceptions import TemplateError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from parablock import __version__
from parablock.data.chat import encode_prompt, encode_text
from parablock.decoding.grammar import CompiledGrammar
from parablock.server.answers import Answers, Told
from parablock.server.bodies import Writer
from parablock.server.config import ServeConfig
from parablock.server.delivery import Delivery
from parablock.server.errors import (
    ApiError,
    ErrorBody,
    from_value_error,
    on_api_error,
    on_http_error,
    on_validation_error,
    shutting_down,
)
from parablock.server.guards import Guard
from parablock.server.metrics import Metrics
from parablock.server.protocol import Body, ChatBody, CompletionBody
from parablock.server.served import ServedModel

LONG = 20_000  # characters


class State:
    """What the endpoints share."""

    def __init__(self, served: Sequence[ServedModel], config: ServeConfig) -> None:
        self.served = {model.name: model for model in served}
        self.first = served[0]
        self.config = config
        self.metrics = Metrics(served)
        self.draining = False
        self.running = 0  # requests being answered

    def pick(self, name: str | None) -> ServedModel:
        """The model of a request; the first unless it names one."""
        if name is None:
            return self.first
        if name not in self.served:
            known = ", ".join(self.served)
            raise ApiError(404, f"there is no model {name!r}; this server has: {known}", "model", "model_not_found")
        return self.served[name]

    def admit(self, served: ServedModel, choices: int) -> None:
        """Refuse what the server can't take, now or ever; whether there is room, the engine says."""
        if refusal := served.refusal():
            raise refusal
        if self.draining:
            raise shutting_down()
        room = self.config.max_rows + self.config.max_queue
        if choices > room:
            raise ApiError(400, f"n: {choices} answers at once, but the server takes {room}; ask for fewer", "n")

    @property
    def stopped(self) -> ServedModel | None:
        """A model whose engine has stopped by itself: then the server has to be started again."""
        return next((served for served in self.served.values() if served.stopped), None)


def create_app(served: Sequence[ServedModel], config: ServeConfig, key: str | None = None) -> FastAPI:
    """The application over running engines; `key`: what clients must send as a bearer token."""
    app = endpoints(served, config)
    state: State = app.state.server
    app.add_middleware(Guard, key=key, max_body=config.max_body, responded=state.metrics.responded)
    if config.cors_origin:
        origins = list(config.cors_origin)
        app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])
    return app


def endpoints(served: Sequence[ServedModel], config: ServeConfig) -> FastAPI:
    """What the application is behind its guards; whoever calls it makes the log's line, `scope["state"]["log"]`."""
    app = FastAPI(
        title="parablock",
        version=__version__,
        docs_url=None,  # its page would load scripts from elsewhere
        redoc_url=None,
        responses={"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}},
    )
    app.state.server = state = State(served, config)
    app.add_exception_handler(ApiError, on_api_error)
    app.add_exception_handler(RequestValidationError, on_validation_error)
    app.add_exception_handler(HTTPException, on_http_error)
    _add_answers(app, state)
    _add_views(app, state)
    return app


def _add_answers(app: FastAPI, state: State) -> None:
    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        served = state.pick(body.model)
        state.admit(served, body.choices())
        messages = [message.plain() for message in body.messages]
        length = sum(len(message["content"]) for message in messages)
        try:
            prompt = await _encode(encode_prompt, served.tokenizer, messages, length)
        except (ValueError, TypeError, LookupError, TemplateError) as error:  # roles that do not alternate, say
            raise ApiError(400, f"messages: the chat template refuses them: {error}", "messages") from None
        grammar = await _compile(served, body)
        return _answer(state, served, body, request, [prompt], Told(body.top()), grammar, chat=True)

    @app.post("/v1/completions")
    async def completions(body: CompletionBody, request: Request) -> Response:
        served = state.pick(body.model)
        state.admit(served, body.choices())
        prompts = [
            await _encode(encode_text, served.tokenizer, prompt, len(prompt)) if isinstance(prompt, str) else prompt
            for prompt in body.prompts()
        ]
        echo = [prompt for prompt in body.prompts() for _ in range(body.n or 1)] if body.echo else None
        told = Told(body.top(), echo, answers=body.max_tokens != 0)
        grammar = await _compile(served, body)
        return _answer(state, served, body, request, prompts, told, grammar, chat=False)


async def _encode(encode: Callable[[Any, Any], list[int]], tokenizer: Any, content: Any, length: int) -> list[int]:
    """Token ids; a long text is tokenized beside the event loop."""
    return encode(tokenizer, content) if length < LONG else await asyncio.to_thread(encode, tokenizer, content)


async def _compile(served: ServedModel, body: Body) -> CompiledGrammar | None:
    """What the answers are held to, compiled beside the event loop."""
    if (grammar := body.grammar()) is None:
        return None
    try:
        return await asyncio.to_thread(served.grammars.compile, grammar)
    except ValueError as error:
        field = body.grammar_field()
        raise ApiError(400, f"{field}: {error}", field, "invalid_grammar") from None


def _add_views(app: FastAPI, state: State) -> None:
    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [served.card() for served in state.served.values()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        return state.pick(name).card()

    @app.get("/health/live")
    async def live() -> Response:
        return _stopped(state) or JSONResponse({"status": "live"})

    @app.get("/health/ready")
    @app.get("/health")
    async def ready() -> Response:
        if state.draining or any(served.engine.closed for served in state.served.values()):
            return _stopped(state) or JSONResponse({"status": "shutting down"}, 503)
        return JSONResponse({"status": "ready"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(state.metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _stopped(state: State) -> Response | None:
    if (served := state.stopped) is None:
        return None
    return JSONResponse({"status": f"the engine of {served.name} has stopped: {served.stopped}"}, 503)


def _answer(
    state: State, served: ServedModel, body: Body, request: Request, prompts: list[list[int]], told: Told,
    grammar: CompiledGrammar | None, *, chat: bool,
) -> Response:  # fmt: skip
    """Decode `n` answers to every prompt, whole or as a stream."""
    try:
        config = body.decode_config(served.stop_token_ids)
    except ValueError as error:
        raise from_value_error(error) from None
    context = served.engine.max_context
    if (longest := max(len(prompt) for prompt in prompts)) > context:
        message = f"a prompt of {longest} tokens exceeds the context of {context} tokens; shorten it"
        raise ApiError(400, message, "messages" if chat else "prompt", "context_length_exceeded")
    every = [prompt for prompt in prompts for _ in range(body.n or 1)]
    stream, line = bool(body.stream), request.state.log
    answers = Answers(
        served, every, config, body.stops(), told, grammar, stream=stream, deadline=state.config.deadline
    )  # fmt: skip
    usage = body.stream_options is not None and body.stream_options.include_usage
    counted = sum(len(prompt) for prompt in prompts)
    writer = Writer(answers, counted, chat=chat, usage=usage, denoising=bool(body.denoising))
    line |= {"model": served.name, "stream": stream, "prompt_tokens": counted}
    state.running += 1

    def ended(outcome: str) -> None:
        state.running -= 1
        answers.close()
        served.ended(len(every), answers.seconds or 0.0)
        if outcome == "cancelled":
            line.setdefault("status", 499)  # a client that left before it was told anything
        line.update(outcome=outcome, tokens=answers.tokens, forwards=answers.forwards)
        state.metrics.ended(answers, outcome)

    return Delivery(writer, ended, stream=stream)

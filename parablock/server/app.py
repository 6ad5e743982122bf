"""The HTTP application: OpenAI's endpoints over the engines."""

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from parablock import __version__
from parablock.data.chat import encode_text
from parablock.server.answers import Answers
from parablock.server.bodies import Writer
from parablock.server.config import ServeConfig
from parablock.server.conversation import beside, chat_prompt
from parablock.server.delivery import AnswerWriter, Delivery
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
from parablock.server.keys import Key
from parablock.server.metrics import Metrics
from parablock.server.protocol import Body, ChatBody, CompletionBody
from parablock.server.response_bodies import ResponseWriter
from parablock.server.response_store import Kept, ResponseStore
from parablock.server.responses import ResponseBody, kept_items, no_store
from parablock.server.served import ServedModel
from parablock.server.tokenizing import DetokenizeBody, Detokenized, TokenizeBody, Tokens, detokenize, tokenize
from parablock.server.tool_grammars import compile_grammar

if TYPE_CHECKING:
    from parablock.server.traces import Traces


class State:
    """What the endpoints share."""

    def __init__(self, served: Sequence[ServedModel], config: ServeConfig) -> None:
        self.served = {model.name: model for model in served}
        self.first = served[0]
        self.config = config
        self.metrics = Metrics(served)
        self.traces: Traces | None = None
        self.responses = ResponseStore(config.keep_responses)
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
            raise shutting_down(served.retry_after(served.room))
        room = self.config.max_rows + self.config.max_queue
        if choices > room:
            raise ApiError(400, f"n: {choices} answers at once, but the server takes {room}; ask for fewer", "n")

    @property
    def stopped(self) -> ServedModel | None:
        """A model whose engine has stopped by itself: then the server has to be started again."""
        return next((served for served in self.served.values() if served.stopped), None)


def create_app(served: Sequence[ServedModel], config: ServeConfig, keys: Sequence[Key] = ()) -> FastAPI:
    """The application over running engines; `keys`: what clients must send as a bearer token."""
    app = endpoints(served, config)
    state: State = app.state.server
    app.add_middleware(Guard, keys=keys, max_body=config.max_body, metrics=state.metrics)
    if config.cors_origin:
        origins = list(config.cors_origin)
        app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])
    if config.otlp_endpoint:
        from parablock.server.traces import Traces

        state.traces = Traces(app, config.otlp_endpoint)
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
    _add_responses(app, state)
    _add_views(app, state)
    return app


def _add_answers(app: FastAPI, state: State) -> None:
    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        served = state.pick(body.model)
        state.admit(served, body.choices())
        prompts = [await _chat_prompt(served, body)]
        return await _answer(state, served, body, request, prompts, _chat_writer(body, chat=True))

    @app.post("/v1/completions")
    async def completions(body: CompletionBody, request: Request) -> Response:
        served = state.pick(body.model)
        state.admit(served, body.choices())
        prompts = [
            await beside(encode_text, len(prompt), served.tokenizer, prompt) if isinstance(prompt, str) else prompt
            for prompt in body.prompts()
        ]
        return await _answer(state, served, body, request, prompts, _chat_writer(body, chat=False))


async def _chat_prompt(served: ServedModel, body: ChatBody) -> list[int]:
    """The ids of a chat, with the tools that the model may see."""
    use = body.tool_use()
    messages = [message.plain() for message in body.messages]
    return await chat_prompt(served.tokenizer, served.tool_format, messages, use.shown if use else ())


def _chat_writer(body: Body, *, chat: bool) -> Callable[[Answers, int], AnswerWriter]:
    usage = body.stream_options is not None and body.stream_options.include_usage
    return partial(Writer, chat=chat, usage=usage, denoising=bool(body.denoising))


def _add_responses(app: FastAPI, state: State) -> None:
    store = state.responses

    def kept(known: str, param: str) -> Kept:
        found = store.get(known)
        if found is None:
            message = f"there is no response {known[:100]!r}; it was not kept, or forgotten since"
            raise ApiError(404, message, param, "response_not_found")
        return found

    @app.post("/v1/responses")
    async def responses(body: ResponseBody, request: Request) -> Response:
        served = state.pick(body.model)
        state.admit(served, 1)
        if not store.most and (body.store or body.previous_response_id is not None):
            raise no_store("store" if body.store else "previous_response_id")
        if body.previous_response_id is not None:
            before = kept_items(kept(body.previous_response_id, "previous_response_id").items)
            body = body.model_copy(update={"input": [*before, *body.input]})
        chat = body.chat()
        items = [item.model_dump(exclude_none=True) for item in body.input]

        def keep(response: dict[str, Any]) -> None:
            store.keep(Kept(response, [*items, *response["output"]]))

        keeps = keep if store.most and body.store is not False else None
        prompts = [await _chat_prompt(served, chat)]
        return await _answer(state, served, chat, request, prompts, partial(ResponseWriter, asked=body, keep=keeps))

    @app.get("/v1/responses/{response_id}")
    async def response(response_id: str) -> dict[str, Any]:
        return kept(response_id, "response_id").response

    @app.delete("/v1/responses/{response_id}")
    async def delete(response_id: str) -> dict[str, Any]:
        kept(response_id, "response_id")
        store.delete(response_id)
        return {"id": response_id, "object": "response", "deleted": True}


def _add_views(app: FastAPI, state: State) -> None:
    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [served.card() for served in state.served.values()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        return state.pick(name).card()

    @app.post("/tokenize", response_model_exclude_none=True)
    async def tokens(body: TokenizeBody) -> Tokens:
        return await tokenize(state.pick(body.model), body)

    @app.post("/detokenize")
    async def text(body: DetokenizeBody) -> Detokenized:
        return await detokenize(state.pick(body.model), body)

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


async def _answer(
    state: State,
    served: ServedModel,
    body: Body,
    request: Request,
    prompts: list[list[int]],
    write: Callable[[Answers, int], AnswerWriter],
) -> Response:
    """Decode `n` answers to every prompt, whole or as a stream."""
    try:
        config = body.decode_config(served.stop_token_ids)
    except ValueError as error:
        raise from_value_error(error) from None
    context = served.engine.max_context
    if (longest := max(len(prompt) for prompt in prompts)) > context:
        message = f"a prompt of {longest} tokens exceeds the context of {context} tokens; shorten it"
        param = "messages" if isinstance(body, ChatBody) else "prompt"
        raise ApiError(400, message, param, "context_length_exceeded")
    grammar = await asyncio.to_thread(compile_grammar, served, body) if body.is_held() else None
    every = [prompt for prompt in prompts for _ in range(body.n or 1)]
    stream, line = bool(body.stream), request.state.log
    counted = sum(len(prompt) for prompt in prompts)
    if spending := request.scope["state"].get("spending"):
        spending.reserve(counted)
    answers = Answers(
        served,
        every,
        config,
        body.stops(),
        body.told(),
        grammar,
        stream=stream,
        deadline=state.config.deadline,
        tools=body.tool_use(),
    )
    writer = write(answers, counted)
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
        if state.traces:
            state.traces.ended(answers, line)

    return Delivery(writer, ended, stream=stream)

"""Responses as OpenAI's JSON: whole, or as the typed events of a stream."""

import json
import secrets
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from parablock.server.answers import Answers
from parablock.server.errors import ApiError
from parablock.server.responses import FlatNamedTool, ResponseBody
from parablock.server.spoken import call_id
from parablock.server.tool_reader import Arguments, Begun, Ended, Event, Said


class ResponseWriter:
    """Writes the answer to one request.

    Args:
        answers: with a single choice.
        prompt_tokens: of its prompt.
        asked: the request.
        keep: told the response once it is whole, if it is to be kept.
    """

    def __init__(
        self,
        answers: Answers,
        prompt_tokens: int,
        asked: ResponseBody,
        keep: Callable[[dict[str, Any]], None] | None,
    ) -> None:
        self.answers = answers
        self.failed = False  # a stream ended with an error
        self._prompt_tokens = prompt_tokens
        self._asked = asked
        self._keep = keep
        self._id = f"resp_{secrets.token_hex(24)}"
        self._created = int(time.time())
        self._items: list[dict[str, Any]] = []  # the output; the last one is open or not
        self._open: dict[str, Any] | None = None
        self._told: list[str] = []  # events that wait to be sent
        self._number = 0  # of the next event

    async def whole(self) -> dict[str, Any]:
        """The response in one object."""
        async for piece in self.answers.pieces():
            self._read(piece.said)
        return self._finish()

    async def events(self) -> AsyncIterator[str]:
        """The response as server-sent events; an error ends it with an event of its own."""
        try:
            async for piece in self.answers.pieces():
                if not self._number:  # until then the request can still go to another replica
                    self._tell("response.created", response=self._response("in_progress"))
                    self._tell("response.in_progress", response=self._response("in_progress"))
                self._read(piece.said)
                for event in self._waiting():
                    yield event
            response = self._finish()
            self._tell(f"response.{response['status']}", response=response)
        except ApiError as error:
            self.failed = True
            details = error.body["error"]
            told = {"code": "server_error", "message": details["message"]}
            self._tell("response.failed", response=self._response("failed", error=told))
        finally:
            self.answers.close()
        for event in self._waiting():
            yield event

    def _waiting(self) -> list[str]:
        told, self._told = self._told, []
        return told

    def _tell(self, type: str, **fields: Any) -> None:
        data = json.dumps({"type": type, "sequence_number": self._number, **fields})
        self._told.append(f"event: {type}\ndata: {data}\n\n")
        self._number += 1

    def _tell_of_item(self, type: str, **fields: Any) -> None:
        assert self._open is not None
        self._tell(type, item_id=self._open["id"], output_index=len(self._items) - 1, **fields)

    def _read(self, said: list[Event]) -> None:
        for event in said:
            match event:
                case Said(text):
                    self._say(text)
                case Begun(name):
                    known = call_id(self.answers.served.tool_format)
                    self._begin("function_call", call_id=known, name=name, arguments="")
                case Arguments(text):
                    assert self._open is not None
                    self._open["arguments"] += text
                    self._tell_of_item("response.function_call_arguments.delta", delta=text)
                case Ended():
                    self._close()

    def _begin(self, type: str, **fields: Any) -> None:
        self._close()
        prefix = "msg" if type == "message" else "fc"
        self._open = {"id": f"{prefix}_{secrets.token_hex(12)}", "type": type, "status": "in_progress", **fields}
        self._items.append(self._open)
        self._tell("response.output_item.added", output_index=len(self._items) - 1, item=self._open)

    def _say(self, text: str) -> None:
        if self._open is None or self._open["type"] != "message":
            self._begin("message", role="assistant", content=[])
            self._tell_of_item("response.content_part.added", content_index=0, part=_part(""))
        assert self._open is not None
        self._open["content"] = [_part(self._open["content"][0]["text"] + text if self._open["content"] else text)]
        if text:
            self._tell_of_item("response.output_text.delta", content_index=0, delta=text, logprobs=[])

    def _close(self, status: str = "completed") -> None:
        """The open item is whole, or cut."""
        if self._open is None:
            return
        item = self._open
        item["status"] = status
        if item["type"] == "message":
            [part] = item["content"]
            self._tell_of_item("response.output_text.done", content_index=0, text=part["text"], logprobs=[])
            self._tell_of_item("response.content_part.done", content_index=0, part=part)
        else:
            told = {"name": item["name"], "arguments": item["arguments"]}
            self._tell_of_item("response.function_call_arguments.done", **told)
        self._tell("response.output_item.done", output_index=len(self._items) - 1, item=item)
        self._open = None

    def _finish(self) -> dict[str, Any]:
        """The whole response; it is kept if it is to be."""
        [choice] = self.answers.choices
        cut = choice.finish_reason == "length"
        if not self._items:
            self._say("")
        self._close("incomplete" if cut else "completed")
        response = self._response("incomplete" if cut else "completed")
        if self._keep:
            self._keep(response)
        return response

    def _response(self, status: str, error: dict[str, Any] | None = None) -> dict[str, Any]:
        asked = self._asked
        ended = status != "in_progress"
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "background": False,
            "error": error,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": asked.metadata or {},
            "model": self.answers.served.name,
            "output": self._items,
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": asked.previous_response_id,
            "reasoning": {"effort": None, "summary": None},
            "store": self._keep is not None,
            "temperature": asked.temperature or 0.0,
            "text": _text_settings(asked),
            "tool_choice": _tool_choice(asked),
            "tools": [tool.model_dump() for tool in asked.tools or []],
            "top_p": 1.0 if asked.top_p is None else asked.top_p,
            "truncation": "disabled",
            "usage": self._usage() if ended else None,
            "user": asked.user,
            **({"parablock": self.answers.figures()} if ended else {}),
        }

    def _usage(self) -> dict[str, Any]:
        usage = self.answers.usage(self._prompt_tokens)
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {**usage["prompt_tokens_details"], "cache_write_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        }


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _text_settings(asked: ResponseBody) -> dict[str, Any]:
    if asked.text is None or asked.text.format is None:
        return {"format": {"type": "text"}}
    return {"format": asked.text.format.model_dump(by_alias=True, exclude_none=True)}


def _tool_choice(asked: ResponseBody) -> Any:
    if isinstance(asked.tool_choice, FlatNamedTool):
        return asked.tool_choice.model_dump()
    return asked.tool_choice or "auto"

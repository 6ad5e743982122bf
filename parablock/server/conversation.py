"""A chat with tools as a model's chat template writes it, and in plain messages where the template knows no tools."""

import asyncio
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from jinja2.exceptions import TemplateError

from parablock.data.chat import encode_rendered, render
from parablock.server.errors import ApiError
from parablock.server.tool_formats import HERMES, Format
from parablock.server.tools import Function

LONG = 20_000  # characters
Result = TypeVar("Result")
INTRODUCTION = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""  # in the words of Hermes and Qwen2.5


async def beside(work: Callable[..., Result], length: int, *content: Any) -> Result:
    """The work's result; with a long content it is done beside the event loop."""
    return work(*content) if length < LONG else await asyncio.to_thread(work, *content)


async def chat_prompt(
    tokenizer: Any,
    format: Format,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Function],
    *,
    add_generation_prompt: bool = True,
) -> list[int]:
    """The ids of a chat.

    Raises:
        ApiError: a chat that the template refuses.
    """
    encode = partial(encode_conversation, add_generation_prompt=add_generation_prompt)
    length = sum(map(len, map(str, (*messages, *tools))))
    try:
        return await beside(encode, length, tokenizer, format, messages, tools)
    except (ValueError, TypeError, LookupError, TemplateError) as error:  # roles that do not alternate, say
        raise ApiError(400, f"messages: the chat template refuses them: {error}", "messages") from None


def encode_conversation(
    tokenizer: Any,
    format: Format,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Function] = (),
    *,
    add_generation_prompt: bool = True,
) -> list[int]:
    """The ids of a chat up to where the next answer starts; the tools are shown to the model in any case."""
    shown = [function.shown() for function in tools]
    if knows_tools(tokenizer):
        messages = [_short_ids(message) for message in messages] if format.short_ids else messages
    else:
        messages, shown = _plainly(messages, shown), []
    text = render(tokenizer, messages, add_generation_prompt=add_generation_prompt, tools=shown or None)
    return encode_rendered(tokenizer, text)


def knows_tools(tokenizer: Any) -> bool:
    """Whether the chat template writes tools itself."""
    return bool(re.search(r"\btools\b", template_of(tokenizer)))


def template_of(tokenizer: Any) -> str:
    """All chat templates of a tokenizer, which may have several by name."""
    template = tokenizer.chat_template
    return "\n".join(template.values()) if isinstance(template, dict) else template or ""


def _plainly(messages: Sequence[Mapping[str, Any]], tools: Sequence[Any]) -> list[dict[str, Any]]:
    """Tools, calls and results as texts of the roles that every template knows, in Hermes' form."""
    plain: list[dict[str, Any]] = []
    for message in messages:
        role, text = message["role"], message["content"]
        if role == "tool":
            text = f"<tool_response>\n{text}\n</tool_response>"
            if plain and plain[-1].get("results"):
                plain[-1]["content"] += f"\n{text}"
            else:
                plain.append({"role": "user", "content": text, "results": True})
            continue
        calls = [f"{HERMES.mark}\n{_json(call['function'])}\n{HERMES.closer}" for call in message.get("tool_calls", [])]
        plain.append({"role": role, "content": "\n".join([*([text] if text or not calls else []), *calls])})
    if tools:
        introduction = INTRODUCTION.format(tools="\n".join(map(_json, tools)))
        if plain[0]["role"] == "system":
            plain[0]["content"] += f"\n\n{introduction}"
        else:
            plain.insert(0, {"role": "system", "content": introduction})
    return [{"role": message["role"], "content": message["content"]} for message in plain]


def _short_ids(message: Mapping[str, Any]) -> dict[str, Any]:
    """With ids as Mistral's templates want them, which other servers' clients do not send."""
    changed = dict(message)
    if "tool_calls" in changed:
        changed["tool_calls"] = [{**call, "id": _short_id(call["id"])} for call in changed["tool_calls"]]
    if "tool_call_id" in changed:
        changed["tool_call_id"] = _short_id(changed["tool_call_id"])
    return changed


def _short_id(known: str) -> str:
    if re.fullmatch(r"[a-zA-Z0-9]{9}", known):
        return known
    return hashlib.blake2b(known.encode(), digest_size=8).hexdigest()[:9]


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)

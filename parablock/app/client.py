"""The page's way to a server: which models it has, and an answer's events as they come."""

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import httpx

SILENCE = 300.0  # seconds without a byte after which a server counts as gone


class ServerError(Exception):
    """What went wrong, in words for the page."""


@dataclass(frozen=True)
class Client:
    """An OpenAI-compatible parablock server. `key`: sent as bearer token."""

    url: str
    key: str | None = None

    def models(self) -> list[dict[str, Any]]:
        """The cards of the server's models.

        Raises:
            ValueError: no server there, it refuses the key, or it is no parablock server.
        """
        try:
            response = httpx.get(self.url + "/v1/models", headers=self._headers, timeout=10, trust_env=False)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ValueError(
                f"url={self.url!r} does not answer ({error}); start a server with: parablock serve"
            ) from None
        if response.status_code in (401, 403):
            raise ValueError(f"url={self.url!r} refuses the key; set PARABLOCK_API_KEY to the server's")
        try:
            cards: list[dict[str, Any]] = response.json()["data"]
            return [card for card in cards if card["parablock"]["block_size"]]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"url={self.url!r} is no parablock server; start one with: parablock serve") from None

    async def chat(self, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """The chunks of one streamed answer with its denoising steps; leaving the loop cancels the answer.

        Raises:
            ServerError: the server is gone, or refuses the request.
        """
        body = {**body, "stream": True, "denoising": True, "stream_options": {"include_usage": True}}
        secure = self.url.startswith("https:")  # certificates take a while to read
        timeout = httpx.Timeout(SILENCE, connect=10)
        try:
            async with (
                httpx.AsyncClient(timeout=timeout, trust_env=False, verify=secure) as http,
                http.stream("POST", self.url + "/v1/chat/completions", json=body, headers=self._headers) as response,
            ):
                if response.status_code != 200:
                    raise ServerError(_refusal(response.status_code, await response.aread()))
                ended = False
                async for line in response.aiter_lines():
                    if not line.startswith("data: "):
                        continue
                    if ended := line == "data: [DONE]":
                        break
                    chunk = json.loads(line[len("data: ") :])
                    if "error" in chunk:
                        raise ServerError(chunk["error"]["message"])
                    yield chunk
                if not ended:
                    raise ServerError("The server ended the answer too early; ask again.")
        except httpx.ConnectError:
            raise ServerError(f"The server at {self.url} is gone. Start it again, then ask again.") from None
        except httpx.HTTPError as error:
            raise ServerError(f"The connection to {self.url} broke ({type(error).__name__}); ask again.") from None

    @property
    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}


def _refusal(status: int, body: bytes) -> str:
    try:
        return f"The server refuses this: {json.loads(body)['error']['message']}"
    except (ValueError, KeyError, TypeError):
        return f"The server answers with status {status}; look at its log."

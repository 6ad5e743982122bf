"""What the bodies of requests are made of: texts of whole characters, and objects that refuse what they do not know."""

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict

MEDIA = ("image", "audio", "file", "video")
DEEPEST = 64  # levels of a JSON value inside a body


class Strict(BaseModel):
    """Unknown fields and wrong types are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def _whole_characters(text: str) -> str:
    """JSON can escape half a character, which is no text."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError("half a surrogate pair is no text; send whole characters") from None
    return text


def plain_json(value: dict[str, Any]) -> dict[str, Any]:
    """The same value, of whole characters and finite numbers, nested no deeper than anybody needs.

    Raises:
        ValueError: it is no such value.
    """
    if not isinstance(value, dict):
        raise ValueError(f"{type(value).__name__} is no JSON object")
    level: list[Any] = [value]
    for _ in range(DEEPEST):
        inner: list[Any] = []
        for entry in level:
            if isinstance(entry, dict):
                inner += [*entry.keys(), *entry.values()]
            elif isinstance(entry, list):
                inner += entry
            elif isinstance(entry, str):
                _whole_characters(entry)
            elif isinstance(entry, float) and (entry != entry or abs(entry) == float("inf")):
                raise ValueError(f"{entry} is no number of JSON")
        level = inner
    if level:
        raise ValueError(f"nested deeper than {DEEPEST} levels; flatten it")
    return value


def _no_media(content: Any) -> Any:
    """Models here read text alone: say so, rather than how a text is written."""
    for part in content if isinstance(content, list) else []:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and any(medium in kind for medium in MEDIA):
            raise ValueError(f"{kind[:40]!r} is not supported, the models here read text alone; send text")
    return content


Text = Annotated[str, AfterValidator(_whole_characters)]
Json = Annotated[dict[str, Any], AfterValidator(plain_json)]
NoMedia = BeforeValidator(_no_media)

"""What a request may ask of its answer's form, as OpenAI and vLLM name it, and the grammar it stands for."""

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from parablock.decoding.grammar import Grammar, Kind


def _whole_characters(text: str) -> str:
    """JSON can escape half a character, which is no text."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError("half a surrogate pair is no text; send whole characters") from None
    return text


Text = Annotated[str, AfterValidator(_whole_characters)]
Schema = dict[str, Any] | Text


class Strict(BaseModel):
    """Unknown fields and wrong types are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class JsonSchema(Strict):
    """OpenAI's description of a schema; it is kept to whether `strict` or not."""

    name: Text = Field(min_length=1, max_length=64)
    description: Text | None = None
    json_schema: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    """OpenAI's `response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> "ResponseFormat":
        if (self.json_schema is not None) != (self.type == "json_schema"):
            raise ValueError("response_format takes a json_schema with the type 'json_schema', and only then")
        return self


class StructuredOutputs(Strict):
    """vLLM's `structured_outputs`: one of these."""

    json_schema: Schema | None = Field(None, alias="json")
    regex: Text | None = None
    choice: list[Text] | None = Field(None, min_length=1)
    grammar: Text | None = None
    json_object: bool | None = None


class Structured(Strict):
    """The fields of a request that hold its answer to a form; one of them at a time."""

    response_format: ResponseFormat | None = Field(None, description="Any JSON object, or JSON by a schema.")
    structured_outputs: StructuredOutputs | None = Field(
        None, description="JSON by a schema (`json`), `json_object`, `regex`, `choice`, or a `grammar` in Lark."
    )
    guided_json: Schema | None = Field(None, description="JSON by this schema.")
    guided_regex: Text | None = Field(None, description="A text that this regular expression matches as a whole.")
    guided_choice: list[Text] | None = Field(None, min_length=1, description="One of these texts.")
    guided_grammar: Text | None = Field(None, description="A text of this grammar, in Lark.")

    @model_validator(mode="after")
    def _one_form(self) -> "Structured":
        if len(asked := self._asked()) > 1:
            forms = " and ".join(f"{field} ({kind})" for field, kind, _ in asked)
            raise ValueError(f"{asked[1][0]}: only one form of the answer can be asked for, not {forms}; leave one out")
        self.grammar()
        return self

    def grammar(self) -> Grammar | None:
        """What the answer is held to, if anything.

        Raises:
            ValueError: it is too large; the message begins with the field.
        """
        for field, kind, source in self._asked():
            try:
                return Grammar(kind, source if isinstance(source, str) else json.dumps(source))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{field}: {error}") from None
        return None

    def grammar_field(self) -> str:
        """The field that asks for the grammar."""
        return self._asked()[0][0]

    def _asked(self) -> list[tuple[str, Kind, Any]]:
        """The fields that ask for a form: how what they hold is read, and what they hold."""
        form, outputs = self.response_format, self.structured_outputs or StructuredOutputs.model_construct()
        asked: list[tuple[str, Kind, Any]] = [
            ("response_format", "json_object", "" if form is not None and form.type == "json_object" else None),
            ("response_format", "json_schema", form.json_schema.json_schema if form and form.json_schema else None),
            ("structured_outputs", "json_object", "" if outputs.json_object else None),
            ("structured_outputs", "json_schema", outputs.json_schema),
            ("structured_outputs", "regex", outputs.regex),
            ("structured_outputs", "choice", outputs.choice),
            ("structured_outputs", "lark", outputs.grammar),
            ("guided_json", "json_schema", self.guided_json),
            ("guided_regex", "regex", self.guided_regex),
            ("guided_choice", "choice", self.guided_choice),
            ("guided_grammar", "lark", self.guided_grammar),
        ]
        return [entry for entry in asked if entry[2] is not None]

"""instructor takes pydantic models out of text: by a forced tool or a JSON schema, whole or part by part.

OPENAI_BASE_URL=http://127.0.0.1:8000/v1 OPENAI_API_KEY=none python examples/clients/with_instructor.py
"""

from typing import Literal

import instructor
import openai
from pydantic import BaseModel, ConfigDict, Field

MODEL = "smollm2"
TEXT = "Jason is 25 years old. He lives in Oslo and plays the piano."
MESSAGES = [{"role": "user", "content": f"Tell about this person: {TEXT}"}]


class Person(BaseModel):
    """A person in a text."""

    model_config = ConfigDict(extra="forbid")  # a small model would add properties without end

    name: str = Field(max_length=20)
    age: int = Field(ge=0, le=150)
    city: Literal["Oslo", "Rome"]


def client(mode: instructor.Mode) -> instructor.Instructor:
    """The address and the key are in the environment."""
    return instructor.from_openai(openai.OpenAI(max_retries=0), mode=mode)


asked = {"model": MODEL, "messages": MESSAGES, "max_retries": 0, "max_tokens": 150}
for mode in (instructor.Mode.TOOLS, instructor.Mode.TOOLS_STRICT, instructor.Mode.JSON_SCHEMA):
    person = client(mode).chat.completions.create(response_model=Person, **asked)
    assert (person.name, person.age, person.city) == ("Jason", 25, "Oslo"), (mode, person)
    print(f"{mode.name.lower()}: {person}")

for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
    *parts, last = client(mode).chat.completions.create_partial(response_model=Person, **asked)
    assert (last.name, last.age, last.city) == ("Jason", 25, "Oslo"), last
    assert any(part.name is not None and part.city is None for part in parts), parts
    print(f"{mode.name.lower()}, streamed: the same, part by part")

"""LangChain's ChatOpenAI: answers, streams, tools and a loop of two turns, structured output, log-probabilities.

OPENAI_BASE_URL=http://127.0.0.1:8000/v1 OPENAI_API_KEY=none python examples/clients/with_langchain.py
"""

from typing import Literal

from langchain_core.messages import HumanMessage, SystemMessage, ToolMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel

MODEL = "smollm2"
QUESTION = "How is the weather in Oslo?"


@tool
def weather(city: Literal["Oslo", "Rome"]) -> str:
    """The weather in a city."""
    return f"It is snowing in {city}."


class Person(BaseModel):
    """A person in a text."""

    name: str
    age: int


# the address and the key are in the environment
model = ChatOpenAI(model=MODEL, max_tokens=100, temperature=0, stream_usage=True, max_retries=0)
answer = model.invoke([SystemMessage("Answer in one word."), HumanMessage("What is the capital of France?")])
assert "Paris" in answer.content, answer
assert answer.usage_metadata["output_tokens"] > 0, answer
print("invoke: an answer, with its usage")

pieces = list((ChatPromptTemplate([("user", "Count to {n}.")]) | model).stream({"n": "five"}))
whole = model.invoke("Count to five.")
assert "".join(piece.content for piece in pieces) == whole.content, pieces
assert sum(piece.usage_metadata["output_tokens"] for piece in pieces if piece.usage_metadata) > 0, pieces
print("stream: the same answer in pieces, with its usage")
assert [message.content for message in model.batch(["Count to five."] * 3)] == [whole.content] * 3
print("batch: three at once")

for choice in ("any", "weather"):
    asking = model.bind_tools([weather], tool_choice=choice, strict=True, parallel_tool_calls=False)
    call = asking.invoke(QUESTION)
    pieces = list(asking.stream(QUESTION))
    for message in (call, sum(pieces[1:], pieces[0])):
        assert [(c["name"], c["args"]) for c in message.tool_calls] == [("weather", {"city": "Oslo"})], message
result = weather.invoke(call.tool_calls[0])
assert isinstance(result, ToolMessage)
told = model.bind_tools([weather], tool_choice="none").invoke([HumanMessage(QUESTION), call, result])
assert "snow" in told.content, told
print("bind_tools: forced calls, whole and streamed, and an answer from the tool's result")

text = "Jason is 25 years old. Write his name and age as JSON."
for method in ("json_schema", "function_calling"):
    person = model.with_structured_output(Person, method=method).invoke(text)
    assert person.age == 25, person
print("with_structured_output, by json_schema and function_calling")
told = model.bind(logprobs=True, top_logprobs=2).invoke(text).response_metadata["logprobs"]["content"]
assert all(token["logprob"] <= 0 and len(token["top_logprobs"]) == 2 for token in told), told
print("logprobs: of every token")

typed = ChatOpenAI(model=MODEL, use_responses_api=True, max_tokens=100, temperature=0, max_retries=0)
assert typed.invoke("Count to five.").text == whole.content
assert "".join(piece.text for piece in typed.stream("Count to five.")) == whole.content
call = typed.bind_tools([weather], tool_choice="weather", strict=True).invoke(QUESTION)
assert call.tool_calls[0]["args"] == {"city": "Oslo"}, call
assert typed.with_structured_output(Person).invoke(text).age == 25
print("use_responses_api: the same answer, whole and streamed, a tool, structured output")

text = OpenAI(model=MODEL, max_tokens=20, temperature=0, max_retries=0).batch(["One, two, three,", "Monday, Tuesday,"])
assert all(text), text
print("OpenAI, the class of completions: two prompts in one request")

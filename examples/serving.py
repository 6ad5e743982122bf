"""The openai client against `parablock serve`: chat, a stream with its denoising, many at once.

parablock serve bundled &
python examples/serving.py http://127.0.0.1:8000/v1
"""

import asyncio
import os
import sys

import openai

url, key = sys.argv[1], os.environ.get("PARABLOCK_API_KEY", "none")
messages = [{"role": "user", "content": "Mara has 4 boxes with 6 pencils in each. How many pencils does Mara have?"}]

client = openai.OpenAI(base_url=url, api_key=key)
whole = client.chat.completions.create(model="bundled", messages=messages, extra_body={"threshold": 0.8})
print(whole.choices[0].message.content)
print(whole.usage.completion_tokens, "tokens,", whole.parablock["tokens_per_forward"], "tokens per forward")

# as it is decoded: `denoising` shows the block, masks and all, after every step
stream = client.chat.completions.create(
    model="bundled", messages=messages, stream=True, extra_body={"denoising": True, "sub_block_size": 32}
)
for chunk in stream:
    if step := (chunk.model_extra or {}).get("denoising"):
        print(step["forward"], "".join("_" if token["masked"] else token["text"] for token in step["tokens"]))


async def ask_many(count: int) -> list[str]:
    """All at once: one forward of the server serves all that run."""
    async with openai.AsyncOpenAI(base_url=url, api_key=key) as many:
        asked = [many.chat.completions.create(model="bundled", messages=messages) for _ in range(count)]
        return [answer.choices[0].message.content for answer in await asyncio.gather(*asked)]


print(len(set(asyncio.run(ask_many(16)))), "distinct answer of 16")

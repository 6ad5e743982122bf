"""Answer two questions with the bundled model, several tokens per forward, and look at every step of a third."""

import parablock as pb
from parablock.data.chat import encode_prompt

model, tokenizer = pb.load("bundled")  # or a directory, or a hub id

questions = [
    "Teki had 40 coins but lost 8 of them. Teki buys 8 more. How many coins does Teki have now?",
    "Mara buys 5 shells every day for 6 days. Mara gives half of them to Lisa. How many shells does Mara have now?",
]
prompts = [encode_prompt(tokenizer, [{"role": "user", "content": q}]) for q in questions]

out = pb.generate(model, prompts, pb.DecodeConfig(threshold=0.9))
for row in out.tokens:
    print(tokenizer.decode(row, skip_special_tokens=True), end="\n\n")
print(f"{out.new_tokens} tokens, {out.tokens_per_forward:.1f} per forward, {out.tokens_per_second:.0f} per second\n")

for number, step in enumerate(pb.stream(model, prompts[0]), start=1):
    known = ["_" if masked else tokenizer.decode([i]) for i, masked in zip(step.ids[0], step.masked[0], strict=True)]
    print(f"{number:3d}", "|".join(known).replace("\n", "\\n"))

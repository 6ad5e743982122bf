"""Many requests on one model: submit, stream, cancel."""

import parablock as pb
from parablock.data.chat import encode_prompt

model, tokenizer = pb.load("bundled")
questions = [
    "Mara has 4 boxes with 6 pencils in each. Mara buys 5 more. How many pencils does Mara have now?",
    "Teki had 40 coins but lost 8 of them. Teki buys 8 more. How many coins does Teki have now?",
    "Lio had 30 books but lost 12 of them. Lio buys 4 more. How many books does Lio have now?",
]
prompts = [encode_prompt(tokenizer, [{"role": "user", "content": question}]) for question in questions]

with pb.Engine(model, pb.EngineConfig(max_rows=16)) as engine:
    # all at once, as with pb.generate
    for tokens in engine.generate(prompts).tokens:
        print(tokenizer.decode(tokens, skip_special_tokens=True))

    # or one by one, each with its own settings; a thread runs the steps
    engine.start()
    careful = engine.submit(pb.Request(prompts[0], pb.DecodeConfig(threshold=1.0)))
    live = engine.submit(pb.Request(prompts[1], stream=True))
    dropped = engine.submit(pb.Request(prompts[2]))
    dropped.cancel()
    for update in live.updates():
        masks = int(update.masked.sum())
        print(f"{tokenizer.decode(update.tokens)!r}, {masks} positions of the block still masked")
    print(len(careful.result()), careful.finish_reason, f"{1000 * careful.first_token:.0f} ms to the first token")
    print(engine.stats)

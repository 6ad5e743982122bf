"""One checkpoint everywhere: export it, then decode it as transformers' users do.

    python examples/checkpoints.py

Here the checkpoint is the bundled one. The middle part runs a published model unchanged: put
"Efficient-Large-Model/Fast_dLLM_v2_1.5B" in the place of `official`.
"""

import tempfile
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, TextDiffusionStreamer

import parablock as pb

model, tokenizer = pb.load("bundled")
folder = Path(tempfile.mkdtemp())
official = folder / "official"
pb.export(model, tokenizer, official, "official")  # or: parablock export bundled -o DIR --layout official
question = "Mara has 4 boxes with 6 pencils in each. Mara buys 5 more. How many pencils does Mara have now?"
messages = [{"role": "user", "content": question}]

# a checkpoint in the published layout, through transformers alone: importing parablock is enough, no remote code
model = AutoModelForCausalLM.from_pretrained(official, dtype="auto", device_map="auto")
tokenizer = AutoTokenizer.from_pretrained(official)
text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
inputs = tokenizer([text], return_tensors="pt").to(model.device)
ids = model.generate(inputs["input_ids"], tokenizer=tokenizer, max_new_tokens=128, small_block_size=8, threshold=0.9)
print(tokenizer.decode(ids[0][inputs["input_ids"].shape[1] :], skip_special_tokens=True), end="\n\n")

# a stock model: block diffusion behind transformers' own generate, drafts shown while they are denoised
stock = folder / "stock"
pb.export(model, tokenizer, stock)
model, tokenizer = pb.load(stock)
streamer = TextDiffusionStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
model.generate(**inputs, custom_generate=pb.custom_generate, threshold=0.9, max_new_tokens=128, streamer=streamer)

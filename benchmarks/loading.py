"""What loading a checkpoint costs: peak memory beside the checkpoint's size, and time; parablock, plain transformers.

    python benchmarks/loading.py

Random weights in the shape of Qwen2.5-0.5B (bf16, about 1 GB), as an AR checkpoint and as a block-diffusion one, in one
file and in five. Every load runs in a process of its own. Memory is what the process's resident set grew by at most,
while it loaded and ran one forward; "own" leaves out the pages of mapped files, which the system takes back when it
needs them. Prints a table and writes `benchmarks/results/loading.json`.
"""

import json
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from common import in_turns, options, setting, write
from transformers import AutoTokenizer

from parablock.bench.shapes import random_model
from parablock.checkpoints.load import BUNDLED

LOAD = """
import json, sys, threading, time, warnings
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM
import parablock as pb
warnings.simplefilter("ignore")
how, path = sys.argv[1:]

def resident():
    fields = dict(line.split(":") for line in open("/proc/self/status") if line.startswith(("RssAnon", "RssFile")))
    return [int(value.split()[0]) / 1024 for value in fields.values()]

pb.load("bundled", device="cpu")  # what is imported on the way is not the checkpoint's
base, peak, done = resident(), [0.0, 0.0], threading.Event()

def watch():
    while not done.is_set():
        own, mapped = (now - before for now, before in zip(resident(), base))
        peak[0], peak[1] = max(peak[0], own), max(peak[1], own + mapped)
        time.sleep(0.001)

watcher = threading.Thread(target=watch)
watcher.start()
start = time.perf_counter()
if how == "transformers":
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto"), AutoTokenizer.from_pretrained(path)
else:
    model = pb.load(path, dtype=how, device="cpu")
seconds = time.perf_counter() - start
with torch.inference_mode():
    model[0](torch.zeros(1, 1, dtype=torch.long))
done.set()
watcher.join()
print("RESULT", json.dumps({"own": peak[0], "resident": peak[1], "seconds": seconds}))
"""


def write_checkpoints(folder: Path) -> None:
    """The same random weights in three directories."""
    model = random_model("0.5b", block_size=32, dtype=torch.bfloat16, device="cpu")
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED / "diffusion")
    model.config.mask_token_id = tokenizer.mask_token_id
    for name, shard in (("1 file", "50GB"), ("5 files", "250MB"), ("AR, 1 file", "50GB")):
        if name.startswith("AR"):
            del model.config.bd_size, model.config.mask_token_id
            tokenizer.mask_token = None
        model.save_pretrained(folder / name, max_shard_size=shard)
        tokenizer.save_pretrained(folder / name)


def load(how: str, path: Path) -> Any:
    out = subprocess.run([sys.executable, "-c", LOAD, how, str(path)], capture_output=True, text=True, check=True)
    return json.loads(out.stdout.split("RESULT")[1])


def main() -> None:
    args = options(__doc__, repeats=5)
    names = ("AR, 1 file", "1 file", "5 files")
    cases = [(how, name) for how in ("transformers", "auto") for name in names] + [("float32", "1 file")]
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoints(Path(folder))
        size = sum(f.stat().st_size for f in Path(folder, "1 file").glob("*.safetensors")) / 2**20
        seen = in_turns({case: partial(load, case[0], Path(folder, case[1])) for case in cases}, args.repeats)
    rows = []
    for (how, name), runs in seen.items():
        loader = "transformers, dtype auto" if how == "transformers" else f"parablock, dtype {how}"
        found = pd.DataFrame(runs)
        memory = (found[["own", "resident"]].median() / size).to_dict()
        rows.append({"loader": loader, "checkpoint": name, **memory, "seconds": sorted(found.seconds)})
    print(
        f"{size:.0f} MiB of bf16 weights; memory over size, medians of {args.repeats}\n{pd.DataFrame(rows).to_string()}"
    )
    write("loading", {**setting(args), "mebibytes": size, "repeats": args.repeats, "results": rows})


if __name__ == "__main__":
    main()

"""What loading a checkpoint costs: peak memory beside the checkpoint's size, and time; parablock, plain transformers.

    python benchmarks/loading.py

Random weights in the shape of Qwen2.5-0.5B (bf16, about 1 GB), as an AR checkpoint and as a block-diffusion one, in one
file and in five. Every load runs in a process of its own. Memory is what the process's resident set grew by at most,
while it loaded and ran one forward; "own" leaves out the pages of mapped files, which the system takes back when it
needs them. Prints a table and writes `benchmarks/results/loading.json`.
"""

import itertools
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import torch
from common import in_turns, options, setting, write
from transformers import AutoModelForCausalLM, AutoTokenizer

import parablock as pb
from parablock.bench.shapes import random_model
from parablock.checkpoints.named import BUNDLED


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


def load(how: str, path: Path) -> dict[str, float]:
    """Seconds of a load, and the mebibytes that this process grew by until a forward was done."""
    pb.load("bundled", device="cpu")  # what is imported on the way is not the checkpoint's
    seen, done = [], threading.Event()

    def sample() -> None:
        memory = psutil.Process().memory_info()
        seen.append((memory.rss - memory.shared, memory.rss))

    def watch() -> None:
        while not done.wait(0.001):
            sample()

    sample()
    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    if how == "transformers":
        model, _ = AutoModelForCausalLM.from_pretrained(path, dtype="auto"), AutoTokenizer.from_pretrained(path)
    else:
        model, _ = pb.load(str(path), dtype=how, device="cpu")
    seconds = time.perf_counter() - start
    with torch.inference_mode():
        model(torch.zeros(1, 1, dtype=torch.long))
    done.set()
    watcher.join()
    sample()
    own, resident = (np.max(seen, axis=0) - seen[0]) / 2**20
    return {"own": own, "resident": resident, "seconds": seconds}


def main() -> None:
    args = options(__doc__, repeats=5)
    names = ("AR, 1 file", "1 file", "5 files")
    cases = [*itertools.product(("transformers", "auto"), names), ("float32", "1 file")]
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoints(Path(folder))
        size = sum(f.stat().st_size for f in Path(folder, "1 file").glob("*.safetensors")) / 2**20
        with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
            run = lambda how, name: pool.submit(load, how, Path(folder, name)).result()  # noqa: E731
            seen = in_turns({case: partial(run, *case) for case in cases}, args.repeats)
    rows = []
    for (how, name), runs in seen.items():
        loader = "transformers, dtype auto" if how == "transformers" else f"parablock, dtype {how}"
        found = pd.DataFrame(runs)
        memory = (found[["own", "resident"]].median() / size).to_dict()
        rows.append({"loader": loader, "checkpoint": name, **memory, "seconds": sorted(found.seconds)})
    print(pd.DataFrame(rows).to_string())
    write("loading", {**setting(args), "mebibytes": size, "repeats": args.repeats, "results": rows})


if __name__ == "__main__":
    main()

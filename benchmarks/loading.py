"""What loading a checkpoint costs: peak memory beside the checkpoint's size, and time; parablock, plain transformers.

    python benchmarks/loading.py

Random weights in the shape of Qwen2.5-0.5B (bf16, about 1 GB), as an AR checkpoint and as a block-diffusion one, in one
file and in five. Every load runs in a process of its own. Memory is what the process's resident set grew by at most,
while it loaded and ran one forward; "own" leaves out the pages of mapped files, which the system takes back when it
needs them. Prints a table, then one JSON line, and writes `benchmarks/results/loading.json`.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from common import setting, write

LOAD = """
import json, sys, threading, time, warnings
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM
import parablock as pb
from parablock.checkpoints.load import load
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
    model = load(path, dtype=how, device="cpu")
seconds = time.perf_counter() - start
with torch.inference_mode():
    model[0](torch.zeros(1, 1, dtype=torch.long))
done.set()
watcher.join()
print("RESULT", json.dumps({"own": peak[0], "resident": peak[1], "seconds": seconds}))
"""


def write_checkpoints(folder: Path) -> dict[str, Path]:
    """The same random weights in three directories."""
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    from parablock.checkpoints.look import BUNDLED

    config = Qwen2Config(
        vocab_size=151936, hidden_size=896, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
        intermediate_size=4864, tie_word_embeddings=True, dtype="bfloat16",
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2ForCausalLM._from_config(config)
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED / "diffusion")
    paths = {"AR, 1 file": folder / "ar", "1 file": folder / "one", "5 files": folder / "five"}
    for name, path in paths.items():
        if name != "AR, 1 file":
            model.config.bd_size, model.config.mask_token_id = 32, 3
        model.save_pretrained(path, max_shard_size="250MB" if name == "5 files" else "50GB")
        tokenizer.save_pretrained(path)
    tokenizer.mask_token = None
    shutil.rmtree(paths["AR, 1 file"] / "tokenizer", ignore_errors=True)
    tokenizer.save_pretrained(paths["AR, 1 file"])
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    with tempfile.TemporaryDirectory() as scratch:
        paths = write_checkpoints(Path(scratch))
        size = sum(f.stat().st_size for f in paths["1 file"].glob("*.safetensors")) / 2**20
        cases = [(how, name) for how in ("transformers", "auto") for name in paths] + [("float32", "1 file")]
        results: dict[tuple[str, str], list[dict[str, float]]] = {case: [] for case in cases}
        for _ in range(repeats):
            for how, name in cases:  # in turns
                command = [sys.executable, "-c", LOAD, how, str(paths[name])]
                out = subprocess.run(command, capture_output=True, text=True, check=True)
                results[how, name].append(json.loads(out.stdout.split("RESULT")[1]))
    rows = []
    print(f"checkpoint: {size:.0f} MiB of bf16 weights; medians of {repeats}\n")
    print("| loader | checkpoint | own memory / size | resident / size | seconds (min to max) |\n|---|---|---|---|---|")
    for (how, name), runs in results.items():
        loader = "transformers, dtype auto" if how == "transformers" else f"parablock, dtype {how}"
        own, resident = (statistics.median(r[key] for r in runs) / size for key in ("own", "resident"))
        seconds = sorted(r["seconds"] for r in runs)
        spread = f"{statistics.median(seconds):.2f} ({seconds[0]:.2f} to {seconds[-1]:.2f})"
        print(f"| {loader} | {name} | {own:.2f} | {resident:.2f} | {spread} |")
        rows.append({"loader": loader, "checkpoint": name, "own": own, "resident": resident, "seconds": seconds})
    report = {**setting("python benchmarks/loading.py"), "mebibytes": size, "repeats": repeats, "results": rows}
    write("loading", report)


if __name__ == "__main__":
    main()

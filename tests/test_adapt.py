"""`parablock adapt` as users run it: files and formats in, a checkpoint out; recipes, dry run, resume, bad input."""

import itertools
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from bundle_model import STAGES
from processes import run, run_program, start
from recipe_costs import with_cost
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoTokenizer

import parablock as pb
from parablock.adapt import adapt
from parablock.checkpoints.look import look
from parablock.checkpoints.named import BUNDLED
from parablock.data.chat import IGNORE, encode_chat
from parablock.data.formats import to_chat
from parablock.data.packing import pack
from parablock.data.sources import load_data
from parablock.data.word_problems import word_problem
from parablock.diffusion.gate import gate_of
from parablock.training.config import AdaptConfig
from parablock.training.cost import Shape, estimate
from parablock.training.recipe import make_config, read_recipe

OFFICIAL = Path(__file__).parent / "official"
SMALL = ("--batch-size", "4", "--micro-batch-size", "4", "--context-length", "256", "--log-every", "1")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(BUNDLED / "diffusion")


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


CHAT = [{"role": "user", "content": "Two and two?"}, {"role": "assistant", "content": "Four."}]
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": CHAT}, CHAT),
        (
            {"conversations": [{"from": "human", "value": "Two and two?"}, {"from": "gpt", "value": "Four."}], "id": 3},
            CHAT,
        ),
        ({"instruction": "Two and two?", "input": "", "output": "Four."}, CHAT),
        ({"instruction": "Add.", "input": "2 2", "output": "4"}, [("user", "Add.\n\n2 2"), ("assistant", "4")]),
        ({"prompt": "Two and two?", "completion": "Four."}, CHAT),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, CHAT),
        ({"question": "Two and two?", "answer": "Four."}, CHAT),
        ({"input": CHAT[:1], "output": "Four.", "system_prompt": "Be brief.", "category": "math"}, [SYSTEM, *CHAT]),
        ({"text": "All of this."}, "All of this."),
    ],
    ids=["messages", "sharegpt", "alpaca", "alpaca-input", "prompt", "prompt-messages", "gsm8k", "nemotron", "text"],
)
def test_formats(row: dict[str, Any], expected: Any) -> None:
    if isinstance(expected, list):
        expected = [{"role": m[0], "content": m[1]} if isinstance(m, tuple) else m for m in expected]
    assert to_chat(row) == expected


def test_unknown_formats_are_named() -> None:
    with pytest.raises(ValueError, match=r"the columns body, title are no known format; expected messages"):
        to_chat({"title": "a", "body": "b"})
    with pytest.raises(ValueError, match=r"a message has the fields speaker, words; expected from and value"):
        to_chat({"conversations": [{"speaker": "a", "words": "b"}]})


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "folder"])
@pytest.mark.parametrize("streaming", [False, True])
def test_files(tokenizer: Any, tmp_path: Path, kind: str, streaming: bool) -> None:
    chats = [word_problem("train", 7, i).messages() for i in range(12)]
    rows = [{"messages": chat} for chat in chats]
    path = tmp_path / f"data.{kind}"
    if kind == "parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif kind == "folder":
        path.mkdir()
        write_rows(path / "a.jsonl", rows[:5])
        write_rows(path / "b.jsonl", rows[5:])
    else:
        write_rows(path, rows)
    data = load_data(tokenizer, str(path), context_length=256, streaming=streaming, max_samples=10)
    expected = [encode_chat(tokenizer, chat) for chat in chats[:10]]
    assert [data.samples[i] for i in range(len(data.samples))] == expected
    assert list(data.lengths or ()) == [len(sample.input_ids) for sample in expected]
    assert data.counts["kept"] == 10


def test_too_long_samples_are_counted_and_treated_as_asked(tokenizer: Any, tmp_path: Path) -> None:
    chats = [word_problem("train", 7, i).messages() for i in range(20)]
    path = write_rows(tmp_path / "data.jsonl", [{"messages": chat} for chat in chats])
    lengths = [len(encode_chat(tokenizer, chat).input_ids) for chat in chats]
    limit = sorted(lengths)[10]
    over = sum(length > limit for length in lengths)
    dropped = load_data(tokenizer, str(path), context_length=limit, too_long="drop")
    assert (dropped.counts["kept"], dropped.counts["too long"]) == (20 - over, over)
    cut = load_data(tokenizer, str(path), context_length=limit, too_long="truncate")
    assert (len(cut.samples), cut.counts["truncated"]) == (20, over)
    assert max(cut.lengths or ()) == limit
    with pytest.raises(ValueError, match=f"more than context_length={limit}"):
        load_data(tokenizer, str(path), context_length=limit, too_long="refuse")


def test_gsm8k_with_the_published_tokenizer_counted_twice() -> None:
    """Real text through Qwen2.5's template (a cut of its tokenizer), against a plain second computation."""
    tokenizer = AutoTokenizer.from_pretrained(OFFICIAL)
    path = Path(__file__).parent / "gsm8k_head.jsonl"  # the first problems of GSM8K's training file (MIT licence)
    data = load_data(tokenizer, str(path), context_length=2048)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    head = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    head += "{}<|im_end|>\n<|im_start|>assistant\n"
    encode = lambda text: tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids  # noqa: E731
    blocks = 0
    assert len(rows) == len(data.samples) == 40
    for row, sample in zip(rows, (data.samples[i] for i in range(40)), strict=True):
        prompt, answer = encode(head.format(row["question"])), encode(row["answer"] + "<|im_end|>")
        assert sample.input_ids == prompt + answer
        assert sample.labels == [IGNORE] * len(prompt) + answer
        blocks += -(-len(sample.input_ids) // 32)
    packed = pack(data.lengths or (), 32, 2048)
    assert sorted(i for row in packed for i in row) == list(range(40))
    assert -(-blocks // 64) <= len(packed) <= -(-blocks // 64) + 1


def test_adapt_from_a_file_to_a_checkpoint(tmp_path: Path) -> None:
    chats = [{"messages": word_problem("train", 7, i).messages()} for i in range(80)]
    data = write_rows(tmp_path / "chats.jsonl", chats)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        yaml.safe_dump({"data": str(data), "steps": 3, "lr": "1e-3", "check_every": 2, "check_samples": 4})
    )
    out = run("adapt", "bundled-ar", "--recipe", recipe, "-o", tmp_path / "run", *SMALL, "--steps", "4", cold=True)
    assert out.returncode == 0, out.stderr
    for said in ("80 kept", "fill rate", "cost:", "step      4  loss", "check: ", "is the checkpoint"):
        assert said in out.stdout, said
    assert {p.name for p in (tmp_path / "run").iterdir()} >= {"model", "recipe.yaml", "log.jsonl", "loss.png"}
    model, tokenizer = pb.load(tmp_path / "run" / "model")
    assert (model.config.bd_size, model.config.mask_token_id) == (32, 3)
    assert pb.generate(model, tokenizer("4+7=")["input_ids"], pb.DecodeConfig(max_new_tokens=8)).tokens
    written = read_recipe(tmp_path / "run" / "recipe.yaml")
    assert (written["steps"], written["lr"], written["model"]) == (4, 1e-3, "bundled-ar")
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2, 3, 4]
    assert [entry["step"] for entry in log if "accuracy" in entry] == [2, 4]
    again = run("adapt", "bundled-ar", "--recipe", recipe, "-o", tmp_path / "run", *SMALL)
    assert (again.returncode, len(again.stderr.strip().splitlines())) == (2, 1)
    assert "holds a finished run" in again.stderr
    # the written recipe makes the same run again
    out = run("adapt", "--recipe", tmp_path / "run" / "recipe.yaml", "-o", tmp_path / "again")
    assert out.returncode == 0, out.stderr
    first, second = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("run", "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_sigterm_says_how_to_continue(tmp_path: Path) -> None:
    options = ("--data", "word-problems", "-o", str(tmp_path / "run"), "--steps", "1000", "--save-every", "500", *SMALL)
    with start("adapt", "bundled-ar", *options, cold=True, environment={"PYTHONUNBUFFERED": "1"}) as process:
        process.wait_for("^step      3")
        process.terminate()
        assert process.wait() == 143
        said = process.err
    assert said.strip().splitlines()[-1].startswith("parablock: stopped by SIGTERM after step")
    assert "--resume continues" in said
    assert list((tmp_path / "run" / "run").glob("checkpoint-*/whole"))


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    out = run("adapt", "bundled-ar", "--data", "word-problems", "-o", tmp_path / "run", *SMALL, "--dry-run")
    assert out.returncode == 0, out.stderr
    assert "<|im_start|>assistant" in out.stdout
    assert "GPU-hours" in out.stdout
    assert not (tmp_path / "run").exists()


def test_lora_under_torchrun(tmp_path: Path) -> None:
    options = (*SMALL, "--steps", "2", "--lora-rank", "4", "--micro-batch-size", "2", "--block-size", "16")
    chats = [{"messages": word_problem("train", 7, i).messages()} for i in range(60)]
    data = write_rows(tmp_path / "chats.jsonl", chats)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "parablock", "adapt", "bundled-ar", "--data", data, "-o", tmp_path / "run", *options]
    out = run_program(command)
    assert out.returncode == 0, out.stderr
    assert out.stdout.count("fill rate") == 1  # the first process speaks
    assert out.stderr.count("tokenizing:   0%") == 1  # and tokenizes, for both (a bar may tell its end twice)
    model, tokenizer = pb.load(tmp_path / "run" / "model")
    assert type(model).__name__ == "PeftModelForCausalLM"
    assert model.config.bd_size == 16
    checkpoint = look(tmp_path / "run" / "model")
    assert checkpoint.base is not None
    assert (checkpoint.adapted, checkpoint.base.adapted) == (True, False)
    pb.export(model, tokenizer, tmp_path / "merged")


def test_adapt_in_causal_context_makes_an_adapter_that_drafts(tmp_path: Path) -> None:
    chats = [{"messages": word_problem("train", 7, i).messages()} for i in range(60)]
    data = write_rows(tmp_path / "chats.jsonl", chats)
    options = (
        "--context", "causal", "--lora-rank", "4", "--draft-tokens", "2", "--anchors", "8", "--lora-targets", "o_proj",
        "--lora-targets", "down_proj", "--steps", "4", "--check-every", "2", "--check-samples", "3",
    )  # fmt: skip
    out = run("adapt", "bundled-ar", "--data", data, "-o", tmp_path / "run", *SMALL, *options)
    assert out.returncode == 0, out.stderr
    for text in (
        "60 kept",
        "assistant",
        "cost:",
        "step      4  loss",
        "check: accepted drafts per cycle ",
        "checkpoint",
    ):
        assert text in out.stdout, text
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    checks = [entry for entry in log if "accepted" in entry]
    assert [entry["step"] for entry in checks] == [2, 4]
    for entry in checks:
        assert entry["accepted"] == pytest.approx(entry["accepted_1"] + entry["accepted_2"])
    model, tokenizer = pb.load(tmp_path / "run" / "model")
    base, _ = pb.load("bundled-ar")
    prompt = tokenizer("4+7=")["input_ids"]
    said = pb.generate(base, prompt, pb.DecodeConfig(mode="autoregressive", max_new_tokens=12)).tokens
    config = pb.DecodeConfig(mode="speculative", drafter="masks", max_new_tokens=12)
    assert pb.generate(model, prompt, config).tokens == said
    gate = gate_of(model)
    assert gate is not None
    assert {name.rpartition(".")[2] for name in gate.targets} == {"o_proj", "down_proj"}
    again = run("adapt", str(tmp_path / "run" / "model"), "--data", data, "-o", tmp_path / "b", *SMALL, *options)
    assert again.stderr.strip().splitlines()[-1].endswith("adapt its base, bundled-ar")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--data", "word-problems"], "model=''"),
        (["bundled-ar"], "data=''"),
        (["bundled-ar", "--data", "nothing.jsonl"], "there is no data at 'nothing.jsonl'"),
        (["bundled-ar", "--data", "empty.jsonl"], "data='empty.jsonl' is empty"),
        (["bundled-ar", "--data", "odd.jsonl"], "the columns body, title are no known format"),
        (["bundled-ar", "--data", "silent.jsonl"], "no sample to learn from (1 nothing to learn)"),
        (["bundled-ar", "--data", "broken.jsonl"], "could not be read"),
        (["bundled-ar", "--data", "word-problems", "--recipe", "none.yaml"], "there is no recipe at 'none.yaml'"),
        (["bundled-ar", "--data", "word-problems", "--recipe", "typo.yaml"], "unknown settings (stepps)"),
        (["bundled-ar", "--data", "word-problems", "--block-size", "7"], "context_length=2048"),
        (["bundled-ar", "--data", "word-problems", "--schedule", "step"], "schedule='step'"),
        (["bundled-ar", "--data", "word-problems", "--context", "causal"], "lora_rank=0"),
        (["bundled", "--data", "word-problems", "--context", "causal", "--lora-rank", "4"], "adapted to block context"),
        (["bundled-ar", "--data", "word-problems", "-o", "full"], "'full' is not empty; pass --resume"),
        (["plain", "--data", "ok.jsonl"], "the tokenizer has no chat template"),
    ],
)
def test_bad_input(args: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.jsonl").touch()
    Path("broken.jsonl").write_text("{ not json\n")
    write_rows(Path("odd.jsonl"), [{"title": "a", "body": "b"}])
    write_rows(Path("silent.jsonl"), [{"messages": CHAT[:1]}])
    write_rows(Path("ok.jsonl"), [{"messages": CHAT}])
    Path("typo.yaml").write_text("stepps: 3\n")
    Path("full").mkdir()
    Path("full", "notes.txt").touch()
    if args[0] == "plain":
        model, tokenizer = pb.load("bundled")
        tokenizer.chat_template = None
        pb.save(model, tokenizer, "plain")
    output = [] if "-o" in args else ["-o", "run"]
    out = run("adapt", *args, *output)
    assert out.returncode == 2, out.stderr
    last = out.stderr.strip().splitlines()[-1]
    assert last.startswith("parablock: ")
    assert message in last
    assert "Traceback" not in out.stderr
    assert not Path("run").exists()


def test_cost_is_what_a_hand_finds() -> None:
    shape = Shape(parameters=1000.0, layers=1, hidden=10, vocabulary=20)
    config = make_config(
        {"model": "m", "data": "d", "steps": 10, "batch_size": 2, "context_length": 64, "block_size": 32}
    )
    cost = estimate(shape, config, learned_share=0.5)
    assert cost.row_tokens == 10 * 2 * 64
    assert cost.forward_tokens == 2 * cost.row_tokens  # once clean, and half of it twice noisy
    per_token = (1000 - 200) + 2 * 10 * 32
    assert cost.flops == 3 * 2 * (cost.forward_tokens * per_token + 0.5 * cost.row_tokens * 200)

    masks = 10 * 2 * 8 * 3  # of 20 rows, 8 anchors in each
    causal = make_config({**asdict(config), "context": "causal", "lora_rank": 4, "anchors": 8})
    cost = estimate(replace(shape, trainable=100.0), causal, learned_share=0.5)
    assert (cost.row_tokens, cost.forward_tokens) == (1280, 1280 + masks)
    assert cost.flops == 2 * (1280 * per_token + 2 * masks * (per_token + 200))


RECIPES = sorted((Path(__file__).parents[1] / "recipes").rglob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_valid_and_say_what_they_cost(path: Path) -> None:
    config = make_config(read_recipe(path))
    assert config.steps * config.batch_size >= 1000
    assert path.read_text() == with_cost(path)


def test_the_bundled_recipes_follow_each_other() -> None:
    stages = {path.stem: read_recipe(path) for path in RECIPES if path.parent.name == "bundled"}
    assert tuple(sorted(stages)) == tuple(sorted((*STAGES, "causal")))
    assert stages.pop("causal")["model"] == "bundled-ar"
    before = "start"
    for stage in STAGES:
        assert stages[stage]["model"] == f"runs/bundled/{before}"
        before = f"{stage}/model"
    used = sorted((int(s["data"].split(":")[1]), s["max_samples"]) for s in stages.values())
    assert all(first + count <= start for (first, count), (start, _) in itertools.pairwise(used))  # fresh problems each


@pytest.mark.parametrize("context", ["block", "causal"])
def test_what_drafts_already_is_not_adapted_once_more(context: Any) -> None:
    config = AdaptConfig(model="bundled-causal", data="word-problems", context=context, lora_rank=8)
    with pytest.raises(ValueError, match=r"'bundled-causal' is a causal adapter.*adapt its base, bundled-ar"):
        adapt(config, Path("nowhere"), Console(quiet=True), dry_run=True)

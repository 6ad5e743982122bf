"""lm-evaluation-harness through the engine, and `parablock eval` as a user meets it: real processes, no network."""

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run, run_program

import parablock as pb
from parablock.data.chat import encode_prompt
from parablock.evals import word_problems as task
from parablock.evals.compare import compare, paired, run_compare
from parablock.evals.config import EvalConfig
from parablock.evals.paper import paper_rows
from parablock.evals.results import Sample, interval, read, write
from parablock.evals.word_problems import evaluate

lm_eval = pytest.importorskip("lm_eval", reason="the harness: pip install 'parablock[eval]'")

from lm_eval.api.instance import Instance  # noqa: E402

from parablock.evals.harness import ParablockLM  # noqa: E402
from parablock.evals.likelihood import log_likelihood  # noqa: E402
from parablock.evals.tasks import load_tasks, parse_data  # noqa: E402

TEST, TRAIN = (Path(__file__).parent / name for name in ("gsm8k_test_head.jsonl", "gsm8k_head.jsonl"))  # MIT licence
LAUNCH = "--multi_gpu --num_processes=2 --num_machines=1 --mixed_precision=no --dynamo_backend=no --main_process_port=0"
QUESTIONS = [problem.question for problem in task.test_problems(3, 6)]


def _instances(kind: str, arguments: list[tuple[Any, ...]], task: str = "task") -> list[Instance]:
    return [Instance(kind, {}, args, 0, (task, number, 1)) for number, args in enumerate(arguments)]


@pytest.fixture(scope="module")
def lm() -> ParablockLM:
    return ParablockLM("bundled", batch_size=8)


def _chat(lm: ParablockLM, question: str) -> str:
    return lm.apply_chat_template([{"role": "user", "content": question}])


# --- the adapter -----------------------------------------------------------------------------------------------------


def test_it_has_the_accuracy_of_the_demo(lm: ParablockLM) -> None:
    lm.costs.clear()
    manager, tasks = load_tasks(["word_problems"], seed=4)
    found = lm_eval.simple_evaluate(
        model=lm, tasks=tasks, task_manager=manager, limit=40, apply_chat_template=True, bootstrap_iters=0
    )
    expected = evaluate(lm.model, lm.tokenizer, task.test_problems(4, 40), pb.DecodeConfig(max_new_tokens=96))
    assert found["results"]["word_problems"]["exact_match,none"] == expected.accuracy
    cost = lm.costs["word_problems"]
    assert (cost.requests, cost.tokens, cost.forwards) == (40, expected.tokens, expected.decode_forwards)
    assert 0 < cost.prefill_seconds < cost.seconds


def test_the_harness_makes_it_by_name_and_ar_is_transformers_own() -> None:
    manager, tasks = load_tasks(["word_problems"], seed=4)
    found = lm_eval.simple_evaluate(
        model="parablock", model_args="pretrained=bundled-ar,mode=autoregressive", tasks=tasks, task_manager=manager,
        limit=10, apply_chat_template=True, bootstrap_iters=0, batch_size=4,
    )  # fmt: skip
    model, tokenizer = pb.load("bundled-ar")
    for sample in found["samples"]["word_problems"]:
        ids = torch.tensor([encode_prompt(tokenizer, [{"role": "user", "content": sample["doc"]["question"]}])])
        out = model.generate(ids, max_new_tokens=96, do_sample=False)[0, ids.shape[1] :]
        assert sample["resps"] == [[tokenizer.decode(out, skip_special_tokens=True)]]


def test_wrong_settings_are_told_before_a_model_is_loaded() -> None:
    with pytest.raises(ValueError, match="batch_size='auto'"):
        ParablockLM("no/such/model", batch_size="auto")
    with pytest.raises(ValueError, match="threshold=3"):
        ParablockLM("no/such/model", threshold=3)


def test_stop_strings_and_lengths(lm: ParablockLM) -> None:
    lm.costs.clear()
    whole = lm.generate_until(_instances("generate_until", [(_chat(lm, q), {"until": []}) for q in QUESTIONS]))
    tokens = lm.costs.pop("task").tokens
    asked = [(_chat(lm, q), {"until": ["####", "<|im_end|>"], "max_gen_toks": 60}) for q in QUESTIONS]
    stopped = lm.generate_until(_instances("generate_until", asked))
    assert stopped == [text.split("####")[0] for text in whole]
    assert lm.costs["task"].tokens < tokens
    first = lm.generate_until(_instances("generate_until", [(_chat(lm, QUESTIONS[0]), {"max_gen_toks": 5})]))
    assert len(lm.tokenizer(first[0])["input_ids"]) == 5
    with pytest.raises(ValueError, match="num_beams"):
        lm.generate_until(_instances("generate_until", [("x", {"num_beams": 4})]))


def test_sampling_is_the_tasks_wish_and_repeatable(lm: ParablockLM) -> None:
    hot = {"until": [], "do_sample": True, "temperature": 5.0, "max_gen_toks": 20}
    asked = _instances("generate_until", [(_chat(lm, QUESTIONS[0]), hot)] * 2)
    first = lm.generate_until(asked)
    assert first[0] != first[1]
    assert lm.generate_until(asked) == first


def test_special_tokens_in_a_question_are_text(lm: ParablockLM) -> None:
    question = "What is <|mask|><|im_end|>?"
    ids = lm.tok_encode(_chat(lm, question))
    assert ids == encode_prompt(lm.tokenizer, [{"role": "user", "content": question}])
    assert lm.model.config.mask_token_id not in ids
    begun = lm.apply_chat_template(
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well,"}], add_generation_prompt=False
    )
    assert begun == _chat(lm, "Hi") + "Well,"


def test_likelihoods_of_texts(lm: ParablockLM) -> None:
    prompt = _chat(lm, QUESTIONS[0])
    answer = lm.generate_until(_instances("generate_until", [(prompt, {"until": []})]))[0]
    texts = [(prompt, answer), (prompt, answer.replace("0", "1")), ("", "4+4=8")]
    (right, greedy), (wrong, other), (alone, _) = lm.loglikelihood(_instances("loglikelihood", texts), True)
    pair = lm._encode_pair(prompt, answer)  # white space at the context's end belongs to the continuation
    by_ids = log_likelihood(lm.model, [pair, ([lm.prefix_token_id], lm.tok_encode("4+4=8"))], lm.config)
    assert (right, greedy) == by_ids[0]
    assert alone == by_ids[1][0]
    assert right > wrong or answer == texts[1][1]
    assert greedy or not other


def test_rolling_likelihood_takes_windows(lm: ParablockLM, monkeypatch: pytest.MonkeyPatch) -> None:
    text = " ".join(QUESTIONS[:2])
    ids = lm.tok_encode(text, add_special_tokens=False)
    whole = lm.loglikelihood_rolling(_instances("loglikelihood_rolling", [(text,)]), True)
    assert whole == [log_likelihood(lm.model, [([lm.prefix_token_id], ids)], lm.config)[0][0]]
    monkeypatch.setattr(lm.model.config, "max_position_embeddings", 33)
    first, last = ids[:32], ids[32:]
    split = lm.loglikelihood_rolling(_instances("loglikelihood_rolling", [(text,)]), True)[0]
    expected = log_likelihood(lm.model, [([lm.prefix_token_id], first)], lm.config)[0][0]
    for start in range(0, len(last), 32):
        part = last[start : start + 32]
        before = ids[max(0, 32 + start + len(part) - 33) : 32 + start]
        expected += log_likelihood(lm.model, [(before, part)], lm.config)[0][0]
    assert split == pytest.approx(expected, rel=1e-5)


def test_prompts_that_are_too_long_lose_their_beginning(lm: ParablockLM) -> None:
    before = lm.too_long
    answers = lm.generate_until(_instances("generate_until", [("7 " * 2000, {"until": [], "max_gen_toks": 8})]))
    assert len(answers) == 1
    assert lm.too_long == before + 1
    with pytest.raises(ValueError, match="exceeds the model's context"):
        lm._loglikelihood_tokens([(("", ""), [1], [5] * 600)], True)


# --- stock tasks -----------------------------------------------------------------------------------------------------


def test_the_stock_gsm8k_reads_local_files() -> None:
    """Five examples from one file, questions from another, the harness's own stop strings and scores."""
    manager, tasks = load_tasks(["gsm8k"], files=parse_data([f"gsm8k={TEST}", f"gsm8k:train={TRAIN}"]))

    class Oracle(ParablockLM):
        """Knows every answer, and goes on talking."""

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            for request in requests:
                context, settings = request.args
                assert context.count("Question:") == 6
                assert context.endswith("Answer:")
                assert settings["until"] == ["Question:", "</s>", "<|im_end|>"]
            return [request.doc["answer"] for request in requests]

    found = lm_eval.simple_evaluate(
        model=Oracle("bundled"), tasks=tasks, task_manager=manager, limit=7, bootstrap_iters=0
    )
    assert found["results"]["gsm8k"]["exact_match,strict-match"] == 1.0
    assert found["results"]["gsm8k"]["exact_match,flexible-extract"] == 1.0


def test_examples_never_come_from_the_questions() -> None:
    with pytest.raises(ValueError, match=r"--data gsm8k:train=FILE, or --num-fewshot 0"):
        load_tasks(["gsm8k"], files=parse_data([f"gsm8k={TEST}"]))
    _, tasks = load_tasks(["gsm8k"], files=parse_data([f"gsm8k={TEST}"]), num_fewshot=0)
    assert len(tasks[0].test_docs()) == 20


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (["gsm8k"], "write task=file"),
        (["gsm8k=nothing.jsonl"], "no file 'nothing.jsonl'"),
        ([f"gsm8k={__file__}"], ".jsonl"),
        ([f"mmlu={TEST}"], "not among the tasks"),
        ([f"gsm8k:train={TRAIN}"], "split 'test'"),
    ],
)
def test_wrong_data_is_refused(data: list[str], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        load_tasks(["gsm8k"], files=parse_data(data))


def test_unknown_tasks_and_data_that_cannot_be_fetched() -> None:
    with pytest.raises(ValueError, match="no task 'gsm9k'; did you mean gsm8k"):
        load_tasks(["gsm9k"])
    with pytest.raises(ValueError, match=r"the data of gsm8k \(openai/gsm8k\) .*--data gsm8k=FILE.jsonl"):
        load_tasks(["gsm8k"])
    with pytest.raises(ValueError, match=r"the data of mmlu \(cais/mmlu\)"):
        load_tasks(["mmlu"])


# --- the command -----------------------------------------------------------------------------------------------------


def test_a_run_its_files_and_a_comparison(tmp_path: Path) -> None:
    first, second = tmp_path / "one", tmp_path / "two"
    tasks = ["--tasks", "gsm8k,word_problems", "--data", f"gsm8k={TEST}", "--data", f"gsm8k:train={TRAIN}"]
    one = run("eval", "bundled", *tasks, "--limit", 6, "--max-new-tokens", 48, "-o", first, cwd=tmp_path, cold=True)
    assert one.returncode == 0, one.stderr
    report, samples = read(first)
    assert report["decoding"]["threshold"] == 0.9
    assert report["decoding"]["max_new_tokens"] == 48
    assert report["evaluation"]["data"] == [f"gsm8k={TEST}", f"gsm8k:train={TRAIN}"]
    assert report["machine"]["torch"] == torch.__version__
    assert report["chat"]
    assert report["tasks"]["gsm8k"]["fewshot"] == 5
    assert report["tasks"]["gsm8k"]["questions"] == 6
    assert report["cut_prompts"] == 6
    pace = report["tasks"]["word_problems"]["speed"]
    assert pace["responses"] == 6
    assert pace["tokens_per_second"] < pace["tokens_per_second_without_prefill"]
    assert len([s for s in samples if s.task == "gsm8k"]) == 12  # two filters
    solved = [s.scores["exact_match"] for s in samples if s.task == "word_problems"]
    assert sum(solved) / 6 == report["tasks"]["word_problems"]["metrics"]["exact_match,none"]["value"]
    assert "word_problems" in one.stdout

    again = run("eval", "bundled", *tasks, "-o", first)
    assert again.returncode == 2
    assert "holds an evaluation already" in again.stderr
    two = run("eval", "bundled-ar", "--mode", "autoregressive", "--tasks", "word_problems", "--limit", 6, "-o", second)
    assert two.returncode == 0, two.stderr
    compared = run("eval", "--compare", first, second)
    assert compared.returncode == 0, compared.stderr
    assert "decoding.mode: diffusion | autoregressive" in compared.stdout
    assert "model: bundled | bundled-ar" in compared.stdout


def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    options = ["--tasks", "word_problems", "--limit", 9, "--question-seed", 5]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *LAUNCH.split()]
    two = run_program([*launcher, "-m", "parablock", "eval", "bundled", *options, "-o", tmp_path / "two"])
    assert two.returncode == 0, two.stderr
    one = run("eval", "bundled", *options, "-o", tmp_path / "one")
    assert one.returncode == 0, one.stderr
    (report_1, samples_1), (report_2, samples_2) = read(tmp_path / "one"), read(tmp_path / "two")
    assert (report_1["processes"], report_2["processes"]) == (1, 2)
    found = [
        {s.number: (s.question_hash, s.prompt_hash, s.answer, s.scores) for s in samples}
        for samples in (samples_1, samples_2)
    ]
    assert found[0] == found[1]
    assert len(samples_1) == len(samples_2) == 9
    assert report_2["tasks"]["word_problems"]["metrics"] == report_1["tasks"]["word_problems"]["metrics"]
    tokens = [r["tasks"]["word_problems"]["speed"]["tokens_per_forward"] for r in (report_1, report_2)]
    assert tokens[1] == pytest.approx(tokens[0], rel=0.2)  # the harness repeats a question where shares are uneven


def test_wrong_input_is_one_line(tmp_path: Path) -> None:
    model, tokenizer = pb.load("bundled")
    tokenizer.chat_template = None
    pb.save(model, tokenizer, tmp_path / "plain")
    cases: list[tuple[list[object], str]] = [
        (["bundled"], "tasks=()"),
        (["bundled", "--tasks", "word_problems", "--suite", "paper"], "tasks=('word_problems',)"),
        (["bundled", "--suite", "other"], "suite='other'"),
        (["bundled", "--tasks", "humaneval"], "--run-code"),
        (["bundled", "--tasks", "word_problems", "--limit", "0"], "limit=0"),
        (["bundled", "--tasks", "word_problems", "--threshold", "2"], "threshold=2.0"),
        ([tmp_path / "plain", "--tasks", "word_problems", "--chat"], "no chat template"),
        (["--compare", tmp_path, tmp_path], "holds no results.json"),
        (["bundled-ar", "--tasks", "word_problems", "--mode", "diffusion"], "never adapted"),
        (["no/such/model", "--tasks", "word_problems"], "no/such/model"),
    ]
    for args, says in cases:
        out = run("eval", *args, cwd=tmp_path)
        lines = [line for line in out.stderr.splitlines() if "Loading weights" not in line]
        assert out.returncode == 2, (args, out.stderr)
        assert len(lines) == 1, out.stderr
        assert says in lines[0]
    assert not (tmp_path / "parablock-eval").exists()
    plain = run("eval", tmp_path / "plain", "--tasks", "word_problems", "--limit", 2, cwd=tmp_path)
    assert plain.returncode == 0, plain.stderr
    assert "no chat template: questions are put as they are" in plain.stdout
    assert len(list((tmp_path / "parablock-eval").glob("plain-*/results.json"))) == 1


# --- figures ---------------------------------------------------------------------------------------------------------


def _samples(scores: list[float], task: str = "t") -> list[Sample]:
    return [
        Sample(task, "none", n, f"q{n}", "p", "prompt", "target", "response", "answer", {"exact_match": s})
        for n, s in enumerate(scores)
    ]


def test_intervals_and_paired_tests() -> None:
    low, high = interval([1.0] * 8 + [0.0] * 2)
    assert (low, high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))  # Wilson, by hand
    assert interval([0.5]) == (-math.inf, math.inf)
    gained, lost = [0.0] * 9 + [1.0] * 91, [1.0] * 9 + [0.0] * 1 + [1.0] * 90
    low, high, p = paired(gained, lost)
    assert p == pytest.approx(2 * 11 / 2**10)  # McNemar: 9 against 1
    assert low < 0.08 < high
    assert paired([1.0, 0.0], [1.0, 0.0]) == (0.0, 0.0, 1.0)
    low, high, p = paired([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [0.3, 0.4, 0.5, 0.6, 0.7, 0.81])
    assert p == pytest.approx(2 / 2**6)  # all six grew
    assert 0.19 < low < high < 0.21


def test_only_common_questions_are_compared(tmp_path: Path) -> None:
    found = compare(_samples([1, 1, 0, 0]), _samples([1, 0, 1]))
    assert [(c.questions, c.only_first, c.only_second, c.difference) for c in found] == [(3, 1, 1, 0.0)]
    with pytest.raises(ValueError, match="share no question"):
        compare(_samples([1]), _samples([1], task="other"))


def test_damaged_results_are_told(tmp_path: Path) -> None:
    from rich.console import Console

    write(tmp_path, {"format": 1, "tasks": {}, "machine": {}}, _samples([1, 0]))
    assert read(tmp_path)[1] == _samples([1, 0])
    (tmp_path / "results.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(ValueError, match="format 99"):
        read(tmp_path)
    (tmp_path / "samples.jsonl").write_text('{"task": ')
    with pytest.raises(ValueError, match="damaged"):
        run_compare(tmp_path, tmp_path, Console())


def test_the_papers_table() -> None:
    rows = paper_rows({"gsm8k": {"metrics": {"exact_match,flexible-extract": {"value": 0.62, "stderr": 0.013}}}})
    by_title = {row[0]: row for row in rows}
    assert by_title["GSM8K"][2:] == ["62.0 ± 1.3", "62.0", "83.7"]
    assert by_title["MMLU"][2] == ""
    assert by_title["average"][2:] == ["", "45.0", "60.3"]  # the paper's own averages


def test_settings_of_an_evaluation() -> None:
    with pytest.raises(ValueError, match="system"):
        EvalConfig(tasks=("x",), chat=False, system="Be brief.")
    assert os.environ["HF_HUB_OFFLINE"] == "1"

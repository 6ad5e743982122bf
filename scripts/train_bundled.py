"""Make the bundled model from nothing. Each stage reads what the one before it wrote:

    for stage in tokenizer ar-flat ar diffusion-8 diffusion-early diffusion-flat diffusion; do
        python scripts/train_bundled.py $stage --out runs/bundled
    done

A stage that is interrupted continues from its newest checkpoint when it is started again.
"""

import argparse
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from parablock.checkpoints.save import save
from parablock.config import TrainConfig
from parablock.data.word_problems import NAME_ENDS, NAME_STARTS, EncodedProblems, word_problem
from parablock.training.trainer import train

VOCABULARY = 640
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>"]
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\n' }}"
    "{%- if message['role'] == 'assistant' %}"
    "{% generation %}{{- message['content'] + '<|im_end|>' }}{% endgeneration %}{{- '\n' }}"
    "{%- else %}{{- message['content'] + '<|im_end|>\n' }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)


@dataclass(frozen=True)
class Phase:
    """One training run: which weights it starts from, which training problems it draws from, and the recipe."""

    start: str | None
    first_problem: int
    problems: int
    recipe: TrainConfig


MUON = TrainConfig(
    batch_size=48, micro_batch_size=48, context_length=256, packing=False, block_size=32, optimizer="muon", lr=3e-3,
    muon_lr=1e-2, warmup_steps=50, decay_share=0.0, save_every=250,
)  # fmt: skip
PHASES = {
    "ar-flat": Phase(None, 0, 62400, replace(MUON, mode="autoregressive", steps=500)),
    "ar": Phase(
        "ar-flat", 62400, 12000, replace(MUON, mode="autoregressive", steps=250, warmup_steps=5, decay_share=1)
    ),
    "diffusion-8": Phase("ar", 80000, 14400, replace(MUON, steps=300, block_size=8)),
    "diffusion-early": Phase("diffusion-8", 100000, 240000, replace(MUON, steps=500)),
    "diffusion-flat": Phase("diffusion-early", 340000, 120000, replace(MUON, steps=1000, warmup_steps=5)),
    "diffusion": Phase("diffusion-flat", 500000, 60000, replace(MUON, steps=1000, warmup_steps=5, decay_share=1)),
}


def tokenizer_corpus(problems: int = 4000) -> Iterator[str]:
    """Training problems with every name in two pieces, so that names the tokenizer never saw read the same way."""
    for i in range(problems):
        problem = word_problem("train", 0, i)
        text = f"user\n{problem.question}\nassistant\n{problem.answer}\n"
        for start in NAME_STARTS:
            for end in NAME_ENDS:
                text = text.replace(start + end, f"{start}\n{end}\n {start}")
        yield text


def spaced_digits_as_added_tokens(bpe: Tokenizer) -> Tokenizer:
    """The same ids when transformers reads the files as a Qwen2 tokenizer.

    For Qwen2 models `AutoTokenizer` puts Qwen2's own pre-tokenizer in place of the file's, and that one cuts the space
    off a digit. Added tokens are matched before any pre-tokenizer, so " 1" ... " 9" become such, with the ids they had.
    """
    data = json.loads(bpe.to_str())
    model = data["model"]
    for digit in "123456789":  # no number of the task starts with 0
        model["vocab"][f" {digit}"] = number = model["vocab"].pop(f"Ġ{digit}")
        model["merges"].remove(["Ġ", digit])
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
        data["added_tokens"].append({"id": number, "content": f" {digit}", **flags})
    data["added_tokens"].sort(key=lambda token: token["id"])
    return Tokenizer.from_str(json.dumps(data))


def make_tokenizer(out: Path) -> None:
    bpe = Tokenizer(models.BPE())
    # digits stand alone, each with the space before it
    pieces = Regex(r" ?\d| ?\p{L}+| ?[^\s\p{L}\d]+|\s")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pieces, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(tokenizer_corpus(), trainer)
    bpe = spaced_digits_as_added_tokens(bpe)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        mask_token="<|mask|>",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(out / "tokenizer")


def new_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=384,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    config.mask_token_id = tokenizer.mask_token_id
    return Qwen2ForCausalLM._from_config(config, attn_implementation="eager")


def run(name: str, out: Path, threads: int) -> None:
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    phase = PHASES[name]
    tokenizer = AutoTokenizer.from_pretrained(out / "tokenizer")
    if phase.start is None:
        model = new_model(tokenizer, phase.recipe.seed)
    else:
        model = AutoModelForCausalLM.from_pretrained(out / phase.start, dtype="float32", attn_implementation="eager")
    samples = EncodedProblems(tokenizer, seed=0, start=phase.first_problem, count=phase.problems)
    started = time.time()

    def report(step: int, logs: dict[str, float]) -> None:
        if "loss" in logs:
            print(f"{time.time() - started:7.0f} s  step {step:5d}  loss {logs['loss']:.4f}", flush=True)

    train(model, tokenizer, samples, phase.recipe, out / f"{name}-run", resume=True, progress=report)
    save(model, tokenizer, out / name)
    minutes = round((time.time() - started) / 60, 1)
    (out / f"{name}.json").write_text(json.dumps({"phase": asdict(phase), "minutes": minutes}, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["tokenizer", *PHASES])
    parser.add_argument("--out", type=Path, default=Path("runs/bundled"))
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.stage == "tokenizer":
        make_tokenizer(args.out)
    else:
        run(args.stage, args.out, args.threads)


if __name__ == "__main__":
    main()

"""Where the bundled model begins: its tokenizer, and random weights. `parablock adapt` does the rest:

python scripts/start_bundled.py
for stage in ar-flat ar diffusion-8 diffusion-early diffusion-flat diffusion; do
    parablock adapt --recipe recipes/bundled/$stage.yaml --output runs/bundled/$stage --resume
done
python scripts/bundle_model.py
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from parablock.checkpoints.save import save
from parablock.data.word_problems import NAME_ENDS, NAME_STARTS, word_problem

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


def make_tokenizer() -> PreTrainedTokenizerFast:
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
    return tokenizer


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
    return Qwen2ForCausalLM._from_config(config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/bundled"))
    out = parser.parse_args().out
    tokenizer = make_tokenizer()
    save(new_model(tokenizer, seed=0), tokenizer, out / "start")


if __name__ == "__main__":
    main()

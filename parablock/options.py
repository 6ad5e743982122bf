"""The options of the commands that have a config class: one for every field of it."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any, Literal, get_origin, get_type_hints

import typer

from parablock.config import AdaptConfig, DecodeConfig, ServeConfig

Given = dict[str, Any]  # options of a config class, by name
NOTHING: Given = {}

DECODE_HELP = {
    "mode": "'diffusion' (several tokens per forward) or 'autoregressive'.",
    "max_new_tokens": "The answer is at most this long, exactly. Default: 512, less if the context is shorter.",
    "block_size": "Tokens decoded together. Default: the checkpoint's own.",
    "sub_block_size": "A block is revealed in parts of this many tokens, left to right.",
    "strategy": "Which positions to reveal: 'threshold', 'factor' or 'fixed'.",
    "threshold": "Reveal positions whose confidence is above this [0, 1].",
    "factor": "For 'factor': larger reveals more.",
    "tokens_per_step": "For 'fixed': how many positions a step reveals.",
    "temperature": "0 is greedy; above, tokens are sampled.",
    "top_p": "Sample from the smallest set of tokens with this probability.",
    "top_k": "Sample from this many most probable tokens. Default: all.",
    "sub_block_cache": "Reuse the K/V of the other sub-blocks inside a block.",
    "stop_token_ids": "Token ids that end the answer (repeatable). Default: the checkpoint's own.",
    "mask_token_id": "The id that stands at masked positions. Default: the checkpoint's own.",
    "seed": "Makes sampling repeatable.",
}


ADAPT_HELP = {
    "data": "A JSONL or Parquet file or folder, a hub id ORG/NAME[:CONFIG][@SPLIT], alpaca, nemotron, word-problems.",
    "mode": "'diffusion' adapts; 'autoregressive' trains as before.",
    "steps": "Optimisation steps.",
    "batch_size": "Rows per step, over all processes.",
    "micro_batch_size": "Rows per forward and process.",
    "context_length": "Tokens per row.",
    "packing": "Fill rows with several samples.",
    "isolate_samples": "Samples in one row see nothing of each other; without it as published.",
    "block_padding": "No block holds two samples (ablation: without).",
    "block_size": "Tokens decoded together.",
    "complementary": "Learn every token once, in two views (ablation: without).",
    "first_token_context": "What predicts a block's first token: the 'noisy' block before it (published), or 'clean'.",
    "ar_loss_weight": "Weight of an autoregressive loss beside, which keeps the AR mode alive.",
    "optimizer": "'adamw' or 'muon'.",
    "lr": "AdamW's learning rate.",
    "muon_lr": "Muon's learning rate.",
    "weight_decay": "Weight decay.",
    "schedule": "'cosine' to zero, or 'stable' with a linear end.",
    "warmup_steps": "Linear warm-up.",
    "decay_share": "For 'stable': the share of the steps in which the rate falls.",
    "max_grad_norm": "Gradients are clipped to this norm.",
    "bf16": "Mixed precision.",
    "gradient_checkpointing": "Less memory, a third more time.",
    "fsdp": "Shard over the processes of torchrun (FSDP2).",
    "seed": "Of order and noise.",
    "log_every": "Steps between log lines.",
    "save_every": "Steps between checkpoints to resume from; 0: none.",
    "keep_checkpoints": "How many of them are kept.",
    "report_to": "Also log to 'tensorboard', 'wandb', 'trackio' (repeatable).",
    "max_samples": "Use only the first so many.",
    "too_long": "Samples longer than the context: 'drop', 'truncate' or 'refuse'.",
    "streaming": "Fetch only what max_samples needs of a hub dataset.",
    "data_workers": "Processes that tokenize.",
    "lora_rank": "Train a LoRA adapter of this rank; 0: all weights.",
    "lora_alpha": "LoRA's scale.",
    "lora_dropout": "LoRA's dropout.",
    "check_every": "Steps between checks on held-out prompts; 0: none.",
    "check_samples": "How many prompts a check answers.",
}

SERVE_HELP = {
    "host": "The address to listen on; 0.0.0.0 is every network.",
    "port": "0: any free one, which is printed.",
    "max_rows": "Answers decoded together.",
    "max_queue": "Answers that may wait; further ones are refused (429).",
    "deadline": "Seconds until an answer must be whole.",
    "max_body": "The longest request in bytes.",
    "cors_origin": "Web pages of this origin may ask (repeatable). Default: none.",
    "drain": "Seconds that running requests get after SIGTERM.",
    "compile": "torch.compile: slower start, faster steps.",
}

Command = Callable[..., None]


def _options_of(
    config_class: Any, texts: dict[str, str], panel: str, *, defaults: bool
) -> Callable[[Command], Command]:
    """Give `command(..., given)` one option per field of `config_class` that `texts` explains.

    `given` maps the fields' names to values. Without `defaults` an option that is not used is None: it leaves the
    setting to a recipe.
    """

    def decorate(command: Command) -> Command:
        hints = get_type_hints(config_class)
        own = [p for p in inspect.signature(command).parameters.values() if p.name != "given"]
        extra = []
        for f in dataclasses.fields(config_class):
            if f.name not in texts:
                continue
            kind: Any = hints[f.name]
            if get_origin(kind) is Literal:
                kind = str
            elif f.name == "stop_token_ids":
                kind = list[int] | None
            elif f.name in ("report_to", "cors_origin"):
                kind = list[str]
            option = typer.Option(help=texts[f.name], rich_help_panel=panel)
            if not defaults:
                kind = kind | None
            default = f.default if defaults else None
            keyword = inspect.Parameter.KEYWORD_ONLY
            extra.append(inspect.Parameter(f.name, keyword, default=default, annotation=Annotated[kind, option]))

        @functools.wraps(command)
        def wrapper(**values: Any) -> None:
            given = {p.name: values.pop(p.name) for p in extra}
            given = {name: (tuple(v) or None) if isinstance(v, list) else v for name, v in given.items()}
            command(**values, given=given)

        wrapper.__signature__ = inspect.Signature([*own, *extra])  # type: ignore[attr-defined]
        wrapper.__annotations__ = {p.name: p.annotation for p in [*own, *extra]}
        return wrapper

    return decorate


decode_options = _options_of(DecodeConfig, DECODE_HELP, "Decoding", defaults=True)
eval_options = _options_of(DecodeConfig, DECODE_HELP, "Decoding", defaults=False)
adapt_options = _options_of(AdaptConfig, ADAPT_HELP, "Recipe", defaults=False)
serve_options = _options_of(ServeConfig, SERVE_HELP, "Server", defaults=True)


def parse_list(text: str, name: str, kind: type) -> tuple[Any, ...]:
    """ "1,8,32" as numbers, "on,off" as bools; nothing as nothing."""
    switches = {"on": True, "off": False}
    try:
        return tuple(switches[part.strip()] if kind is bool else kind(part) for part in text.split(",") if part.strip())
    except (ValueError, KeyError):
        example = "on,off" if kind is bool else "1,8,32" if kind is int else "0.7,0.9"
        raise ValueError(f"{name}={text!r} is no list; write it like {example}") from None

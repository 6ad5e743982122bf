"""What a request needs before it may run: settings the model can serve, and not more tokens than the memory holds."""

from collections.abc import Mapping
from dataclasses import replace

import torch

from parablock.decoding.config import DecodeConfig
from parablock.decoding.generate import as_rows, resolve
from parablock.decoding.grammar import check_grammar
from parablock.decoding.logprobs import MOST_TOP
from parablock.engine.config import EngineConfig
from parablock.engine.request import Request
from parablock.settings import Model, require

SHARE_OF_FREE_MEMORY = {"cpu": 0.25, "cuda": 0.75}


def resolve_request(model: Model, request: Request, block_size: int, max_context: int, pages: int) -> DecodeConfig:
    """The request's settings with nothing left open.

    Raises:
        ValueError: it can never run: an empty prompt, another block size than the engine's, settings the model cannot
            serve, or more tokens than the context or all `pages` of K/V memory hold.
    """
    prompt, most = list(request.prompt), request.logprobs
    require(most is None or 0 <= most <= MOST_TOP, "logprobs", most, f"use a number in [0, {MOST_TOP}]")
    if request.prompt_logprobs and most is None:
        raise ValueError("prompt_logprobs=True needs a number of logprobs; use logprobs=0 for the tokens' own alone")
    config = resolve(model, as_rows([prompt]), request.config)
    check_grammar(request.grammar, model.get_input_embeddings().weight.shape[0])
    if config.block_size not in (None, block_size):
        raise ValueError(
            f"block_size={config.block_size}, but this engine runs blocks of {block_size}; leave it out, or make "
            "another engine with EngineConfig(block_size=...)"
        )
    assert config.max_new_tokens is not None
    new_tokens = config.max_new_tokens
    if request.config.max_new_tokens is None:  # as much as there is room for
        new_tokens = max(1, min(new_tokens, min(max_context, pages * block_size) - len(prompt)))
        config = replace(config, max_new_tokens=new_tokens)
    asked = f"a prompt of {len(prompt)} tokens and max_new_tokens={new_tokens}"
    if len(prompt) + new_tokens > max_context:
        raise ValueError(
            f"{asked} exceed the engine's context of {max_context} tokens; shorten the prompt or lower max_new_tokens"
        )
    if len(prompt) + new_tokens > pages * block_size:
        raise ValueError(
            f"{asked} need more than the K/V memory of {pages * block_size} tokens; raise EngineConfig(kv_tokens=...)"
        )
    return config


def kv_pages(config: EngineConfig, pages_per_row: int, block_size: int, bytes_on: Mapping[torch.device, int]) -> int:
    """How many pages the K/V memory gets (see `EngineConfig.kv_tokens`).

    `bytes_on`: what a token takes on every device where layers run; the device with the least room for it decides.
    """
    if config.kv_tokens is not None:
        return max(1, config.kv_tokens // block_size)
    room = min(_room(device) // (bytes_per_token * block_size) for device, bytes_per_token in bytes_on.items())
    return max(1, min(pages_per_row * config.max_rows, room))


def _room(device: torch.device) -> int:
    """Bytes that K/V may take on a device."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        import psutil

        free = psutil.virtual_memory().available
    return int(free * SHARE_OF_FREE_MEMORY.get(device.type, 0.25))

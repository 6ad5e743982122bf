"""Models of a given shape with random weights: speed can be measured without a checkpoint."""

import json
from pathlib import Path
from typing import Any

from parablock.settings import Model

QWEN = {"model_type": "qwen2", "vocab_size": 151936, "max_position_embeddings": 32768, "num_key_value_heads": 2}
SHAPES: dict[str, dict[str, Any]] = {  # of SmolLM2-135M, and of Qwen2.5-0.5B, -1.5B and -7B
    "135m": {
        "model_type": "llama", "vocab_size": 49152, "max_position_embeddings": 8192, "hidden_size": 576,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0}, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    },
    "0.5b": {
        **QWEN, "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "intermediate_size": 4864,
        "tie_word_embeddings": True,
    },
    "1.5b": {
        **QWEN, "hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12, "intermediate_size": 8960,
        "tie_word_embeddings": True,
    },
    "7b": {
        **QWEN, "vocab_size": 152064, "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "intermediate_size": 18944, "tie_word_embeddings": False,
    },
}  # fmt: skip


def random_model(shape: str, *, block_size: int, dtype: Any, device: Any) -> Model:
    """A decoder with random weights: `shape` is one of `SHAPES`, or a config.json of a transformers model.

    Raises:
        ValueError: neither.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if shape.lower() in SHAPES:
        fields = dict(SHAPES[shape.lower()])
    elif Path(shape).is_file():
        fields = json.loads(Path(shape).read_text())
        if "model_type" not in fields:
            raise ValueError(f"{shape} names no model_type; pass a config.json of a transformers model")
    else:
        raise ValueError(f"shape {shape!r} is unknown; use {', '.join(SHAPES)}, or a config.json")
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    config.bd_size, config.mask_token_id = block_size, config.vocab_size - 1
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    return model.eval()

"""GGUF files of small random models, as llama.cpp's converter would write them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, TokenType, constants, get_tensor_name_map, quantize
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from parablock.checkpoints.named import BUNDLED

TOKENS = 604  # of the bundled tokenizer
SHAPE = {
    "vocab_size": TOKENS, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 64, "max_position_embeddings": 256, "initializer_range": 0.2, "head_dim": 16,
    "eos_token_id": 1, "bos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
THETA = {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
GPT2 = {
    "vocab_size": TOKENS, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "n_inner": 96,
    "eos_token_id": 1, "bos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}
# llama.cpp's name: (transformers', the config)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**SHAPE, **THETA}),
    "llama 3": ("llama", {**SHAPE, "rope_parameters": LLAMA3}),
    "qwen2": ("qwen2", {**SHAPE, **THETA}),
    "qwen3": ("qwen3", {**SHAPE, **THETA, "head_dim": 128, "tie_word_embeddings": True}),
    "qwen3moe": ("qwen3_moe", {**SHAPE, **THETA, **EXPERTS}),
    "phi3": ("phi3", {**SHAPE, **THETA, "sliding_window": 12}),
    "starcoder2": ("starcoder2", {**SHAPE, **THETA, "sliding_window": None, "tie_word_embeddings": True}),
    "gpt2": ("gpt2", GPT2),
    "gemma2": ("gemma2", {**SHAPE, "sliding_window": 12, "tie_word_embeddings": True}),
    "gemma3": ("gemma3_text", {**SHAPE, "sliding_window": 12, "num_hidden_layers": 6, "tie_word_embeddings": True}),
}  # fmt: skip


def tokenizer_of() -> Any:
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED / "diffusion")
    tokenizer.mask_token = None
    return tokenizer


def random_model(name: str) -> Any:
    kind, shape = MODELS[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **shape)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def write_gguf(
    file: Path, name: str = "llama", kind: GGMLQuantizationType = GGMLQuantizationType.F32, **fields: Any
) -> Any:
    """Write a random model; returns it. `fields`: metadata in place of what would be written, None: left out."""
    model, architecture = random_model(name), name.split()[0]
    config = model.config
    writer = GGUFWriter(file, architecture)
    told = {**_shape(architecture, config), **_tokenizer(), **{key.replace("__", "."): v for key, v in fields.items()}}
    for key, value in told.items():
        if value is not None:
            _add(writer, key, value)
    arch = next(number for number, known in constants.MODEL_ARCH_NAMES.items() if known == architecture)
    names = get_tensor_name_map(arch, config.num_hidden_layers)
    if name == "llama 3":
        factors = config_frequencies(config)
        writer.add_tensor("rope_freqs.weight", factors)
    for key, tensor in _tensors(architecture, model):
        found = names.get_name(key, try_suffixes=(".weight", ".bias"))
        assert found is not None, key
        own = kind if tensor.ndim > 1 else GGMLQuantizationType.F32
        writer.add_tensor(found, quantize(tensor, own), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def config_frequencies(config: Any) -> np.ndarray:
    """What each of Llama 3's frequencies is divided by."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    dimensions = config.head_dim
    plain = 1.0 / (config.rope_parameters["rope_theta"] ** (torch.arange(0, dimensions, 2).float() / dimensions))
    own, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    return (plain / own).numpy().astype(np.float32)


def _shape(architecture: str, config: Any) -> dict[str, Any]:
    if architecture == "gpt2":
        own = {"feed_forward_length": config.n_inner, "attention.layer_norm_epsilon": config.layer_norm_epsilon}
    else:
        rope = config.rope_parameters.get("full_attention", config.rope_parameters)
        own = {
            "feed_forward_length": config.intermediate_size, "attention.head_count_kv": config.num_key_value_heads,
            "rope.freq_base": float(rope["rope_theta"]), "rope.dimension_count": SHAPE["head_dim"],
        }  # fmt: skip
        if architecture == "starcoder2":
            own["attention.layer_norm_epsilon"] = config.norm_epsilon
        else:
            own["attention.layer_norm_rms_epsilon"] = config.rms_norm_eps
        if architecture in ("qwen3", "qwen3moe", "gemma2", "gemma3"):
            own["attention.key_length"] = own["rope.dimension_count"] = config.head_dim
        if architecture in ("phi3", "gemma2", "gemma3"):
            own["attention.sliding_window"] = config.sliding_window
        if architecture == "qwen3moe":
            own |= {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 64}
    own |= {
        "block_count": config.num_hidden_layers, "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size, "attention.head_count": config.num_attention_heads,
    }  # fmt: skip
    return {"general.name": "tiny", **{f"{architecture}.{key}": value for key, value in own.items()}}


def _tokenizer() -> dict[str, Any]:
    tokenizer = tokenizer_of()
    content = json.loads((BUNDLED / "diffusion" / "tokenizer.json").read_text())
    special = {token["id"] for token in content["added_tokens"]}
    words = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen2", "tokenizer.ggml.tokens": [w for w, _ in words],
        "tokenizer.ggml.token_type": [int(TokenType.CONTROL if i in special else TokenType.NORMAL) for _, i in words],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in content["model"]["merges"]],
        "tokenizer.ggml.eos_token_id": tokenizer.eos_token_id,
        "tokenizer.ggml.padding_token_id": tokenizer.pad_token_id, "tokenizer.chat_template": tokenizer.chat_template,
    }  # fmt: skip


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_array(key, value)


def _tensors(architecture: str, model: Any) -> list[tuple[str, np.ndarray]]:
    """A model's tensors as llama.cpp's converter hands them on."""
    state = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    made = []
    for name, tensor in state.items():
        if architecture == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = model.config.num_attention_heads if "q_proj" in name else model.config.num_key_value_heads
            rows, columns = tensor.shape
            tensor = tensor.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            tensor = tensor + 1
        if architecture == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            tensor = tensor.T
        if name.endswith("gate_up_proj"):  # of all experts: two tensors there
            gate, up = tensor.chunk(2, dim=1)
            made += [(name.replace("gate_up_proj", f"{own}_proj.weight"), t) for own, t in (("gate", gate), ("up", up))]
        elif name.endswith("experts.down_proj"):
            made.append((f"{name}.weight", tensor))
        else:
            made.append((name, tensor))
    return [(name, tensor.float().contiguous().numpy()) for name, tensor in made]

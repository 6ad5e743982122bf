"""Every architecture: load, adapt, save, reload, decode; the table in docs/architectures.md is what these tests saw."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import definitions
import pytest
import torch
from official_layout import official_loss
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, T5Config, T5ForConditionalGeneration

import parablock as pb
from parablock.checkpoints.named import BUNDLED
from parablock.data.chat import Sample

DOCS = Path(__file__).parents[1] / "docs" / "architectures.md"
TOKENS = 604  # of the bundled tokenizer
SHAPE = {
    "vocab_size": TOKENS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 64, "max_position_embeddings": 256, "initializer_range": 0.2,
    "eos_token_id": 1, "bos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
HEADS = {**SHAPE, "head_dim": 8}
GPT2 = {
    "vocab_size": TOKENS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "initializer_range": 0.2,
    "eos_token_id": 1, "bos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
WINDOW = {"sliding_window": 12}
MIXED: dict[str, Any] = {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]}

# model_type (and what else tells an example apart): (for example, config)
WORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2, Qwen2.5, Fast-dLLM v2", {**SHAPE, "vocab_size": 640}),  # a padded embedding, as Qwen's
    "qwen3": ("Qwen3", {**HEADS, "vocab_size": 640, "tie_word_embeddings": True}),
    "qwen3_moe": ("Qwen3 mixture of experts", {**HEADS, **EXPERTS}),
    "llama": ("Llama 2, 3; SmolLM, SmolLM2", SHAPE),
    "mistral": ("Mistral (no sliding window)", {**SHAPE, "sliding_window": None}),
    "mixtral": ("Mixtral", {**SHAPE, **EXPERTS, "sliding_window": None}),
    "gemma": ("Gemma 1", {**HEADS, "tie_word_embeddings": True}),
    "smollm3": ("SmolLM3 (layers without positions)", SHAPE),
    "granite": ("Granite (scaled logits)", {**SHAPE, "logits_scaling": 2.0, "embedding_multiplier": 3.0}),
    "granitemoe": ("Granite mixture of experts", {**SHAPE, **EXPERTS, "logits_scaling": 2.0}),
    "cohere": ("Command R (scaled logits)", {**SHAPE, "logit_scale": 0.5}),
    "olmo2": ("OLMo 2", SHAPE),
    "phi": ("Phi 1.5, 2 (bias in the head)", SHAPE),
    "phi3": ("Phi 3, 4 (no sliding window)", SHAPE),
    "glm": ("GLM 4", {**HEADS, "partial_rotary_factor": 0.5}),
    "starcoder2": ("StarCoder 2 (no sliding window)", {**SHAPE, "sliding_window": None}),
    "ernie4_5": ("ERNIE 4.5", SHAPE),
    "seed_oss": ("Seed-OSS", HEADS),
    "hunyuan_v1_dense": ("Hunyuan", HEADS),
    "apertus": ("Apertus", SHAPE),
    "arcee": ("AFM", SHAPE),
    "helium": ("Helium", HEADS),
    "deepseek_v2": (
        "DeepSeek V2 (latent attention)",
        {
            **SHAPE, "num_key_value_heads": 4, "n_routed_experts": 4, "moe_intermediate_size": 32, "q_lora_rank": 16,
            "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "n_group": 1,
            "topk_group": 1, "num_experts_per_tok": 2,
        },
    ),
    "gpt_neox": ("Pythia, GPT-NeoX", SHAPE),
    "gpt2": ("GPT-2 (learned positions)", GPT2),
    "gpt_bigcode": ("StarCoder 1 (learned positions)", GPT2),
    "opt": ("OPT (learned positions)", {**SHAPE, "ffn_dim": 64, "word_embed_proj_dim": 32}),
    "mistral window": ("Mistral 7B v0.1 (a sliding window in all layers)", {**SHAPE, **WINDOW}),
    "phi3 window": ("Phi 3 (a sliding window in all layers)", {**SHAPE, **WINDOW}),
    "starcoder2 window": ("StarCoder 2 (a sliding window in all layers)", {**SHAPE, **WINDOW}),
    "gemma2": ("Gemma 2 (sliding windows, capped scores)", {**HEADS, **MIXED, "attn_logit_softcapping": 2.0}),
    "gemma3_text": ("Gemma 3 (sliding windows with positions of their own)", {**HEADS, **MIXED}),
    "olmo3": ("OLMo 3 (sliding windows)", {**SHAPE, **MIXED}),
    "cohere2": ("Command R7B (sliding windows)", {**SHAPE, **MIXED, "logit_scale": 0.5}),
    "exaone4": ("EXAONE 4 (sliding windows)", {**HEADS, **MIXED}),
}  # fmt: skip

# model_type: (for example, config, what the error says)
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "gemma3_text": ("EmbeddingGemma", {**HEADS, "use_bidirectional_attention": True}, "see those after them"),
    "gpt_oss": ("gpt-oss", {**HEADS, **EXPERTS}, r"sinks \(s_aux\)"),
    "llama4_text": ("Llama 4", {**HEADS, **EXPERTS}, "layers of type chunked_attention"),
    "mamba": ("Mamba", SHAPE, "layers of type linear_attention"),
    "bloom": ("BLOOM", {"vocab_size": TOKENS, "hidden_size": 32, "n_layer": 2, "n_head": 4}, "mask does not reach"),
    "falcon": ("Falcon", SHAPE, "mask does not reach"),
    "stablelm": ("StableLM", SHAPE, "mask does not reach"),
    "nemotron": ("Nemotron, Minitron", SHAPE, "mask does not reach"),
    "bert": ("BERT and other encoders", SHAPE, "not a decoder-only language model"),
    "t5": ("T5 and other encoder-decoders", {"d_model": 32, "d_ff": 64}, "not a decoder-only language model"),
}
seen: dict[str, str] = {}  # what the table's lines will be


def write_ar_checkpoint(path: Path, kind: str, shape: dict[str, Any]) -> Any:
    """A random AR checkpoint with a tokenizer that has no mask token; returns the model."""
    torch.manual_seed(0)
    if kind == "t5":
        model: Any = T5ForConditionalGeneration(T5Config(vocab_size=TOKENS, num_layers=1, num_heads=2, **shape))
    else:
        config = AutoConfig.for_model(kind, **shape)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")  # the one that leaves nothing out
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED / "diffusion")
    tokenizer.mask_token = None
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return model.eval()


def counting(count: int) -> list[Sample]:
    """Prompts of five tokens, answers that count on from the last: learnable at once."""
    made = []
    for i in range(count):
        ids = [(7 * i + j) % 60 + 10 for j in range(11)] + [1]
        made.append(Sample(ids, [-100] * 5 + ids[5:]))
    return made


@pytest.mark.parametrize("kind", WORKS)
def test_an_architecture_works(kind: str, tmp_path: Path) -> None:
    example, shape = WORKS[kind]
    original = write_ar_checkpoint(tmp_path / "ar", kind.split()[0], shape)
    model, tokenizer = pb.load(tmp_path / "ar")
    prompt = list(range(11, 21))

    # the AR model that was, in our AR loop and in transformers'
    config = pb.DecodeConfig(max_new_tokens=12, stop_token_ids=())
    theirs = original.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert pb.generate(model, prompt, config).tokens == [theirs[0, 10:].tolist()]

    # ready for adaptation it still is that model
    pb.prepare(model, tokenizer, 8)
    config = replace(config, mode="autoregressive")
    assert pb.generate(model, prompt, config).tokens == [theirs[0, 10:].tolist()]

    # the loss, from the model's own logits in the published layout
    ids = torch.randint(5, 600, (2, 32))
    labels = ids.clone()
    labels[:, :7] = -100
    batch = (ids, labels, torch.rand(2, 32) < 0.5)
    fields = {"block_size": 8, "mask_token_id": model.config.mask_token_id}
    with torch.no_grad():
        torch.testing.assert_close(pb.diffusion_loss(model, *batch, **fields), official_loss(model, *batch, **fields))

    losses: list[float] = []
    recipe = pb.TrainConfig(
        steps=20,
        batch_size=8,
        micro_batch_size=8,
        context_length=32,
        block_size=8,
        lr=3e-3,
        warmup_steps=2,
        log_every=5,
    )
    progress = lambda _, logs: losses.append(logs["loss"]) if "loss" in logs else None  # noqa: E731
    pb.train(model, tokenizer, counting(64), recipe, tmp_path / "run", progress=progress)
    assert losses[-1] < 0.9 * losses[0]

    pb.save(model, tokenizer, tmp_path / "adapted")
    again, tokenizer_again = pb.load(tmp_path / "adapted")
    assert tokenizer_again.mask_token_id == again.config.mask_token_id == TOKENS
    assert again.config.bd_size == 8
    for (name, a), (_, b) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(a, b), name

    decode = pb.DecodeConfig(
        max_new_tokens=20, sub_block_size=4, threshold=0.5, sub_block_cache=False, stop_token_ids=()
    )
    tokens = pb.generate(again, prompt, decode).tokens
    assert tokens == pb.generate(model, prompt, decode).tokens == [definitions.block_diffusion(again, prompt, decode)]
    with pb.Engine(again) as engine:
        assert engine.generate([prompt, prompt[:7]], decode).tokens == [
            *tokens, *pb.generate(again, prompt[:7], decode).tokens
        ]  # fmt: skip
        verified = replace(decode, strategy="verified")
        tokens = [definitions.verified(again, prompt, verified)]
        assert pb.generate(again, prompt, verified).tokens == engine.generate(prompt, verified).tokens == tokens
    rows = len(model.get_input_embeddings().weight)
    seen[kind] = (
        f"| `{kind.split()[0]}` | {example} | works | {'unused row' if rows == shape['vocab_size'] else 'new row'} |"
    )


@pytest.mark.parametrize("kind", REFUSED)
def test_an_architecture_is_refused(kind: str, tmp_path: Path) -> None:
    example, shape, reason = REFUSED[kind]
    write_ar_checkpoint(tmp_path / "model", kind, shape)
    with pytest.raises(ValueError, match=reason) as caught:
        pb.load(tmp_path / "model")
    said = str(caught.value).replace(str(tmp_path / "model"), "this")
    seen[f"{kind} refused"] = f"| `{kind}` | {example} | refused: {said} | |"


HEAD = """# Which models work

Written by `pytest tests/test_architectures.py --write-docs`, from what the tests saw. "Works": a random checkpoint of
the architecture loads and gets a mask token; its AR decoding equals transformers' own greedy generation; the diffusion
loss equals the one computed from the model's own logits in the published layout; it adapts (the loss falls), saves,
reloads bit-equal; and block decoding with the cache, in the reference loop and in the engine, equals decoding without
any. Where a sliding window is named, the answers reach beyond it. The last column says which row of the test's
embedding the mask token got: an unused one where the matrix was padded, else a new one.

| `model_type` | for example | | mask token |
|---|---|---|---|
"""


def test_the_table_in_the_docs(request: pytest.FixtureRequest) -> None:
    expected = [*WORKS, *(f"{kind} refused" for kind in REFUSED)]
    if set(seen) != set(expected):
        pytest.skip("needs all tests of this file to have run and passed")
    table = HEAD + "\n".join(seen[kind] for kind in expected) + "\n"
    if request.config.getoption("--write-docs"):
        DOCS.write_text(table)
    assert DOCS.read_text() == table

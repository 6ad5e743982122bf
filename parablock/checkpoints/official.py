"""The published Fast-dLLM v2 checkpoints (`model_type` "Fast_dLLM_Qwen") without their code: stock Qwen2 classes.

`import parablock` lets transformers' Auto classes find the config (see `__init__.py`); this module is imported when the
first such checkpoint is met, and brings model and tokenizer along. They win over the code that the checkpoints name in
`auto_map`, whatever `trust_remote_code` says. The class names are those of the published files.
"""

from typing import Any

from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
from transformers.models.auto import tokenization_auto

from parablock.checkpoints.look import OFFICIAL
from parablock.decoding.config import DecodeConfig
from parablock.decoding.transformers_generate import generate_ids
from parablock.training.mask_token import MASK_TOKEN


class Fast_dLLM_QwenConfig(Qwen2Config):  # type: ignore[no-untyped-call]  # noqa: N801
    """Qwen2's config with the block size and the mask token (which the published files lack)."""

    model_type = OFFICIAL
    bd_size: int = 32
    mask_token_id: int = 151665

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs.pop("auto_map", None)  # names the published code, which is not run and must not be saved again
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]


class Fast_dLLM_QwenForCausalLM(Qwen2ForCausalLM):  # type: ignore[no-untyped-call]  # noqa: N801
    """`Qwen2ForCausalLM` in all (its plain forward is causal) but `generate`, which decodes by block diffusion."""

    config_class = Fast_dLLM_QwenConfig

    def load_custom_generate(self, *args: Any, **kwargs: Any) -> Any:
        """A `custom_generate/` folder in the checkpoint would take the place of `generate`: it is not looked for."""
        raise OSError("parablock's Fast-dLLM v2 classes bring their own generate")

    def generate(  # type: ignore[override]
        self,
        input_ids: Tensor,
        max_new_tokens: int | None = None,
        mask_id: int | None = None,
        threshold: float = 1.0,
        small_block_size: int = 8,
        block_size: int | None = None,
        stop_token: int | None = None,
        stopping_criteria: None = None,
        top_p: float = 0.95,
        temperature: float = 0.0,
        use_block_cache: bool = False,
        *,
        tokenizer: Any = None,
        attention_mask: Tensor | None = None,
        streamer: Any = None,
        seed: int | None = None,
    ) -> Tensor:
        """As the published model card calls it, with the published defaults; `parablock.generate` offers more.

        Args:
            input_ids: `[B, L]`; with `attention_mask`, rows may be padded on either side.
            max_new_tokens: exact, not rounded to blocks. Default: 512, or what the context leaves.
            mask_id: default: the checkpoint's.
            threshold: reveal what is more confident than this; 1.0 reveals one token per step.
            small_block_size: the sub-block size S.
            block_size: D; default: the checkpoint's.
            stop_token: default: all that the checkpoint's generation config names.
            stopping_criteria: not supported.
            top_p: the nucleus of sampling; without effect at `temperature=0`.
            temperature: 0 is greedy.
            use_block_cache: the sub-block cache.
            tokenizer: accepted, not needed.
            attention_mask: `[B, L]`, 0 at padding.
            streamer: as in transformers; a `TextDiffusionStreamer` also gets the drafts.
            seed: makes sampling repeatable; by default torch's generator decides.

        Returns:
            Prompts and responses, `[B, L + N]`; a response that ends early is padded.

        Raises:
            ValueError: as `parablock.generate`, and for `stopping_criteria`.
        """
        if stopping_criteria is not None:
            raise ValueError("stopping_criteria is not supported; use stop_token and max_new_tokens")
        config = DecodeConfig(
            mode="diffusion",
            max_new_tokens=max_new_tokens,
            mask_token_id=mask_id,
            threshold=threshold,
            sub_block_size=small_block_size,
            block_size=block_size,
            stop_token_ids=None if stop_token is None else (stop_token,),
            top_p=top_p,
            temperature=temperature,
            sub_block_cache=use_block_cache,
            seed=seed,
        )
        if streamer is not None:
            streamer.put(input_ids.cpu())
        return generate_ids(self, input_ids, config, attention_mask=attention_mask, streamer=streamer)


class Fast_dLLM_QwenTokenizer(Qwen2Tokenizer):  # noqa: N801
    """Loads Qwen2's tokenizer and tells it which of its tokens is the mask token (the published files do not say)."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """A `Qwen2Tokenizer`, which is also what is saved again."""
        return Qwen2Tokenizer.from_pretrained(*args, **{"mask_token": MASK_TOKEN, **kwargs})


AutoModelForCausalLM.register(Fast_dLLM_QwenConfig, Fast_dLLM_QwenForCausalLM, exist_ok=True)
AutoTokenizer.register(  # type: ignore[no-untyped-call]
    Fast_dLLM_QwenConfig, tokenizer_class=Fast_dLLM_QwenTokenizer, exist_ok=True
)
# the published files name Qwen2Tokenizer; transformers lists the model types whose files name the wrong class
tokenization_auto.TOKENIZER_MAPPING_NAMES[OFFICIAL] = Fast_dLLM_QwenTokenizer.__name__
tokenization_auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS.add(OFFICIAL)

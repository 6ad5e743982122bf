"""The decoder where users of transformers look for it: behind `model.generate`, with its streamers."""

import inspect
import warnings
from typing import Any, cast

import torch
from torch import Tensor
from transformers.generation.utils import GenerateDecoderOnlyOutput

from parablock.decoding.config import DecodeConfig, Drafter, Mode, Strategy
from parablock.decoding.generate import Step, stream
from parablock.settings import Model

SUPPORTED_PROCESSORS = {"TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper"}  # sampling does what they do
SUPPORTED_CRITERIA = {"MaxLengthCriteria", "EosTokenCriteria"}


def custom_generate(
    model: Model,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    streamer: Any = None,
    *,
    mode: Mode | None = None,
    block_size: int | None = None,
    sub_block_size: int = 8,
    strategy: Strategy = "threshold",
    threshold: float = 0.9,
    factor: float = 1.0,
    tokens_per_step: int = 1,
    sub_block_cache: bool = True,
    drafter: Drafter | None = None,
    draft_tokens: int | None = None,
    draft_threshold: float = 0.0,
    mask_token_id: int | None = None,
    seed: int | None = None,
    **model_kwargs: Any,
) -> Any:
    """The hook of transformers: `model.generate(ids, custom_generate=pb.custom_generate, threshold=0.9, ...)`.

    The keywords are fields of `DecodeConfig`. Length, stop tokens and sampling come from transformers' own arguments
    (`max_new_tokens`, `eos_token_id`, `do_sample`, `temperature`, `top_p`, `top_k`), a padded batch from
    `attention_mask`. Returns what `generate` returns: prompts and responses `[B, L + N]`, padded after a response that
    ended; with `return_dict_in_generate=True` an object with `sequences`. `streamer` gets every token as soon as no
    mask stands before it (`put`), and where it takes drafts (`put_draft`, as `TextDiffusionStreamer`) the rest of the
    block in block diffusion, the drafts that wait to be verified in speculative decoding.

    Raises:
        ValueError: an argument that parablock's decoding cannot honour (beam search, a penalty, a stop string ...).
    """
    _refuse_unsupported(model, logits_processor, stopping_criteria, generation_config)
    sampling: dict[str, Any] = {}
    if generation_config.do_sample:
        given = {"temperature": 1.0, "top_p": 1.0, "top_k": None}
        sampling = {name: getattr(generation_config, name) or default for name, default in given.items()}
    stops = generation_config.eos_token_id
    config = DecodeConfig(
        mode=mode,
        max_new_tokens=generation_config.max_length - input_ids.shape[1],
        block_size=block_size,
        sub_block_size=sub_block_size,
        strategy=strategy,
        threshold=threshold,
        factor=factor,
        tokens_per_step=tokens_per_step,
        sub_block_cache=sub_block_cache,
        drafter=drafter,
        draft_tokens=draft_tokens,
        draft_threshold=draft_threshold,
        stop_token_ids=() if stops is None else (stops,) if isinstance(stops, int) else tuple(stops),
        mask_token_id=mask_token_id,
        seed=seed,
        **sampling,
    )
    sequences = generate_ids(
        model,
        input_ids,
        config,
        attention_mask=model_kwargs.get("attention_mask"),
        pad_token_id=generation_config.pad_token_id,
        streamer=_streamer_of_the_call() if streamer is None else streamer,
    )
    if generation_config.return_dict_in_generate:
        return GenerateDecoderOnlyOutput(sequences=cast(torch.LongTensor, sequences))
    return sequences


def generate_ids(
    model: Model,
    input_ids: Tensor,
    config: DecodeConfig,
    *,
    attention_mask: Tensor | None = None,
    pad_token_id: int | None = None,
    streamer: Any = None,
) -> Tensor:
    """Decode `input_ids [B, L]`, padded where `attention_mask` is 0, into prompts and responses `[B, L + N]`.

    N is the longest response; shorter ones are filled with `pad_token_id` (default: the model's, else its first stop
    token). `streamer` as in `custom_generate`; the prompt is not sent to it.
    """
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids has shape {list(input_ids.shape)}; pass [rows, tokens]")
    if streamer is not None and len(input_ids) > 1:
        raise ValueError(f"a streamer shows one row, and input_ids has {len(input_ids)}; pass one prompt at a time")
    rows = list(input_ids)
    if attention_mask is not None:
        rows = [row[kept] for row, kept in zip(input_ids, attention_mask.bool(), strict=True)]
    sent = 0
    for step in stream(model, [row.tolist() for row in rows], config):
        if streamer is not None:
            sent = _show(streamer, step, sent)
    if streamer is not None:
        streamer.end()
    responses = [step.tokens(row) for row in range(len(rows))]
    own = model.generation_config
    fills = (pad_token_id, own.pad_token_id, model.config.pad_token_id, own.eos_token_id, 0)
    fill = next(f for f in fills if f is not None)
    fill = fill[0] if isinstance(fill, list) else fill
    longest = max(len(r) for r in responses)
    padded = [r + [fill] * (longest - len(r)) for r in responses]
    return torch.cat([input_ids, torch.tensor(padded, dtype=input_ids.dtype, device=input_ids.device)], dim=1)


def _show(streamer: Any, step: Step, sent: int) -> int:
    """Send the settled tokens after the first `sent`, then the rest of the window as a draft; returns how many."""
    response = step.tokens(0)
    if len(response) > sent:
        streamer.put(torch.tensor(response[sent:]))
    if hasattr(streamer, "put_draft") and not step.done[0] and len(draft := step.draft(0)):
        streamer.put_draft(torch.from_numpy(draft))
    return len(response)


def _streamer_of_the_call() -> Any:
    """The streamer given to `model.generate`.

    transformers (5.23) shows the prompt to it but does not pass it to a hook, so it is read from the caller: the frame
    of `generate`, two above this one.
    """
    here = inspect.currentframe()
    hook = here.f_back if here else None
    caller = hook.f_back if hook else None
    if caller is not None and caller.f_code.co_name == "generate":
        return caller.f_locals.get("streamer")
    return None


def _refuse_unsupported(model: Model, processors: Any, criteria: Any, generation_config: Any) -> None:
    remedy = "parablock cannot honour it; leave it out, or decode without custom_generate"
    if generation_config.num_beams not in (None, 1):
        raise ValueError(f"num_beams={generation_config.num_beams}: {remedy}")
    for criterion in criteria:
        if type(criterion).__name__ not in SUPPORTED_CRITERIA:
            raise ValueError(f"the stopping criterion {type(criterion).__name__}: {remedy}")
    penalty = generation_config.repetition_penalty
    for processor in processors:
        name = type(processor).__name__
        if name == "RepetitionPenaltyLogitsProcessor" and penalty == model.generation_config.repetition_penalty:
            # the checkpoint's habit, not this caller's wish: Qwen's generation_config.json has one
            warnings.warn(
                f"repetition_penalty={penalty} of the checkpoint's generation config is not applied", stacklevel=5
            )
        elif name not in SUPPORTED_PROCESSORS:
            raise ValueError(f"the logits processor {name}: {remedy}")

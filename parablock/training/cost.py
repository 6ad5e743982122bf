"""What a training will cost, computed before it starts: tokens, floating-point operations, memory, GPU-hours."""

from dataclasses import dataclass

from parablock.training.config import TrainConfig

GPUS = {"A100": (312e12, 80), "H100": (989e12, 80), "RTX 4090": (165e12, 24)}  # dense bf16 FLOP/s, GB
UTILISATION = 0.4  # the share of the peak that trainings of this kind reach


@dataclass(frozen=True)
class Shape:
    """What of a model's shape the cost depends on. `parameters` counts all of them, the embeddings included."""

    parameters: float
    layers: int
    hidden: int
    vocabulary: int
    trainable: float | None = None  # None: all


@dataclass(frozen=True)
class Cost:
    """`row_tokens` enter the model as data, `forward_tokens` run through it (clean, and noisy units or masks)."""

    row_tokens: float
    forward_tokens: float
    flops: float
    memory_gb: float  # of one GPU without sharding; activations of one micro-batch included

    def gpu_hours(self, gpu: str) -> float:
        """Hours on one GPU of that name at 40 % of its peak."""
        return self.flops / (GPUS[gpu][0] * UTILISATION) / 3600


def estimate(shape: Shape, config: TrainConfig, *, learned_share: float, fill: float = 1.0) -> Cost:
    """The cost of a run; `learned_share` of the tokens are responses, rows are filled to `fill`.

    Every token runs once clean; a response token also in two noisy copies, or in one without the complementary view.
    The head runs at learned positions only. Backward costs twice the forward (once, where the weights are frozen),
    gradient checkpointing one forward more. In causal context the clean tokens run forward alone, and the masks behind
    the anchors forward and backward.
    Training state: weights, gradients and two moments in float32 (16 bytes a parameter); frozen weights in bf16.
    """
    rows = config.batch_size * config.steps
    row_tokens = rows * config.context_length * fill
    learned = row_tokens * learned_share
    if config.context == "causal":
        masks = config.draft_tokens * min(learned, rows * config.anchors)
        once, often, learned = row_tokens, masks, masks
    else:
        copies = {"autoregressive": 0, "diffusion": 2 if config.complementary else 1}[config.mode]
        once, often = 0.0, row_tokens * (1 + copies * learned_share + (config.ar_loss_weight > 0))
        learned *= 1 if config.complementary else 0.5
    head = shape.vocabulary * shape.hidden
    body = shape.parameters - head
    passes = (3 if shape.trainable is None else 2) + config.gradient_checkpointing
    attention = 2 * shape.layers * shape.hidden * config.context_length / 2  # q k and weights v over half the row
    flops = 2 * ((once + passes * often) * (body + attention) + passes * learned * head)

    trainable = shape.parameters if shape.trainable is None else shape.trainable
    state = 16 * trainable + (0 if shape.trainable is None else 2 * shape.parameters)
    tokens = often / rows * config.micro_batch_size
    kept = 2 if config.gradient_checkpointing else 34  # bytes per token, layer and hidden unit
    activations = tokens * shape.hidden * (kept * shape.layers + 34)
    known = 4 * once / rows * config.micro_batch_size * shape.hidden * shape.layers  # K and V of the clean tokens
    logits = 3 * 4 * min(2**26, tokens * shape.vocabulary)
    return Cost(row_tokens, once + often, flops, (state + activations + known + logits) / 1e9)

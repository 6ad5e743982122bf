"""What a user can set, one frozen dataclass per stage; every wrong value is a ValueError that names it."""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal, get_args

Model = Any  # a decoder-only language model of transformers; what its config holds depends on the architecture
LEAST = 1e-6  # what is smaller vanishes when probabilities are computed in float32
Mode = Literal["diffusion", "autoregressive"]
Strategy = Literal["threshold", "factor", "fixed"]
FirstTokenContext = Literal["noisy", "clean"]


def _require(ok: bool, name: str, value: object, remedy: str) -> None:
    if not ok:
        raise ValueError(f"{name}={value!r} is out of range; {remedy}")


def _require_choice(name: str, value: object, choices: Any) -> None:
    named = [repr(choice) for choice in get_args(choices)]
    _require(value in get_args(choices), name, value, f"use {', '.join(named[:-1])} or {named[-1]}")


def require_library(name: str, extra: str) -> None:
    """ValueError that names the remedy unless the library of an optional extra is installed."""
    if find_spec(name) is None:
        raise ValueError(f"this needs {name}; install it with: pip install 'parablock[{extra}]'")


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained (`mode="autoregressive"`) or adapted to block diffusion (`mode="diffusion"`).

    Steps: `batch_size` counts rows per optimisation step over all processes, `micro_batch_size` rows per forward and
    process. `lr` is AdamW's, `muon_lr` Muon's; both warm up over `warmup_steps`, then follow `schedule`: "cosine" to
    zero, or "stable" with a linear fall to zero over the last `decay_share` of the steps.

    Rows: `packing` fills rows of `context_length` tokens with several samples, which see nothing of each other unless
    `isolate_samples` is off; without packing a row is one sample.

    The objective's switches (Fast-dLLM v2, table 2, and beyond): `block_padding=False` lets samples share blocks,
    `complementary=False` learns from one noisy view only, `first_token_context` as in `diffusion_loss`, and
    `ar_loss_weight` adds a weighted autoregressive loss, which keeps the model's other mode alive.

    `gradient_checkpointing` trades time for memory; `fsdp` shards model and optimizer over the processes (FSDP2).
    `save_every` steps (0: never) a checkpoint to resume from is written, the newest `keep_checkpoints` are kept.
    `report_to` names Trainer integrations ("tensorboard", "wandb", "trackio").
    """

    mode: Mode = "diffusion"
    steps: int = 1000
    batch_size: int = 32
    micro_batch_size: int = 32
    context_length: int = 2048
    packing: bool = True
    isolate_samples: bool = True
    block_padding: bool = True
    block_size: int = 32
    complementary: bool = True
    first_token_context: FirstTokenContext = "noisy"
    ar_loss_weight: float = 0.0
    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: float = 1e-4
    muon_lr: float = 5e-3
    weight_decay: float = 0.0
    schedule: Literal["stable", "cosine"] = "stable"
    warmup_steps: int = 50
    decay_share: float = 0.3
    max_grad_norm: float = 1.0
    bf16: bool = False
    gradient_checkpointing: bool = False
    fsdp: bool = False
    seed: int = 0
    log_every: int = 20
    save_every: int = 0
    keep_checkpoints: int = 2
    report_to: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _require_choice("mode", self.mode, Mode)
        _require_choice("optimizer", self.optimizer, Literal["adamw", "muon"])
        _require_choice("schedule", self.schedule, Literal["stable", "cosine"])
        _require_choice("first_token_context", self.first_token_context, FirstTokenContext)
        for name in ("steps", "batch_size", "micro_batch_size", "context_length", "block_size", "log_every"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "use at least 1")
        _require(self.keep_checkpoints >= 2, "keep_checkpoints", self.keep_checkpoints, "use at least 2: one is whole")
        _require(
            self.batch_size % self.micro_batch_size == 0,
            "micro_batch_size", self.micro_batch_size, f"use a divisor of batch_size={self.batch_size}",
        )  # fmt: skip
        _require(
            self.context_length % self.block_size == 0,
            "context_length", self.context_length, f"use a multiple of block_size={self.block_size}",
        )  # fmt: skip
        _require(0 <= self.decay_share <= 1, "decay_share", self.decay_share, "use a value in [0, 1]")
        _require(min(self.lr, self.muon_lr) > 0, "lr", (self.lr, self.muon_lr), "use positive learning rates")
        _require(self.ar_loss_weight >= 0, "ar_loss_weight", self.ar_loss_weight, "use 0 or more")
        if not self.block_padding:
            remedy = "samples that share blocks need packing=True and isolate_samples=False"
            _require(self.packing and not self.isolate_samples, "block_padding", self.block_padding, remedy)
        if self.ar_loss_weight:
            remedy = "the autoregressive loss needs complementary=True, which learns every token"
            _require(self.complementary, "ar_loss_weight", self.ar_loss_weight, remedy)
        if self.fsdp:
            _require(self.optimizer == "adamw", "fsdp", self.fsdp, "Muon needs whole matrices; use optimizer='adamw'")


@dataclass(frozen=True)
class AdaptConfig(TrainConfig):
    """A whole adaptation: the recipe (`TrainConfig`), and what it starts from.

    `data` as `data.sources.load_data` reads it; `too_long` says what happens to samples longer than the context
    ("drop", "truncate", "refuse"), `streaming` fetches only the `max_samples` that are used. `lora_rank` above 0 trains
    a LoRA adapter of that rank on all linear layers instead of the weights. Every `check_every` steps (0: never)
    `check_samples` held-out prompts are answered.
    """

    model: str = ""
    data: str = ""
    lr: float = 2e-5
    schedule: Literal["stable", "cosine"] = "cosine"
    micro_batch_size: int = 1
    max_samples: int | None = None
    too_long: Literal["drop", "truncate", "refuse"] = "drop"
    streaming: bool = False
    data_workers: int = 1
    lora_rank: int = 0
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    check_every: int = 0
    check_samples: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, remedy in (("model", "a directory or hub id"), ("data", "a file, a hub id or a shorthand")):
            _require(bool(getattr(self, name)), name, getattr(self, name), f"name {remedy}")
        _require_choice("too_long", self.too_long, Literal["drop", "truncate", "refuse"])
        for name in ("max_samples", "data_workers", "check_samples"):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, value, "use at least 1")
        _require(self.lora_rank >= 0, "lora_rank", self.lora_rank, "use 0 (no LoRA) or more")


@dataclass(frozen=True)
class DecodeConfig:
    """How text is decoded. `mode="diffusion"` reveals several tokens per forward, `"autoregressive"` one.

    `strategy`: `"threshold"` reveals every position whose confidence is above `threshold`, `"factor"` as many of the
    most confident ones as `factor` allows, `"fixed"` the `tokens_per_step` most confident. `sub_block_cache` reuses the
    K/V of the other sub-blocks of the block being decoded. None means:
    512, or what the context leaves (`max_new_tokens`); the checkpoint's own (`block_size`, `mask_token_id`,
    `stop_token_ids`); no limit (`top_k`); a fresh one (`seed`).
    """

    mode: Mode = "diffusion"
    max_new_tokens: int | None = None
    block_size: int | None = None
    sub_block_size: int = 8
    strategy: Strategy = "threshold"
    threshold: float = 0.9
    factor: float = 1.0
    tokens_per_step: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    sub_block_cache: bool = True
    stop_token_ids: tuple[int, ...] | None = None
    mask_token_id: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        _require_choice("mode", self.mode, Mode)
        _require_choice("strategy", self.strategy, Strategy)
        for name in ("max_new_tokens", "sub_block_size", "tokens_per_step", "top_k"):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, value, "use at least 1")
        _require(0.0 <= self.threshold <= 1.0, "threshold", self.threshold, "use a value in [0, 1]")
        _require(self.factor > 0.0, "factor", self.factor, "use a positive value")
        sampled = LEAST <= self.temperature <= 1 / LEAST
        remedy = f"use 0 (greedy) or a value in [{LEAST:g}, {1 / LEAST:g}]"
        _require(self.temperature == 0.0 or sampled, "temperature", self.temperature, remedy)
        _require(LEAST <= self.top_p <= 1.0, "top_p", self.top_p, f"use a value in [{LEAST:g}, 1]")
        if self.block_size is not None:
            _require(self.block_size >= 1, "block_size", self.block_size, "use at least 1")
            self.check_sub_block(self.block_size)

    def check_sub_block(self, block_size: int) -> None:
        """ValueError unless `block_size` is a whole number of sub-blocks."""
        _require(
            block_size % self.sub_block_size == 0,
            "sub_block_size", self.sub_block_size, f"use a divisor of the block size {block_size}",
        )  # fmt: skip


@dataclass(frozen=True)
class EngineConfig:
    """How an engine shares one model between many requests.

    `max_rows`: how many requests run together. `max_queue`: how many more may wait; None: any number. `kv_tokens`:
    how many tokens the K/V memory holds, prompts and answers; None: what `max_rows` requests of full context need, or
    less, so that it fits a quarter of the free memory (three quarters on CUDA). `max_context`: the longest prompt with
    its answer; None: the model's own. `block_size` None: the checkpoint's own. `prefill_chunk`: how many prompt tokens
    a step runs at most, so that a long prompt does not stall the others (more where more tokens than that are decoded
    in the step). `prefix_cache`: keep the K/V of finished requests, and reuse what a new prompt begins with, as long as
    nobody else needs the memory.

    `compile`: torch.compile the model's forward: some 20 seconds at the first steps, faster steps after. `cuda_graphs`:
    capture the forward of every shape; rows and contexts are padded to powers of two. `threads`: of torch on a CPU;
    None: one for small steps, all for large ones.
    """

    max_rows: int = 32
    max_queue: int | None = None
    kv_tokens: int | None = None
    max_context: int | None = None
    block_size: int | None = None
    prefill_chunk: int = 256
    prefix_cache: bool = True
    compile: bool = False
    cuda_graphs: bool = False
    threads: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_rows", "kv_tokens", "max_context", "block_size", "prefill_chunk", "threads"):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, value, "use at least 1")
        _require(self.max_queue is None or self.max_queue >= 0, "max_queue", self.max_queue, "use 0 or more")


@dataclass(frozen=True)
class ServeConfig:
    """How `parablock serve` listens, and what it refuses.

    `max_rows` answers are decoded together, `max_queue` more may wait; beyond that requests are refused (429).
    `deadline`: seconds until an answer must be whole. `max_body`: bytes of a request. `cors_origin`: web pages of these
    origins may ask; None: none. `drain`: seconds that running requests get after SIGTERM. `compile`: the engine's.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    max_rows: int = 32
    max_queue: int = 128
    deadline: float = 600.0
    max_body: int = 1_000_000
    cors_origin: tuple[str, ...] | None = None
    drain: float = 60.0
    compile: bool = False

    def __post_init__(self) -> None:
        _require(0 <= self.port <= 65535, "port", self.port, "use 1 to 65535, or 0 for any free one")
        _require(self.max_rows >= 1, "max_rows", self.max_rows, "use at least 1")
        _require(self.max_queue >= 0, "max_queue", self.max_queue, "use 0 or more")
        _require(self.max_body >= 1, "max_body", self.max_body, "use at least 1")
        _require(self.deadline > 0, "deadline", self.deadline, "use a positive number of seconds")
        _require(self.drain >= 0, "drain", self.drain, "use 0 or more seconds")


@dataclass(frozen=True)
class BenchConfig:
    """What `parablock bench` measures: the cross product of the lists, each case `repeats` times.

    `concurrency`: requests in flight. `prompt_tokens`: prompts of random tokens of these lengths; empty: the workload's
    own prompts. `thresholds`, `sub_block_sizes`, `sub_block_cache`: of block diffusion alone. `compile`: the engine's.
    A case answers `requests` prompts, or `rounds` times its concurrency, whichever is more. Answers have at most
    `new_tokens` tokens, to random prompts exactly so many. `tokens_per_step`: reveal so many per step instead of what a
    threshold allows (for random weights, whose confidence means nothing).
    """

    concurrency: tuple[int, ...] = (1, 8, 32)
    prompt_tokens: tuple[int, ...] = ()
    thresholds: tuple[float, ...] = (0.9,)
    sub_block_sizes: tuple[int, ...] = (8,)
    sub_block_cache: tuple[bool, ...] = (True,)
    compile: tuple[bool, ...] = (False,)
    new_tokens: int = 128
    requests: int = 16
    rounds: int = 2
    repeats: int = 5
    tokens_per_step: int | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        for name in ("new_tokens", "requests", "rounds", "repeats", "tokens_per_step", "threads"):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, value, "use at least 1")
        for name in ("concurrency", "thresholds", "sub_block_sizes", "sub_block_cache", "compile"):
            _require(bool(getattr(self, name)), name, getattr(self, name), "name at least one value")
        for name in ("concurrency", "prompt_tokens", "sub_block_sizes"):
            _require(all(v >= 1 for v in getattr(self, name)), name, getattr(self, name), "use values of at least 1")
        _require(
            all(0.0 <= v <= 1.0 for v in self.thresholds), "thresholds", self.thresholds, "use values in [0, 1]"
        )  # fmt: skip


@dataclass(frozen=True)
class EvalConfig:
    """What `parablock eval` measures, and how the questions are put.

    `tasks`: names of lm-evaluation-harness tasks, groups or patterns, "word_problems" (the bundled task), "humaneval",
    "mbpp" (code: needs `run_code`, which allows model-written programs to run in a sandbox). `suite` "paper": the tasks
    and settings of Fast-dLLM v2 instead. `data`: local files in place of a task's dataset, "task=file" or
    "task:split=file". `include_path`: a folder with task definitions of your own.

    `limit`: only the first so many questions of each task. `batch_size`: how many are answered together.
    `num_fewshot` None: the task's own. `chat` None: the chat template where the tokenizer has one; `system`: a system
    message. `multiturn`: few-shot examples as turns of a chat. `seed`: of few-shot choices and sampling, and which
    problems of the bundled task.
    """

    tasks: tuple[str, ...] = ()
    suite: Literal["paper"] | None = None
    data: tuple[str, ...] = ()
    include_path: str | None = None
    limit: int | None = None
    batch_size: int = 32
    num_fewshot: int | None = None
    chat: bool | None = None
    system: str | None = None
    multiturn: bool = True
    seed: int = 1
    run_code: bool = False

    def __post_init__(self) -> None:
        _require(bool(self.tasks) != bool(self.suite), "tasks", self.tasks, "name tasks, or use suite='paper'")
        _require(self.suite in (None, "paper"), "suite", self.suite, "use 'paper'")
        for name in ("limit", "batch_size"):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, value, "use at least 1")
        _require(self.num_fewshot is None or self.num_fewshot >= 0, "num_fewshot", self.num_fewshot, "use 0 or more")
        _require(self.system is None or self.chat is not False, "system", self.system, "it needs the chat template")

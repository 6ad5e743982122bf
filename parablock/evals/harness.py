"""A model in lm-evaluation-harness: answers through the engine, likelihoods by the chain rule.

`lm_eval.simple_evaluate(model=ParablockLM("my-model", threshold=0.9), tasks=["gsm8k"])`. Under `accelerate launch`
every process has a model of its own and answers its share of the questions.
"""

import os
import time
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from tqdm import tqdm

from parablock.data.chat import encode_rendered, render
from parablock.decoding.config import DecodeConfig
from parablock.decoding.generate import resolve
from parablock.engine.config import EngineConfig
from parablock.engine.engine import Engine
from parablock.engine.request import Handle, Request
from parablock.evals.cost import Cost, summed
from parablock.evals.likelihood import log_likelihood
from parablock.server.text import AnswerText
from parablock.settings import Model

PAGE = 32
DEFAULT_NEW_TOKENS = 256  # the harness's own, for tasks that do not say
UNDERSTOOD = {"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k"}


@register_model("parablock")
class ParablockLM(TemplateLM):  # type: ignore[misc]
    """A checkpoint for the harness.

    Args:
        pretrained: as `parablock.load` takes it, or a loaded model (then with its `tokenizer`).
        batch_size: answers decoded together, at most.
        device: a torch device; by default CUDA where there is one, one per process.
        dtype: as of `parablock.load`.
        compile: torch.compile the engine's forward.
        decoding: fields of `DecodeConfig`. `max_new_tokens` replaces the tasks' own; sampling settings of a task
            (`do_sample`) replace these.

    Raises:
        ValueError: a checkpoint or settings that cannot work.
    """

    def __init__(
        self,
        pretrained: Any = "bundled",
        tokenizer: Any = None,
        *,
        batch_size: int | str = 32,
        max_batch_size: int | None = None,
        device: str | None = None,
        dtype: Any = None,
        compile: bool = False,
        **decoding: Any,
    ) -> None:
        super().__init__()
        config = DecodeConfig(**decoding)  # wrong settings are told before anything is loaded
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ValueError(f"batch_size={batch_size!r} is not understood; use a number of answers, at least 1")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            device = self._join(device)
        if isinstance(pretrained, (str, Path)):
            from parablock.checkpoints.load import load

            pretrained, tokenizer = load(pretrained, device=device, dtype=dtype)
        self.model: Model = pretrained
        self.tokenizer = tokenizer
        self.config = replace(
            resolve(self.model, [[0]], replace(config, max_new_tokens=1)), max_new_tokens=config.max_new_tokens
        )
        self.costs: dict[str, Cost] = defaultdict(Cost)  # by task
        self.too_long = 0  # requests whose beginning was cut off
        self._device = self.model.device
        self._rows = min(int(batch_size), int(max_batch_size or batch_size))
        self._compile = compile
        bos = tokenizer.bos_token_id
        self._prefix = self.eot_token_id if bos is None else int(bos)

    def _join(self, device: str | None) -> str:
        """Become one process of many; returns this one's device."""
        from accelerate import PartialState

        state = PartialState(cpu=not torch.cuda.is_available() or device == "cpu")
        self._rank, self._world_size = state.process_index, state.num_processes
        return str(state.device)

    # --- what the harness asks ---------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """The first token that ends an answer."""
        stops = self.config.stop_token_ids or (self.tokenizer.eos_token_id or 0,)
        return int(stops[0])

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has nothing before it."""
        return self._prefix

    @property
    def max_length(self) -> int:
        """The model's context."""
        return int(self.model.config.max_position_embeddings)

    @property
    def tokenizer_name(self) -> str:
        """For the harness's cache of requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The tokenizer's template, for the harness's report."""
        return self.tokenizer.chat_template if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the model reads it; special tokens spelled out in a message stay text."""
        if add_generation_prompt:
            return render(self.tokenizer, chat_history, add_generation_prompt=True)
        *before, last = chat_history  # the last message is the beginning of the answer
        return render(self.tokenizer, before, add_generation_prompt=True) + last["content"]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The ids of a text; unless told otherwise begun as the tokenizer begins one."""
        ids = encode_rendered(self.tokenizer, string)
        if add_special_tokens is False:
            return ids
        begin = [i for i in self.tokenizer("")["input_ids"] if i == self.tokenizer.bos_token_id]
        return ids if ids[: len(begin)] == begin else begin + ids

    def all_gather(self, tensor: Tensor) -> Tensor:
        """The tensors of all processes behind one another."""
        from accelerate.utils import gather

        return gather(tensor) if self.world_size > 1 else tensor

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """The objects of all processes, on process `dst`."""
        if self.world_size == 1:
            return [obj]
        collected: list[Any] | None = [None] * self.world_size if self.rank == dst else None
        torch.distributed.gather_object(obj, collected, dst=dst)
        return collected

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world_size > 1:
            torch.distributed.barrier()

    def get_model_info(self) -> dict[str, Any]:
        """For the harness's report."""
        return {"model_num_parameters": self.model.num_parameters(), "model_dtype": str(self.model.dtype)}

    # --- answers -----------------------------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The answers to (context, settings) pairs, each up to its first stop string.

        Raises:
            ValueError: a setting that is not understood (it is never ignored).
        """
        answers: dict[int, str] = {}
        settings = EngineConfig(
            max_rows=min(self._rows, max(1, len(requests))),
            block_size=self.config.block_size or PAGE,  # a plain AR model has none
            compile=self._compile,
        )
        by_task = sorted(range(len(requests)), key=lambda i: requests[i].task_name or "")
        bar = tqdm(total=len(requests), desc="answers", disable=disable_tqdm or self.rank != 0)
        with bar, Engine(self.model, settings) as engine:
            for task, numbers in groupby(by_task, key=lambda i: requests[i].task_name or ""):
                cost, started = self.costs[task], time.perf_counter()
                before = engine.prefill_tokens, engine.prefill_seconds
                for number, answer in self._answer(engine, requests, list(numbers), cost):
                    answers[number] = answer
                    self.cache_hook.add_partial("generate_until", requests[number].args, answer)
                    bar.update()
                cost.seconds += time.perf_counter() - started
                cost.prompt_tokens += engine.prefill_tokens - before[0]
                cost.prefill_seconds += engine.prefill_seconds - before[1]
        return [answers[number] for number in range(len(requests))]

    def _answer(
        self, engine: Engine, requests: Sequence[Any], numbers: Sequence[int], cost: Cost
    ) -> Iterator[tuple[int, str]]:
        """The answers to `requests[numbers]` as they end, as many at a time as the engine has rows."""
        waiting = deque(numbers)
        running: list[tuple[int, Handle, AnswerText]] = []
        pieces: dict[int, list[str]] = defaultdict(list)
        while waiting or running:
            while waiting and len(running) < engine.config.max_rows:
                number = waiting.popleft()
                request, stops = self._request(*requests[number].args, sample=number * self.world_size + self.rank)
                running.append((number, engine.submit(request), AnswerText(self.tokenizer, stops)))
            engine.step()
            still = []
            for number, handle, text in running:
                for update in handle.take_updates():
                    pieces[number].append(text.push(update.tokens, last=update.done))
                if text.stopped:  # by a stop string, before a stop token
                    handle.cancel()
                if not handle.done:
                    still.append((number, handle, text))
                    continue
                if handle.status == "failed":
                    handle.result()  # raises
                cost.requests += 1
                cost.tokens += len(handle.tokens)
                cost.forwards += handle.forwards
                cost.cached_tokens += handle.cached_tokens
                cost.drafted.update(handle.drafted)
                cost.accepted.update(handle.accepted)
                yield number, "".join(pieces.pop(number))
            running = still

    def _request(self, context: str, kwargs: dict[str, Any], *, sample: int) -> tuple[Request, list[str]]:
        """A question as the engine takes it, and its stop strings."""
        settings: dict[str, Any] = dict(normalize_gen_kwargs(kwargs, DEFAULT_NEW_TOKENS))
        if unknown := sorted(set(settings) - UNDERSTOOD):
            raise ValueError(
                f"the task sets {', '.join(unknown)}, which parablock does not understand; remove it there"
            )
        ids = self.tok_encode(context)
        room = max(self.max_length - len(ids), self.max_length // 2)  # what is too long leaves half of the context
        new_tokens = min(self.config.max_new_tokens or settings["max_gen_toks"], room)
        ids = self._cut(ids, self.max_length - new_tokens)
        special = {str(t): i for i, t in self.tokenizer.added_tokens_decoder.items() if t.special}
        special = {text: special[text] for text in settings["until"] if text in special}
        config = replace(
            self.config,
            max_new_tokens=new_tokens,
            stop_token_ids=(*(self.config.stop_token_ids or ()), *special.values()),
            seed=self.config.seed or 0,
        )
        if settings["do_sample"]:
            config = replace(config, **{k: settings[k] for k in ("temperature", "top_p", "top_k") if k in settings})
        return Request(ids, config, stream=True, sample=sample), [s for s in settings["until"] if s not in special]

    def _cut(self, ids: list[int], room: int) -> list[int]:
        """The end of a context that is too long."""
        self.too_long += len(ids) > room
        return ids[-room:]

    # --- likelihoods -------------------------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        pairs = []
        for _, context, continuation in requests:
            if len(continuation) >= self.max_length:
                raise ValueError(
                    f"a continuation of {len(continuation)} tokens exceeds the model's context of {self.max_length}"
                )
            pairs.append((self._cut(context, self.max_length - len(continuation)), continuation))
        with tqdm(total=len(pairs), desc="likelihoods", disable=disable_tqdm or self.rank != 0) as bar:
            found = log_likelihood(self.model, pairs, self.config, progress=lambda done: bar.update(done - bar.n))
        for (texts, _, _), result in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, result)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """log p of whole texts, in windows of the context where they are longer."""
        windows = []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            pieces = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length - 1, 1)
            windows += [(number, *make_disjoint_window(piece)) for piece in pieces]
        found = self._loglikelihood_tokens([(("", ""), c, t) for _, c, t in windows], disable_tqdm=disable_tqdm)
        total = [0.0] * len(requests)
        for (number, _, _), (value, _) in zip(windows, found, strict=True):
            total[number] += value
        return total

    def total_costs(self) -> dict[str, Cost]:
        """The costs of all processes together (on the first one); they ran at the same time."""
        return summed(self.gather_object(dict(self.costs)) or [])

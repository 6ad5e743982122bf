"""What an answer may say: a grammar, and what llguidance compiles of it for a tokenizer.

Shapes: V tokens of the tokenizer and one more, W words of 32 bits that hold a bit for each.
"""

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from parablock.decoding.config import DecodeConfig
from parablock.decoding.schema import check_schema
from parablock.settings import require, require_choice, require_library

Kind = Literal["json_object", "json_schema", "regex", "choice", "lark"]
LARGEST = 64 * 1024  # bytes of a grammar's text
STACK = 128 * 2**20  # bytes, most of them never touched
TRIED = 4  # tokens
KEPT = 256  # compiled grammars of a tokenizer, the latest used ones
END = "\ufdd1"  # the name of the end, a token that no text holds: Unicode keeps it for a program's own use
# a schema cannot ask for less than it says; white space has an end, where models would go on with it
JSON: Any = {"lenient": False, "coerce_one_of": False, "whitespace_pattern": r"( |\n[ \t]{0,16})"}
_STARTING = threading.Lock()
T = TypeVar("T")


@dataclass(frozen=True)
class Grammar:
    """What an answer may say.

    `kind` tells how `source` is read: "json_schema" (its JSON text), "json_object" (any JSON object; no source),
    "regex" (all of the answer matches it), "choice" (a JSON list of texts), or "lark" (a grammar in llguidance's Lark).
    """

    kind: Kind
    source: str = ""

    def __post_init__(self) -> None:
        require_choice("kind", self.kind, Kind)
        size = len(self.source.encode("utf-8", "replace"))
        require(size <= LARGEST, "bytes of the grammar", size, f"use at most {LARGEST}")


class Vocabulary:
    """A tokenizer as llguidance knows it, with one token more: the end, allowed where a grammar accepts."""

    def __init__(self, tokenizer: Any) -> None:
        import llguidance
        import llguidance.numpy
        from tokenizers import Tokenizer

        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            kind = type(tokenizer).__name__
            raise ValueError(f"grammars need a fast tokenizer (tokenizer.json), and this is a {kind}")
        own = Tokenizer.from_str(backend.to_str())
        own.no_padding()
        own.no_truncation()
        self.known = frozenset(own.get_vocab().values())
        self.size = max(self.known) + 1
        own.add_special_tokens([END])
        end = own.token_to_id(END)
        assert end is not None
        self.end = end
        self.tokens = llguidance.LLTokenizer(own.to_str(), eos_token=self.end)
        self.words = -(-self.tokens.vocab_size // 32)
        self.known_W = self.packed(sorted(self.known))
        self.helpers = llguidance.numpy
        self.executor = llguidance.LLExecutor()

    def packed(self, ids: Sequence[int]) -> np.ndarray:
        """The bits of these tokens `[W]`."""
        bits = np.zeros(self.words * 32, dtype=bool)
        bits[[i for i in ids if i in self.known]] = True
        return np.packbits(bits, bitorder="little").view(np.int32)


@dataclass(frozen=True)
class CompiledGrammar:
    """A grammar for one tokenizer; `begin` an answer with it as often as you like."""

    grammar: Grammar
    vocabulary: Vocabulary
    matcher: Any  # at the beginning; never moved on

    def begin(self, config: DecodeConfig) -> "Guide":
        """For one answer, whose settings have nothing left open."""
        return Guide(self, config)


class Guide:
    """Where an answer stands in its grammar: a matcher behind its first `read` tokens.

    `usable_W`: the tokens that may be text; `stops_W`: those that end the answer where the grammar accepts.
    """

    def __init__(self, compiled: CompiledGrammar, config: DecodeConfig) -> None:
        self.vocabulary = compiled.vocabulary
        self.read = 0
        self.matcher = compiled.matcher.deep_copy()
        self._compiled = compiled
        self._stops = frozenset(config.stop_token_ids or ())
        self.stops_W = self.vocabulary.packed([*self._stops])
        self._never = self._stops if config.mask_token_id is None else self._stops | {config.mask_token_id}
        self.usable_W = self.vocabulary.known_W & ~self.vocabulary.packed([*self._never])

    def follow(self, text: np.ndarray) -> None:
        """The answer so far; the matcher reads what is new. A matcher that failed over drafts begins again."""
        new = text[self.read :].tolist()
        if new and self.matcher.try_consume_tokens(new) < len(new):
            self.matcher = self._compiled.matcher.deep_copy()
            self.matcher.try_consume_tokens(text.tolist())
        self.read = len(text)

    def allowed(self, tokens: Sequence[int]) -> int:
        """How many of these tokens may stand behind the answer so far; a stop token is the last one."""
        text: list[int] = []
        for token in tokens:
            if token in self._never or token not in self.vocabulary.known:
                break
            text.append(token)
        count: int = self.matcher.validate_tokens(text)
        if count == len(text) < len(tokens) and tokens[count] in self._stops:
            self.matcher.try_consume_tokens(text)
            count += self.matcher.is_accepting()
            self.matcher.rollback(len(text))
        return count


def grammar_from_options(json_schema: Path | None, regex: str | None) -> Grammar | None:
    """What a command's options ask for.

    Raises:
        ValueError: both, or a file that cannot be read or holds no schema.
    """
    if json_schema is None:
        return None if regex is None else Grammar("regex", regex)
    if regex is not None:
        raise ValueError("--json-schema and --regex both ask for a form of the answer; leave one out")
    try:
        source = json_schema.read_text(encoding="utf-8")
        check_schema(source)
        return Grammar("json_schema", source)
    except OSError as error:
        raise ValueError(f"--json-schema {json_schema} cannot be read ({error.strerror}); name a file") from None
    except ValueError as error:  # also what is no text
        raise ValueError(f"--json-schema {json_schema}: {error}") from None


def check_grammar(grammar: object, vocabulary: int) -> None:
    """ValueError unless it is None, or compiled for a tokenizer that a model of so many tokens can have."""
    if grammar is None:
        return
    if not isinstance(grammar, CompiledGrammar):
        raise ValueError(
            f"grammar is {type(grammar).__name__}; compile it: pb.Grammars(tokenizer).compile(pb.Grammar(...))"
        )
    if (size := grammar.vocabulary.size) > vocabulary:
        raise ValueError(
            f"the grammar was compiled for a tokenizer of {size} tokens, and the model has {vocabulary}; use the "
            "model's own"
        )


class Grammars:
    """Compiles grammars for one tokenizer and keeps the latest ones; safe from any thread.

    Args:
        tokenizer: a fast tokenizer of transformers.

    Raises:
        ValueError: llguidance is not installed, or the tokenizer is not a fast one.
    """

    def __init__(self, tokenizer: Any) -> None:
        require_library("llguidance", "serve")
        self.vocabulary = Vocabulary(tokenizer)
        self._kept: OrderedDict[Grammar, CompiledGrammar] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        """For `generate`, `stream` and `Request`.

        Raises:
            ValueError: a grammar that cannot be read, that nothing finite fits, or that is too complex.
        """
        with self._lock:
            if grammar in self._kept:
                self._kept.move_to_end(grammar)
                return self._kept[grammar]
        compiled = CompiledGrammar(grammar, self.vocabulary, _on_own_stack(lambda: self._matcher(grammar)))
        with self._lock:
            self._kept[grammar] = compiled
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return compiled

    def _matcher(self, grammar: Grammar) -> Any:
        """At the grammar's beginning; what is too complex is often told by its first masks only."""
        from llguidance import LLMatcher, LLParserLimits

        text = _text(grammar)
        limits = LLParserLimits(verbose_errors=False, max_lexer_states=50_000)
        matcher = LLMatcher(self.vocabulary.tokens, text, limits=limits, log_level=0)
        tried = matcher.deep_copy()
        for _ in range(TRIED):
            if not tried.is_error():
                mask = np.frombuffer(tried.compute_bitmask(), dtype=np.uint8)
            if tried.is_error():
                raise ValueError(_reason(grammar, tried))
            if tried.is_stopped():
                break
            tried.consume_token(int(np.unpackbits(mask, bitorder="little").argmax()))
        return matcher


def _text(grammar: Grammar) -> str:
    """As llguidance reads it."""
    import llguidance
    from llguidance import LLMatcher

    if grammar.kind == "regex":
        return LLMatcher.grammar_from_regex(grammar.source)
    if grammar.kind == "lark":
        return llguidance.grammar_from("grammar", grammar.source)
    if grammar.kind == "choice":
        return llguidance.grammar_from("choice", json.dumps(_texts(grammar.source)))
    source = '{"type": "object"}' if grammar.kind == "json_object" else grammar.source
    check_schema(source)
    return LLMatcher.grammar_from_json_schema(source, overrides=JSON)


def _texts(source: str) -> list[str]:
    try:
        texts = json.loads(source)
    except (ValueError, RecursionError):
        texts = None
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError("choice is no list of texts; write at least one")
    return texts


def _reason(grammar: Grammar, matcher: Any) -> str:
    """llguidance's own words, up to the state it prints."""
    told = re.sub(r"\s+", " ", matcher.get_error().partition("<state>")[0]).strip()[:500]
    if told in ("", "NoExtension", "NoExtensionBias"):
        told = "no text fits it"
    remedy = "write a smaller one" if re.search("[Tt]oo |fuel|max", told) else "change it"
    return f"the {grammar.kind} grammar cannot be used: {told}; {remedy}"


def _on_own_stack(function: Callable[[], T]) -> T:
    """llguidance follows nested rules by recursion, as deep as the largest text may ask for."""
    with _STARTING:
        usual = threading.stack_size(STACK)
        try:
            with ThreadPoolExecutor(1) as thread:
                return thread.submit(function).result()
        finally:
            threading.stack_size(usual)

"""Answers held to a grammar: in it when whole, prefixes of it when cut; in every mode, whatever runs beside."""

import json
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from cases import empty
from conftest import attach_gate, small_model
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from schedules import run_arriving
from schemas import schema
from server_process import ASK

import parablock as pb
from parablock.data.chat import encode_prompt

BASE = pb.DecodeConfig(max_new_tokens=48, temperature=1.0, seed=3)
MODES: dict[str, tuple[str, dict[str, Any]]] = {  # which model, which settings
    "threshold": ("diffusion", {"sub_block_size": 4, "threshold": 0.3}),
    "factor": ("diffusion", {"sub_block_size": 8, "strategy": "factor", "sub_block_cache": False}),
    "fixed": ("diffusion", {"sub_block_size": 8, "strategy": "fixed", "tokens_per_step": 3}),
    "verified": ("diffusion", {"sub_block_size": 4, "strategy": "verified"}),
    "autoregressive": ("ar", {"mode": "autoregressive"}),
    "speculative": ("ar", {"mode": "speculative", "draft_tokens": 4}),
    "lookup": ("ar", {"mode": "speculative", "drafter": "lookup", "draft_tokens": 3}),
}
ASKED = [
    pb.Grammar("json_object"), pb.Grammar("regex", "[a-c]{2,9}(x|yz)*"), pb.Grammar("choice", '["yes", "no", "no!"]'),
    pb.Grammar("lark", 'start: "go" (" " /[0-9]+/)* "."'), pb.Grammar("json_schema", json.dumps(schema(7))),
    pb.Grammar("json_schema", json.dumps(schema(60))),
]  # fmt: skip


@cache
def bundled(name: str = "bundled") -> tuple[Any, Any]:
    return pb.load(name)


@cache
def grammars() -> pb.Grammars:
    return pb.Grammars(bundled()[1])


@cache
def model(kind: str) -> Any:
    """A tiny random one with the bundled models' tokenizer."""
    made = small_model(vocab_size=640, eos_token_id=2, max_position_embeddings=512)
    made.config.mask_token_id = 3
    if kind == "ar":
        made.config.bd_size = None
        return attach_gate(made)
    return made


def compiled(grammar: pb.Grammar) -> pb.CompiledGrammar:
    return grammars().compile(grammar)


def by_schema(number: int) -> pb.CompiledGrammar:
    return compiled(pb.Grammar("json_schema", json.dumps(schema(number))))


def is_prefix(grammar: pb.CompiledGrammar, tokens: list[int]) -> bool:
    return grammar.matcher.deep_copy().try_consume_tokens(tokens) == len(tokens)


def check(grammar: pb.CompiledGrammar, tokens: list[int], stops: tuple[int, ...] = (2,)) -> bool:
    """Whether the answer is whole: then it is in the language, else it is the beginning of such a text."""
    whole = bool(tokens) and tokens[-1] in stops
    text = tokens[:-1] if whole else tokens
    assert is_prefix(grammar, text)
    if whole:
        matcher = grammar.matcher.deep_copy()
        matcher.try_consume_tokens(text)
        assert matcher.is_accepting()
        if grammar.grammar.kind == "json_schema":
            value = json.loads(bundled()[1].decode(text))
            form = json.loads(grammar.grammar.source)
            Draft202012Validator(form, format_checker=Draft202012Validator.FORMAT_CHECKER).validate(value)
    return whole


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("trained", [False, True], ids=["random", "bundled"])
def test_whole_answers_fit_their_schemas(mode: str, trained: bool) -> None:
    kind, changes = MODES[mode]
    one = bundled("bundled" if kind == "diffusion" else "bundled-causal")[0] if trained else model(kind)
    first, count = [*MODES].index(mode) * 28 + 18 * trained, 10 if trained else 18
    held = [by_schema(number) for number in range(first, first + count)]
    prompts = [list(range(10 + row, 30)) for row in range(len(held))]
    out = pb.generate(one, prompts, replace(BASE, **changes, max_new_tokens=64), grammar=held)
    whole = [check(grammar, tokens) for grammar, tokens in zip(held, out.tokens, strict=True)]
    assert sum(whole) >= 3


requests = st.lists(
    st.tuples(
        st.sampled_from([*MODES]), st.integers(-1, len(ASKED) - 1), st.integers(1, 20), st.sampled_from([0.0, 1.0]),
        st.sampled_from([(2,), (2, 70), ()]), st.integers(0, 4), st.sampled_from([None, None, None, 2, 9]),
    ),
    min_size=2, max_size=7,
)  # fmt: skip


@pytest.mark.parametrize("kind", ["diffusion", "ar"])
@given(drawn=requests, memory=st.sampled_from([88, 128, 400]))
@settings(max_examples=8)
def test_a_schedule_changes_no_answer(kind: str, drawn: list[Any], memory: int) -> None:
    """Rows that come and go, are cancelled or give up their memory are as if alone."""
    arrivals = []
    for number, (mode, asked, length, temperature, stops, pause, patience) in enumerate(drawn):
        own, changes = MODES[mode]
        config = replace(BASE, **(changes if own == kind else {"mode": "autoregressive"}), temperature=temperature)
        config = replace(config, stop_token_ids=stops, seed=number, max_new_tokens=40)
        grammar = None if asked < 0 else compiled(ASKED[asked])
        arrivals.append((pb.Request([*range(20, 20 + length)], config, grammar=grammar), pause, patience))
    with pb.Engine(model(kind), pb.EngineConfig(max_rows=3, max_context=64, kv_tokens=memory)) as engine:
        handles = run_arriving(engine, arrivals)
        assert empty(engine)
    for handle in handles:
        request = handle.request
        alone = pb.generate(model(kind), request.prompt, request.config, grammar=request.grammar).tokens[0]
        assert handle.tokens == alone[: len(handle.tokens)]
        assert handle.status == "cancelled" or handle.tokens == alone
        if request.grammar is not None:
            check(request.grammar, handle.tokens, request.config.stop_token_ids or ())


def test_speculative_answers_are_the_autoregressive_ones() -> None:
    held = [compiled(grammar) for grammar in ASKED]
    drafts: list[dict[str, Any]] = [
        {}, {"draft_tokens": 1}, {"draft_tokens": 5}, {"drafter": "lookup", "draft_tokens": 7}
    ]  # fmt: skip
    prompts = [[*range(20, 30 + row)] for row in range(len(held))]
    for one, temperature in ((model("ar"), 0.0), (model("ar"), 1.0), (bundled("bundled-causal")[0], 0.0)):
        config = replace(BASE, temperature=temperature, mode="autoregressive")
        expected = pb.generate(one, prompts, config, grammar=held)
        for changes in drafts:
            out = pb.generate(one, prompts, replace(config, mode="speculative", **changes), grammar=held)
            assert out.tokens == expected.tokens
            assert not changes or sum(out.accepted) > 0


@pytest.mark.parametrize("mode", MODES)
def test_where_nothing_may_follow_the_answer_ends(mode: str) -> None:
    kind, changes = MODES[mode]
    config = replace(BASE, **changes)
    held = compiled(pb.Grammar("regex", "abc?"))
    a, b, c = (bundled()[1].convert_tokens_to_ids(letter) for letter in "abc")
    with pb.Engine(model(kind), pb.EngineConfig(max_rows=4)) as engine:

        def ask(*stops: int) -> tuple[list[int], str | None]:
            handle = engine.submit(pb.Request([5] * 9, replace(config, stop_token_ids=stops), grammar=held))
            return handle.result(), handle.finish_reason

        tokens, reason = ask(2)
        assert (tokens[:2], tokens[-1], reason) == ([a, b], 2, "stop")  # a stop token is forced
        assert ask() == ([a, b, c], "stop")  # there is none
        assert ask(b) == ([a], "length")  # it may not stand there, and nothing else may
        assert ask(a) == ([], "length")
        assert empty(engine)
    empty_text = compiled(pb.Grammar("regex", ""))
    assert pb.generate(model(kind), [5] * 9, replace(config, stop_token_ids=()), grammar=empty_text).tokens == [[]]


def test_the_mask_token_is_never_allowed() -> None:
    held = compiled(pb.Grammar("lark", "start: <|mask|> | /[a-z]/"))
    for mode, (kind, changes) in MODES.items():
        config = replace(BASE, **changes, mask_token_id=3)
        for seed in range(5):
            tokens = pb.generate(model(kind), [5, 6], replace(config, seed=seed), grammar=held).tokens[0]
            assert 3 not in tokens, mode


def test_several_tokens_are_revealed_in_one_forward() -> None:
    loaded, tokenizer = bundled()
    held = compiled(pb.Grammar("lark", r'start: /[^\n]+/ ("\n" /[^\n]+/)*'))  # as it writes anyway
    ids = encode_prompt(tokenizer, ASK["messages"])
    out = pb.generate(loaded, ids, grammar=held)
    assert out.tokens_per_forward > 1.2
    steps = [*pb.stream(loaded, ids, grammar=held)]
    assert steps[-1].tokens() == out.tokens[0]


def test_what_cannot_be_compiled_names_the_reason() -> None:
    for kind, source, reason in (
        ("json_schema", '{"not": {}}', "not"), ("json_schema", '{"type": "array", "uniqueItems": true}', "uniqueItems"),
        ("json_schema", '{"x-guidance": {"lenient": true}, "contains": {}}', "contains"),
        ("json_schema", "[", "no JSON"),
        ("json_schema", '{"type": "text"}', "text"), ("json_schema", '{"$ref": "#"}', r"\$ref.*without end"),
        ("json_schema", '{"$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}]}}, "$ref": "#/$defs/a"}', "without end"),
        ("json_schema", '{"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}', "without end"),
        ("json_schema", '{"type": "array", "items": {"$ref": "#"}, "minItems": 1}', "without end"),
        ("json_schema", '{"minProperties": 2}', "minProperties"), ("json_schema", "[" * 9000, "nested"),
        ("json_schema", '{"type": "integer", "minimum": 3, "maximum": 2}', "minimum"),
        ("regex", "(a", "unclosed"), ("regex", "((a{1000}){1000}){1000}", "smaller"), ("regex", "(?=a)b", "look"),
        ("choice", "[]", "at least one"), ("choice", "[1]", "texts"), ("lark", "start: other", "other"),
        ("lark", 'start: "a" start', "too many|Too many"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=reason):
            compiled(pb.Grammar(kind, source))
    with pytest.raises(ValueError, match="bytes of the grammar=70000"):
        pb.Grammar("regex", "a" * 70_000)
    with pytest.raises(ValueError, match="kind='xml'"):
        pb.Grammar("xml", "a")  # type: ignore[arg-type]


def test_rules_nest_as_deep_as_the_largest_text_allows() -> None:
    chain = "start: a0\n" + "\n".join(f"a{i}: a{i + 1}" for i in range(4500)) + '\na4500: "null"'
    parts = {str(i): {"allOf": [{"$ref": f"#/$defs/{i + 1}"}]} for i in range(1400)}
    form = {"$ref": "#/$defs/0", "$defs": parts | {"1400": {"type": "null"}}}
    for grammar in (pb.Grammar("lark", chain), pb.Grammar("json_schema", json.dumps(form))):
        tokens = pb.generate(model("ar"), [5], replace(BASE, stop_token_ids=()), grammar=compiled(grammar)).tokens[0]
        assert bundled()[1].decode(tokens) == "null"


def test_what_ends_is_told_from_what_does_not() -> None:
    ends = [
        {"properties": {"a": {"$ref": "#"}}, "required": ["a"]}, {"type": "array", "items": {"$ref": "#"}},
        {"type": ["object", "null"], "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
        {"anyOf": [{"type": "null"}, {"type": "array", "prefixItems": [{"$ref": "#"}], "minItems": 1}]},
        {"type": "object", "properties": {"~/": {}, "d": {"$ref": "#/properties/~0~1"}}, "required": ["d"]},
    ]  # fmt: skip
    for form in ends:
        compiled(pb.Grammar("json_schema", json.dumps(form)))


def test_grammars_are_kept_within_a_bound() -> None:
    own = pb.Grammars(bundled()[1])
    kept = own.compile(ASKED[0])
    assert own.compile(pb.Grammar("json_object")) is kept
    for number in range(256):
        own.compile(pb.Grammar("choice", json.dumps([str(number)])))
    assert own.compile(ASKED[0]) is not kept


def test_what_is_no_compiled_grammar_is_refused() -> None:
    with pytest.raises(ValueError, match=r"compile it: pb.Grammars"):
        pb.generate(model("ar"), [5], BASE, grammar=ASKED[0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="2 grammars for 1 prompts"):
        pb.generate(model("ar"), [5], BASE, grammar=[None, None])
    with pytest.raises(ValueError, match="tokenizer of 604 tokens, and the model has 64"):
        pb.generate(small_model(), [5], BASE, grammar=compiled(ASKED[0]))

"""The `parablock` command: parse, call, print. Heavy imports happen inside the commands."""

import os
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

from parablock import __version__
from parablock.batch.config import BatchConfig
from parablock.bench.config import BenchConfig
from parablock.checkpoints.look import announce, look
from parablock.checkpoints.named import BUNDLED_MODELS, default_model
from parablock.cluster.config import ClusterConfig
from parablock.cluster.service import Service
from parablock.decoding.config import DecodeConfig
from parablock.evals.config import EvalConfig
from parablock.options import NOTHING, Given, options
from parablock.server.config import ServeConfig
from parablock.settings import require_library
from parablock.training.config import AdaptConfig

app = typer.Typer(
    help="Turn autoregressive language models into block-diffusion models and decode them many tokens at a time.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

OTEL = ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http", "opentelemetry.instrumentation.fastapi")
NAMES = "'smollm2', 'smollm2-ar', 'bundled', 'bundled-ar' or 'bundled-causal'."
WHICH = f"A checkpoint: directory, GGUF file, hub id, {NAMES}"
DEFAULT = f"{WHICH} Default: 'smollm2' where it is found, else 'bundled'."
ModelOption = Annotated[str | None, typer.Option("--model", "-m", help=DEFAULT)]
ArOption = Annotated[str | None, typer.Option(help="A model for AR. Default: the same; for 'bundled' its AR model.")]
ModelArgument = Annotated[str | None, typer.Argument(help=DEFAULT)]
DTYPES = "'float32', 'bfloat16', 'int8' (8-bit weights, on a CPU). Default: the fastest that is true to the checkpoint."
DtypeOption = Annotated[str | None, typer.Option(help=DTYPES)]
decode_options = options(DecodeConfig, "Decoding")


def _announced(model: str | None, config: DecodeConfig) -> str:
    """The model that a command uses, looked at before anything heavy is imported."""
    name = model or default_model()
    announce(look(name), config)
    return name


@app.command()
@decode_options
def generate(
    prompt: Annotated[str | None, typer.Argument(help="The prompt; '-' or nothing reads stdin.")] = None,
    model: ModelOption = None,
    raw: Annotated[bool, typer.Option("--raw", help="Use the prompt as it is, without the chat template.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object: text, tokens and figures.")] = False,
    json_schema: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Answer with JSON that fits the schema in this file.")
    ] = None,
    regex: Annotated[
        str | None, typer.Option(help="Answer with a text that this regular expression matches as a whole.")
    ] = None,
    dtype: DtypeOption = None,
    given: Given = NOTHING,
) -> None:
    """Answer one prompt, to stdout."""
    config = DecodeConfig(**given)  # wrong settings are told before anything is loaded
    if json_schema is not None or regex is not None:
        require_library("llguidance", "serve")
    from parablock.decoding.grammar import grammar_from_options

    grammar = grammar_from_options(json_schema, regex)
    if prompt is None and sys.stdin.isatty():
        raise ValueError("there is no prompt; pass it as an argument or on stdin")
    text = sys.stdin.read() if prompt in (None, "-") else prompt
    assert text is not None
    if not text.strip():
        raise ValueError("the prompt is empty; pass it as an argument or on stdin")
    model = _announced(model, config)
    from parablock.app.terminal import answer_once

    answer_once(model, text, config, grammar, raw=raw, as_json=as_json, dtype=dtype)


@app.command()
@decode_options
def chat(
    model: ModelOption = None,
    history: Annotated[
        bool | None,
        typer.Option(help="Send earlier turns along. Default: yes, but not to 'bundled...' (single questions)."),
    ] = None,
    dtype: DtypeOption = None,
    given: Given = NOTHING,
) -> None:
    """Talk to a model in the terminal."""
    config = DecodeConfig(**given)
    model = _announced(model, config)
    from parablock.app.terminal import chat as converse

    converse(model, config, history=model not in BUNDLED_MODELS if history is None else history, dtype=dtype)


@app.command("app")
def web_app(
    model: Annotated[
        str | None, typer.Argument(help=f"{WHICH} Default: the server's first; of its own: 'smollm2', else 'bundled'.")
    ] = None,
    port: Annotated[int, typer.Option(help="Where the page listens.")] = 10086,
    host: Annotated[str, typer.Option(help="The address; 0.0.0.0 shows the page to your network.")] = "127.0.0.1",
    url: Annotated[
        str | None, typer.Option(help="A running parablock server (its key in PARABLOCK_API_KEY). Default: its own.")
    ] = None,
    ar: ArOption = None,
    dtype: DtypeOption = None,
) -> None:
    """A web page: watch answers being decoded, replay them, race AR against block diffusion or speculation."""
    for library in ("gradio", "uvicorn", "httpx"):
        require_library(library, "app")
    if url is None:
        model = _announced(model, DecodeConfig())
        look(ar or model)
    from parablock.app.launch import run_app

    run_app(model, ar, url, host, port, dtype)


@app.command()
def demo(
    seed: Annotated[int, typer.Option(help="Which test problems: every seed gives a fresh set.")] = 1,
    problems: Annotated[int | None, typer.Option(help="How many test problems. Default: 50; 15 with --quick.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Two minutes: fewer questions, less training.")] = False,
    live: Annotated[bool, typer.Option("--live/--no-live", help="Train an adapter before your eyes.")] = True,
    folder: Annotated[Path, typer.Option(help="Where the plots and the report go.")] = Path("parablock-demo"),
    report: Annotated[Path | None, typer.Option(help="The JSON report. Default: report.json in the folder.")] = None,
) -> None:
    """Watch a real model answer several tokens at a time, word for word, and what block diffusion adds."""
    from rich.console import Console

    from parablock.demo.command import run_demo
    from parablock.demo.sizes import sized

    run_demo(sized(seed, problems, quick, live, folder, report), Console(highlight=False))


@app.command()
@options(AdaptConfig, "Recipe", sparse=True, without=["model"])
def adapt(
    output: Annotated[Path, typer.Option("--output", "-o", help="The run's folder; its model/ is the checkpoint.")],
    model: Annotated[str | None, typer.Argument(help="The AR checkpoint: a directory or a hub id.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="A YAML file of settings; options override it.")] = None,
    resume: Annotated[bool, typer.Option(help="Continue the run in the folder, if there is one.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Only print counts, fill rate, a row with masks, the cost.")] = False,
    given: Given = NOTHING,
) -> None:
    """Adapt a model to block diffusion on your data; under torchrun on many processes."""
    from parablock.training.recipe import make_config, read_recipe

    settings = read_recipe(recipe) if recipe else {}
    config = make_config(settings | ({"model": model} if model else {}) | given)
    look(config.model)
    from rich.console import Console

    from parablock.adapt import adapt as run
    from parablock.training.guards import TrainingStoppedError

    try:
        run(config, output, Console(highlight=False), resume=resume, dry_run=dry_run)
    except TrainingStoppedError as stopped:
        print(f"parablock: {stopped}; --resume continues", file=sys.stderr)
        raise typer.Exit(143) from None


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="A checkpoint or adapter: directory, hub id, 'bundled'.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The new directory.")],
    layout: Annotated[
        str,
        typer.Option(help="'stock' (the architecture's own), 'official' (Fast-dLLM v2) or 'standalone' (with code)."),
    ] = "stock",
) -> None:
    """Write a checkpoint for others: stock, in the official Fast-dLLM v2 layout, or with its decoder in it."""
    checkpoint = look(model)
    from parablock.checkpoints.export import export_checkpoint

    export_checkpoint(checkpoint, output, layout)
    size = sum(file.stat().st_size for file in output.rglob("*"))
    print(f"{output}: layout {layout}, {size / 1e6:.1f} MB; its README.md says how to use it")


@app.command()
@options(BenchConfig, "Cases")
def bench(
    model: ModelArgument = None,
    random_weights: Annotated[
        str | None, typer.Option(help="Measure a shape instead: '135m', '0.5b', '1.5b', '7b', or a config.json.")
    ] = None,
    ar: ArOption = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Prompts, one per line. Default: the bundled task's, or random tokens.")
    ] = None,
    block_size: Annotated[int, typer.Option(help="With random weights.")] = 32,
    dtype: DtypeOption = None,
    folder: Annotated[Path, typer.Option(help="Where table, plots and JSON go.")] = Path("parablock-bench"),
    given: Given = NOTHING,
) -> None:
    """Measure speed: AR against block diffusion, or against speculative decoding, in the same engine."""
    config = BenchConfig(**given)
    if random_weights is None:
        model = _announced(model, DecodeConfig())
        look(ar or model)
    from rich.console import Console

    from parablock.bench.command import run_bench

    run_bench(
        config, Console(highlight=False), folder, model=model, ar=ar, random_weights=random_weights, prompts=prompts,
        block_size=block_size, dtype=dtype,
    )  # fmt: skip


@app.command("eval")
@options(DecodeConfig, "Decoding", into="decoding", sparse=True)
@options(EvalConfig, "Questions")
def evaluate(
    model: Annotated[str, typer.Argument(help=WHICH)] = "bundled",
    dtype: DtypeOption = None,
    compiled: Annotated[bool, typer.Option("--compile", help="torch.compile: slower start, faster steps.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where the files go. Default: a new folder in parablock-eval.")
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(help="Compare two output folders instead.", metavar="A B")
    ] = None,
    given: Given = NOTHING,
    decoding: Given = NOTHING,
) -> None:
    """Measure accuracy (and tokens per forward) on standard tasks, or compare two such runs."""
    from rich.console import Console

    console = Console(highlight=False)
    require_library("lm_eval", "eval")
    if compare is not None:
        from parablock.evals.compare import run_compare

        run_compare(*compare, console)
        return
    config = EvalConfig(**given)
    announce(look(model), DecodeConfig(**decoding))
    from parablock.evals.command import run_eval

    run_eval(model, config, decoding, console, output, dtype=dtype, compile=compiled)


@app.command()
@options(DecodeConfig, "Decoding", into="decoding")
@options(BatchConfig, "Batch")
def batch(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="INPUT",
            help="A JSONL or Parquet file, or a folder of them: requests in OpenAI's batch format, or prompts.",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file of answers: JSONL, or a name.parquet.")],
    model: ModelOption = None,
    dtype: DtypeOption = None,
    given: Given = NOTHING,
    decoding: Given = NOTHING,
) -> None:
    """Answer all lines of a file; started again after a kill, it goes on where it was."""
    config, decode_config = BatchConfig(**given), DecodeConfig(**decoding)
    model = _announced(model, decode_config)
    from parablock.batch.command import run_batch

    raise typer.Exit(run_batch(model, source, output, decode_config, config, dtype))


@app.command()
@options(ServeConfig, "Server")
@options(ClusterConfig, "Replicas, on Ray", into="cluster", sparse=True)
def serve(
    model: ModelArgument = None,
    also: Annotated[list[str] | None, typer.Option(help="One more model in the same server (repeatable).")] = None,
    dtype: DtypeOption = None,
    write_config: Annotated[
        Path | None,
        typer.Option(help="Serve nothing; write files for `serve deploy` and KubeRay to this folder.", metavar="DIR"),
    ] = None,
    given: Given = NOTHING,
    cluster: Given = NOTHING,
) -> None:
    """Serve models over OpenAI's HTTP interface; one key is in PARABLOCK_API_KEY, several are in --api-keys."""
    config, replicas = ServeConfig(**given), ClusterConfig(**cluster)
    for library in ("uvicorn", "fastapi", "prometheus_client", "llguidance"):
        require_library(library, "serve")
    for library in OTEL if config.otlp_endpoint else ():
        require_library(library, "otel")
    names = [name or default_model() for name in (model, *(also or []))]
    key = os.environ.get("PARABLOCK_API_KEY") or None
    service = Service(tuple(names), config, replicas, dtype) if cluster or write_config else None
    if write_config is not None and service:
        require_library("yaml", "ray")
        from parablock.cluster.files import write_files

        write_files(service, write_config)
        return
    if service:
        require_library("ray", "ray")
    for name in names:
        _announced(name, DecodeConfig())
    if service:
        from parablock.cluster.command import run_cluster

        run_cluster(service, key)
    else:
        from parablock.server.command import run_server

        run_server(names, config, key, dtype)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        print(f"parablock {__version__}")
        raise typer.Exit


def main() -> None:
    """Run the command; a wrong value or a missing file is one line on stderr and exit status 2 (Ctrl-C: 130)."""
    # waiting threads must not spin: on a shared machine they slow small models down many times
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # the lines of the requests' log are alike
    warnings.showwarning = lambda message, *_: print(f"parablock: warning: {message}", file=sys.stderr)
    try:
        app(standalone_mode=True)
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(1) from None
        print(f"parablock: {error}", file=sys.stderr)
        raise SystemExit(2) from None

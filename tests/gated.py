"""`parablock` where the bundled AR model has a causal adapter that nobody trained."""

from typing import Any

from conftest import attach_gate
from processes import command


def gated(arguments: list[str]) -> None:
    """The command."""
    from parablock.app import terminal
    from parablock.checkpoints import load as loading
    from parablock.server import served

    plain = loading.load

    def load(name: Any, **options: Any) -> tuple[Any, Any]:
        model, tokenizer = plain(name, **options)
        return (attach_gate(model) if name == "bundled-ar" else model), tokenizer

    for module in (loading, terminal, served):
        module.load = load  # type: ignore[attr-defined]
    command(arguments)

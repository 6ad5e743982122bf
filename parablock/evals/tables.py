"""Tables in a terminal."""

from rich.console import Console
from rich.table import Table

WIDEST = 400


def print_table(console: Console, table: Table) -> None:
    """Print `table` as wide as it needs to be: a narrow terminal wraps its lines, which is better than cut words."""
    needed = Console(width=WIDEST).measure(table).maximum
    (console if console.width >= needed else Console(width=needed, highlight=False)).print(table)

"""Write into every recipe what it will cost, computed from the model's shape.

    python scripts/recipe_costs.py

Half of the tokens are taken to be responses; packed rows to be 95 % full, the bundled task's unpacked ones 40 %.
`parablock adapt --dry-run` computes the same from the data itself.
"""

from pathlib import Path

from parablock.adapt import cost_line
from parablock.training.cost import Shape, estimate
from parablock.training.recipe import make_config, read_recipe

ROOT = Path(__file__).parents[1]
SHAPES = {  # from the checkpoints' config.json
    "smollm2-ar": Shape(0.1345e9, 30, 576, 49152),
    "Qwen/Qwen2.5-0.5B-Instruct": Shape(0.494e9, 24, 896, 151936),
    "Qwen/Qwen2.5-1.5B-Instruct": Shape(1.544e9, 28, 1536, 151936),
    "Qwen/Qwen2.5-7B-Instruct": Shape(7.616e9, 28, 3584, 152064),
    "runs/bundled": Shape(1.25e6, 6, 128, 640),
    "bundled-ar": Shape(1.25e6, 6, 128, 640),
}
LORA = {  # of the recipes' ranks, on the layers that they name
    "smollm2-ar": 6.27e6, "Qwen/Qwen2.5-0.5B-Instruct": 11.6e6, "Qwen/Qwen2.5-7B-Instruct": 40.4e6,
    "bundled-ar": 0.47e6,
}  # fmt: skip


def with_cost(path: Path) -> str:
    """The recipe's text with its cost line filled in."""
    config = make_config(read_recipe(path))
    shape = next(shape for name, shape in SHAPES.items() if config.model.startswith(name))
    if config.lora_rank:
        shape = Shape(shape.parameters, shape.layers, shape.hidden, shape.vocabulary, LORA[config.model])
    line = cost_line(estimate(shape, config, learned_share=0.5, fill=0.95 if config.packing else 0.4))
    lines = path.read_text().splitlines()
    return "\n".join(f"# {line}" if text.startswith("# cost:") else text for text in lines) + "\n"


if __name__ == "__main__":
    for recipe in sorted((ROOT / "recipes").rglob("*.yaml")):
        recipe.write_text(with_cost(recipe))
        print(recipe.relative_to(ROOT), next(t for t in recipe.read_text().splitlines() if t.startswith("# cost")))

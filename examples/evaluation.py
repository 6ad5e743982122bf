"""Accuracy and tokens per forward of a checkpoint in lm-evaluation-harness.

python examples/evaluation.py
"""

import lm_eval

from parablock.evals.harness import ParablockLM
from parablock.evals.tasks import word_problems

adapter = ParablockLM("bundled", threshold=0.9)
found = lm_eval.simple_evaluate(model=adapter, tasks=[word_problems()], limit=100, apply_chat_template=True)
print(f"accuracy {found['results']['word_problems']['exact_match,none']:.2f}")
cost = adapter.costs["word_problems"]
print(f"tokens per forward {cost.tokens / cost.forwards:.2f}, {cost.tokens / cost.seconds:.0f} tokens/s")

"""The tables of Fast-dLLM v2 (arXiv 2509.26328) in miniature: measures what `page.py results` shows.

    python benchmarks/paper.py                       # all parts, some hours
    python benchmarks/paper.py cache strategies      # some of them

- training: the recipe with and without its parts (table 2), and the models that the other parts decode with;
- sub-blocks, block-sizes: sizes at inference (tables 3 and 4);
- thresholds: accuracy and speed against the threshold (figure 4);
- cache: the sub-block cache on and off (figure 6);
- strategies: threshold, factor and fixed number, at equal accuracy;
- staleness: the K/V that the sub-block cache keeps, against fresh ones.

Each part writes `benchmarks/results/paper-<part>.json`, whole or not at all.
"""

from common import measure_parts
from paper_decoding import block_sizes, cache, strategies, sub_blocks, thresholds
from paper_staleness import staleness
from paper_training import training

if __name__ == "__main__":
    parts = (training, sub_blocks, block_sizes, thresholds, cache, strategies, staleness)
    measure_parts(__doc__, *parts, problems=300, repeats=3)

"""Benchmarks: the optimizer step beside every peer that is installed, on real shapes, in interleaved rounds; and what
the steps deliver.

`collage.bench.step` and `collage.bench.precision` run them, `collage.bench.results` says of a JSON file where it is
from, `collage.bench.page` turns such files into pages of tables and plots.
"""

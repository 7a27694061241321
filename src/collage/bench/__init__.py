"""Benchmarks: the optimizer step beside every peer that is installed, on real shapes, in interleaved rounds.

`collage.bench.step` runs one, `collage.bench.results` turns it into rows of a JSON file, `collage.bench.page` turns
such files into a page of tables and plots.
"""

"""Benchmarks: each measures ratios against a named baseline in the same run."""

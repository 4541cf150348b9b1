"""Benchmarks: this project against a straightforward implementation of the published algorithm."""

"""Benchmarks whose answers are generated and scored against references."""

"""Several models, or several benchmarks, beside each other."""

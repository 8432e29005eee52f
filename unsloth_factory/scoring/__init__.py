"""Pure functions from answers (and references) to numbers; used by validation, benchmarks and training rewards."""

"""The ways of `uf evaluate`."""

"""Parts of `uf plan`."""

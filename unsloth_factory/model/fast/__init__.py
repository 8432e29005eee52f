"""The fast engine: one decoder for Llama-shaped models, its forward and backward pass written out by hand."""

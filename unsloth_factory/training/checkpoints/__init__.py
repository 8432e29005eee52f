"""Checkpoints: written whole or not at all, read back bit for bit, and what may change between two starts."""

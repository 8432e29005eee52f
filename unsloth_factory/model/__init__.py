"""Weights become a model on a device: paths, checks, engines, NF4, LoRA, and how adapters are stored."""

"""unsloth-factory: the whole fine-tuning life of a 7B/8B language model on one small GPU."""

__version__ = "0.1.0"

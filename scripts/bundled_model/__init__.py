"""The parts of `scripts/make_bundled_model.py`: corpus, tokenizer, pre-training and checks of the bundled model."""

"""Multiple choice: benchmark files, questions, prompts; by log-probabilities or by the letter of a free answer."""

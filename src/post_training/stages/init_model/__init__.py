"""A new model with random weights and a tokenizer of its own, for demonstrations and tests."""

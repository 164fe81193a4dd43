"""`entrypoint logprobs`: how likely a model finds the answers that a dataset holds."""

"""`entrypoint reward-model`: a model that tells the better of two answers."""

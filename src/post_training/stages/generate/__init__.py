"""`entrypoint generate`: samples of a model for each prompt, the same wherever they are drawn."""

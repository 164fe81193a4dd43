"""Configuration: strict models, YAML with overrides and `extends`, and the recipe's identity."""

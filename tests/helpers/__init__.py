"""What several tests share, imported as `helpers.x` (pythonpath in pyproject.toml)."""

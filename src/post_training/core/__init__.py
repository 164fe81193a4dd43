"""Errors, hashing, atomic files and YAML with line numbers. Standard library and PyYAML only."""

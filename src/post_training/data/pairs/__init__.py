"""Preference rows as pairs of token sequences: encoded, planned into rows, kept on disk."""

"""Preference rows as pairs of token sequences: encoded, packed into rows, kept on disk."""

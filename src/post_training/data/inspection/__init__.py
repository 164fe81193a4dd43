"""Prepared rows for a person to look at: in the terminal, or as one HTML page."""

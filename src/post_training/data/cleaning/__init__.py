"""Rows that say nearly what an earlier row says, or what a benchmark asks: found and left out."""

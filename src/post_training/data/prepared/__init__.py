"""Prepared datasets: from rows to token sequences on disk, mixed and packed into rows."""

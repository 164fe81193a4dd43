"""post-training: an image is the unit of reproducibility (see README.md)."""

__version__ = "0.1.0"

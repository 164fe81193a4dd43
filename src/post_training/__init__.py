"""post-training: an image is the unit of reproducibility (see README.md)."""

__version__ = "0.2.0"

"""Supervised fine-tuning: the loss is the mean over the assistant's tokens of a global batch."""

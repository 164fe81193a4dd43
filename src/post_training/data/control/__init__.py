"""Documents with control markers around their turns, as GPT-NeoX's tools have them, and the
tokenizers for them."""

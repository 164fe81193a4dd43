"""A SentencePiece model as a Hugging Face tokenizer, proved equal on the user's corpus."""

"""From files of conversations to token ids and labels. Nothing here imports torch."""

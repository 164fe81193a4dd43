"""Models and tokenizers as folders: made, loaded, saved. With the stages, the only use of torch."""

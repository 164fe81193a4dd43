"""Chat templates: chosen, proved, and rendered with the characters that are to be trained."""

"""The forms in which public datasets come, by name, and how each is read."""

"""convert.py: checkpoints of other systems into model folders, and back. merge.py: one model of
several."""

"""What a run leaves: its record, the artifacts it made, and the comparison of two runs."""

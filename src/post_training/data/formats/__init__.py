"""What rows look like in files: recognised by their columns, and parsed to the row types."""

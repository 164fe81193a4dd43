"""What rows look like in files: recognised by their columns, and parsed to the row types.

recognise.py is the beginning: it knows all formats, and calls the others.
"""

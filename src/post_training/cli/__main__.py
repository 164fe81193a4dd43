"""`python -m post_training.cli`: where the command's script may not be on PATH."""

from post_training.cli import main

main()

"""A stage run: its life (execute.py), the stages by name (registry.py), and the small stages that
make and move data. Training is in train/, annotation in annotate/.

config.py of each is light: the command line reads it where no torch is installed.
"""

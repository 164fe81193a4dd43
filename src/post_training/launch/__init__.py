"""How the processes of a run are started, and how each learns its rank."""

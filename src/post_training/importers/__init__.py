"""Configurations of other trainers, translated key by key: `post-training import`.

    files -> documents.py (YAML, JSON, Hydra's groups) -> {key: value, where}
          -> a table of keys, one module a system (its rows beside it) -> translation.py
          -> run.py: our configuration, checked, and a line for each key

Nothing of a file is left out without a word: a key becomes a setting, or is how it is done here
anyway, or has no counterpart. The last is refused, unless the key is named to be dropped.
"""

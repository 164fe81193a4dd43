"""The stages: `entrypoint STAGE cfg.yaml`. One folder each: config.py (light), run.py (torch)."""

"""Stages that add to rows or choose among them, an input cut into chunks for any number of workers.

    inputs -> plan.py       RUN/chunks/input.jsonl, manifest.json   rows and chunks, by content
           -> work.py       RUN/chunks/000012.jsonl, 000012.json    by any number of workers
           -> annotate.py   RUN/dataset/rows.jsonl, counts.json     the same bytes in every case

A stage gives `annotate` (annotate.py) an Annotator (work.py) and nothing else.
"""

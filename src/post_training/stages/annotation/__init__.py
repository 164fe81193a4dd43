"""What the annotation stages share: an input cut into chunks, workers that claim them, the merge.

    inputs -> plan.py    RUN/chunks/input.jsonl, manifest.json   rows and chunks, by content
           -> work.py    RUN/chunks/000012.jsonl, 000012.json    by any number of workers
           -> merge.py   RUN/dataset/rows.jsonl, counts.json     the same bytes in every case

A stage gives `annotate` (annotate.py) an Annotator (annotator.py) and nothing else.
"""

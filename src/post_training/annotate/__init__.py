"""Stages that add to rows or choose among them, an input cut into chunks for any number of workers.

    inputs -> plan.py       RUN/chunks/input.jsonl, manifest.json   rows and chunks, by content
           -> work.py       RUN/chunks/000012.jsonl, 000012.json    by any number of workers
           -> annotate.py   RUN/dataset/rows.jsonl, counts.json     the same bytes in every case

A stage (filter.py, generate.py, logprobs.py, rewards.py) gives `annotate` (annotate.py) an
Annotator (work.py) and nothing else. engine.py has the model that it works with, samplers.py how
samples are drawn. select.py needs no model and no chunks: pairs.py chooses, report.py tells.
"""

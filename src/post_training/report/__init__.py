"""The report of a run: one page of HTML that needs nothing beside itself.

    run folder -> RunView (view.py: record, attempts, lineage, settings, verdicts)
                    curves.py        metrics.jsonl -> the series of each chart
                    annotations.py   rows with branches -> distributions and examples
               -> page.html.jinja, page.css, page.js and uPlot -> one file (page.py)

The text is complete without scripts; page.js draws the curves and histograms from the numbers that
the page holds. A stage leaves RUN/report.html when it has finished; `post-training report` and
`post-training watch` write the same page of runs in any state. No record lists the page: it holds
times and paths.
"""

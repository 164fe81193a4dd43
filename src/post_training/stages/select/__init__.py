"""`entrypoint select`: preference rows from annotated branches.

candidates.py   a row -> its branches as candidates, and the rewards of its reference samples
strategies.py   candidates -> pairs, by name
pairs.py        a pair -> a preference row, with everything that DPO and QRPO need
report.py       what was selected: a table, RUN/report/report.json and report.html
"""

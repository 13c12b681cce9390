"""Caption sets (data/sidecars.py): published tables joined to tars, captions written by models, filters, a report.

Each command of `ov2 captions` begins with files (tars or sidecars) and writes sidecars, one for each tar, whole or not
at all, so that the same command continues what was stopped.
"""

"""From tar, csv or nothing to batches. Imports no OpenCLIP: tokenizer and transforms are handed in.

One caption's way: sources.py (raw sample, bytes) -> captions.py (which text) -> samples.py (image and text) ->
streams.py (batch, in the worker) -> loader.py. A sample that cannot be used is a SkipSample with a cause, counted by
skips.py. Of a tar: plan.py (who reads which part) -> shuffled.py (one pass) -> tars.py (one tar). Where a stopped run
goes on: position.py (one consumer), resume.py (all of them).
"""

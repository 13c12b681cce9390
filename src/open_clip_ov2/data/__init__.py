"""From tar, csv or nothing to batches. Imports no OpenCLIP: tokenizer and transforms are handed in.

One caption's way: sources.py (raw sample, bytes) -> captions.py (which text) -> samples.py (image and text) ->
loader.py (batch). A sample that cannot be used is a SkipSample with a cause, counted by skips.py.
"""

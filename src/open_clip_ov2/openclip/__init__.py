"""The only package that touches `open_clip` and `open_clip_train`. What it rebinds there: patches.py."""

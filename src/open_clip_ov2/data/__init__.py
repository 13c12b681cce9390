"""Tars, tables, folders or made-up samples to batches. Imports no OpenCLIP: tokenizer and transform are passed in.

docs/architecture.md follows one sample through these modules, from the tar to the training step.
"""

"""Models compared on equal terms: the same data, order, pixels, optimizer and seeds; equal samples, seconds or FLOPs.

An arm is one way to train; a run is one arm with one seed. All else is equal unless the comparison's file says so.
"""

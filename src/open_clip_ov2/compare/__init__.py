"""Models compared on equal terms: the same data, order, pixels, optimizer and seeds; equal samples, seconds or FLOPs.

A variant is one way to train, a run is one variant with one seed (docs/architecture.md, "One comparison")."""

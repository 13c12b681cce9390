"""Everything a user sees of a run: log, progress line, TensorBoard, results.jsonl, curves, contact sheets."""

"""What a user sees of a run: log, progress line, results.jsonl, trackers, status.json, figures, contact sheets."""

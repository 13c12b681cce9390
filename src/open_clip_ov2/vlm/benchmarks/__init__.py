"""What a multimodal model can read: questions asked offline, lmms-eval's tasks, and the papers' table.

Scores are in the papers' units: percent, for OCRBench and MME points. They are kept in `eval/` of the model's folder.
"""

"""The training step, and what any training loop needs around it: checkpoints, signals, a guard, random states.

It knows torch and our loss and batches, and nothing of OpenCLIP.
"""

"""What a training loop needs around its step, whichever step that is: checkpoints, signals, a guard, random states.

Imports torch and numpy, and nothing of OpenCLIP.
"""

"""Whether an encoder is good: metrics, each on any model that can do what it needs.

Shape legend of every module here:

    B  batch                 N  image (patch) tokens      C  candidates (classes, captions)
    L  caption tokens        D  width of the tower at hand
"""

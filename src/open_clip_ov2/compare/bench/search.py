"""The largest batch that fits, by doubling and then halving the interval."""

from __future__ import annotations

from collections.abc import Callable


def largest(fits: Callable[[int], bool], start: int, step: int, most: int) -> int:
    """The largest multiple of `step` up to `most` for which `fits` holds, 0 if there is none.

    `fits` must be true up to some size and false beyond. `start` is tried first. Asks about 2 log2(result / step)
    times, and never about more than twice what fits, or than `start`.
    """
    if not 1 <= step <= most:
        raise ValueError(f"step {step} must lie between 1 and the most, {most}")
    ceiling = most // step
    low, high = 0, ceiling + 1  # in steps: low fits (0 always does), high does not
    ask = min(max(1, start // step), ceiling)
    while high - low > 1:
        if fits(ask * step):
            low = ask
            ask = min(2 * low, ceiling) if high > ceiling else (low + high) // 2
        else:
            high = ask
            ask = (low + high) // 2
    return low * step

"""The learning-rate schedule that CompVis's configs name."""

from __future__ import annotations

import bisect


class LambdaLinearScheduler:
    """A factor of the learning rate for torch.optim.lr_scheduler.LambdaLR: cycles of linear warm-up and linear decay.

    Cycle i lasts cycle_lengths[i] steps: f_start[i] to f_max[i] over warm_up_steps[i], then to f_min[i] at its end.
    """

    def __init__(self, warm_up_steps, f_min, f_max, f_start, cycle_lengths, verbosity_interval=0):
        self.cycles = list(zip(warm_up_steps, f_min, f_max, f_start, cycle_lengths))
        self.ends = [sum(cycle_lengths[: i + 1]) for i in range(len(cycle_lengths))]

    def schedule(self, n, **kwargs):
        cycle = min(bisect.bisect_left(self.ends, n), len(self.ends) - 1)
        warm_up, f_min, f_max, f_start, length = self.cycles[cycle]
        n -= self.ends[cycle] - length
        if n < warm_up:
            return f_start + (f_max - f_start) * n / warm_up
        return f_min + (f_max - f_min) * (length - n) / length

    __call__ = schedule

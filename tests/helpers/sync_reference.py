"""SyncUBN in one process that holds the batches of all ranks, built on ``reference``."""

import math

from reference import GateReference, condensation_score, statistics, ubn


def pair_weighted_score(parts):
    """Mean of the ranks' scores, each weighted by its number of pairs; None without a pair."""
    total = num_pairs = 0
    for part in parts:
        pairs = len(part) * (len(part) - 1) if part.numel() else 0
        if pairs:
            total = total + pairs * condensation_score(part.detach())
            num_pairs += pairs
    return total / num_pairs if num_pairs else None


class SyncReference(GateReference):
    """A layer on a list of batches, one a rank, whose sizes may differ."""

    def __init__(self, num_features, eps=1e-5, track_running_stats=True, **gate):
        super().__init__(num_features, **gate)
        self.eps = eps
        self.track_running_stats = track_running_stats

    def __call__(self, parts, params):
        """Return the output of each rank in training; differentiable."""
        present = [part for part in parts if part.numel()]
        if not present:
            return [part.clone() for part in parts]
        mean, var, count = statistics(present, params)
        if self.track_running_stats:
            # A single value has no variance that the running ones could take in.
            seen = mean if count > 1 else mean * math.nan
            self.step(seen, var, count, pair_weighted_score(present))
        return self._normalize(parts, params, mean, var)

    def evaluate(self, parts, params):
        """Return the output of each rank in evaluation; differentiable."""
        if self.track_running_stats:
            return self._normalize(parts, params, self.running_mean, self.running_var)
        return self._normalize(parts, params)

    def _normalize(self, parts, params, *statistics):
        return [
            ubn(part, params, self.eps, *statistics)[0] if part.numel() else part.clone()
            for part in parts
        ]

"""SyncUBN in one process that holds the batches of all ranks, built on ``reference``."""

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
    """A layer in training on a list of batches, one a rank, whose sizes may differ."""

    def __init__(self, num_features, eps=1e-5, on_condensed='running', **gate):
        super().__init__(num_features, **gate)
        self.eps = eps
        self.on_condensed = on_condensed

    def __call__(self, parts, params):
        """Return the output of each rank; differentiable."""
        present = [part for part in parts if part.numel()]
        if not present:
            return [part.clone() for part in parts]
        mean, var, count = statistics(present, params)
        opened = self.step(mean, var, count, pair_weighted_score(present))
        if not opened and self.on_condensed == 'running':
            mean, var = self.running_mean, self.running_var
        return [
            ubn(part, params, self.eps, mean, var)[0] if part.numel() else part.clone()
            for part in parts
        ]

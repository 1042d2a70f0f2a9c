"""Tango's score statistic, computed from its definition."""

import math

from scipy.optimize import minimize_scalar


def deviations(gained, lost, n, difference):
    """Tango's statistic from its definition: the variance at the likeliest chances that have this difference."""

    def against(share):
        shares = (share + difference, share, 1 - 2 * share - difference)
        counts = zip((gained, lost, n - gained - lost), shares, strict=True)
        return -sum(count * math.log(max(chance, 1e-300)) for count, chance in counts if count)

    bounds = (max(0.0, -difference), (1 - difference) / 2)
    share = minimize_scalar(against, bounds=bounds, method="bounded", options={"xatol": 1e-13}).x
    return (gained - lost - n * difference) / math.sqrt(n * (2 * share + difference - difference**2))

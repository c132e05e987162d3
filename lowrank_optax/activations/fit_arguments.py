"""What a code may say of a derivative, and what else a codebook is asked for with."""

import numbers
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

Coding: TypeAlias = Literal["value", "interval"]


def check(bits: Any, domain: Any, coding: Any) -> None:
    """Raises ValueError for what `codebook` and `table` do not take."""
    whole = isinstance(bits, numbers.Integral) and not isinstance(bits, bool)
    if not whole or not 1 <= int(bits) <= 8:
        raise ValueError(f"bits={bits!r} must be an int from 1 to 8.")
    if not isinstance(domain, numbers.Real) or not 0 < float(domain) < np.inf:
        raise ValueError(f"domain={domain!r} must be a positive number: half the width fitted on.")
    if coding not in get_args(Coding):
        raise ValueError(f"coding={coding!r} must be 'value' or 'interval'.")

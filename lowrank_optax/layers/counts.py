"""Numbers of heads, experts, blocks and the like, checked where they are given."""

from typing import Any

import numpy as np


def check_count(name: str, value: Any) -> None:
    """Raises ValueError unless the value is a positive integer."""
    is_integer = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not is_integer or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}.")

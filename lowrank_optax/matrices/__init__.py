"""How a parameter leaf is seen as a (batch of) matrix, and which leaves are."""

from lowrank_optax.matrices.flax_rules import weight_dimension_numbers
from lowrank_optax.matrices.rules import DimensionNumbersRule, resolve_dimension_numbers
from lowrank_optax.matrices.views import (
    WeightDimensionNumbers,
    from_matrix,
    matrix_partition,
    matrix_shape,
    to_matrix,
)

__all__ = [
    "DimensionNumbersRule",
    "WeightDimensionNumbers",
    "from_matrix",
    "matrix_partition",
    "matrix_shape",
    "resolve_dimension_numbers",
    "to_matrix",
    "weight_dimension_numbers",
]

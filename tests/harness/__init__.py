"""What every transformation of this library must do, as checks that take a `Row`.

A check raises AssertionError when the row fails it. Its name, without `check_`, is the name of the
property. `checks_for(row)` lists the checks that make sense for a row.
"""

from collections.abc import Callable

from harness.convergence import check_converges
from harness.edge_checks import (
    check_empty_tree,
    check_leaves_of_any_size,
    check_non_finite_gradient_never_enters_a_basis,
    check_non_finite_gradient_stays_in_its_leaf,
    check_tuple_and_list_parameters,
    check_zero_gradients,
)
from harness.flax_checks import check_nnx_optimizer, check_orbax_round_trip
from harness.jit_checks import (
    check_donated_buffers,
    check_extra_arguments_accepted,
    check_jit_equals_eager,
    check_no_recompilation_at_the_second_call,
    check_stacked_leaves_equal_separate_leaves,
    check_vmap_equals_a_loop,
)
from harness.optax_checks import (
    check_apply_if_finite,
    check_chain_and_named_chain,
    check_dimension_numbers_as_tree_or_function,
    check_inject_hyperparams,
    check_inject_hyperparams_in_bfloat16,
    check_learning_rate_schedule,
    check_map_params,
    check_masked,
    check_multi_steps,
    check_partition,
    check_wrappers_in_each_other,
)
from harness.row import Convergence, Row
from harness.sharding_checks import (
    check_sharded_on_an_auto_mesh,
    check_sharded_on_an_explicit_mesh,
)
from harness.state_checks import (
    check_cond_between_old_and_new_state,
    check_float32_is_kept_where_float64_is_enabled,
    check_float64_is_kept,
    check_mixed_dtypes_in_one_tree,
    check_state_is_arrays,
    check_state_is_parallel_trees,
    check_state_types_constant,
    check_updates_keep_dtype,
)

Check = Callable[[Row], None]

CHECKS: tuple[Check, ...] = (
    check_state_is_arrays,
    check_state_is_parallel_trees,
    check_state_types_constant,
    check_updates_keep_dtype,
    check_float32_is_kept_where_float64_is_enabled,
    check_float64_is_kept,
    check_mixed_dtypes_in_one_tree,
    check_cond_between_old_and_new_state,
    check_jit_equals_eager,
    check_no_recompilation_at_the_second_call,
    check_extra_arguments_accepted,
    check_donated_buffers,
    check_vmap_equals_a_loop,
    check_stacked_leaves_equal_separate_leaves,
    check_masked,
    check_partition,
    check_inject_hyperparams,
    check_inject_hyperparams_in_bfloat16,
    check_multi_steps,
    check_chain_and_named_chain,
    check_apply_if_finite,
    check_map_params,
    check_wrappers_in_each_other,
    check_nnx_optimizer,
    check_orbax_round_trip,
    check_sharded_on_an_auto_mesh,
    check_sharded_on_an_explicit_mesh,
    check_non_finite_gradient_stays_in_its_leaf,
    check_zero_gradients,
    check_empty_tree,
    check_leaves_of_any_size,
    check_tuple_and_list_parameters,
    check_converges,
)


def checks_for(row: Row) -> tuple[Check, ...]:
    """Every check, and those that ask for an argument or a field the row has."""
    checks = CHECKS
    if row.takes("learning_rate"):
        checks += (check_learning_rate_schedule,)
    if row.takes("weight_dimension_numbers"):
        checks += (check_dimension_numbers_as_tree_or_function,)
    if row.basis is not None:
        checks += (check_non_finite_gradient_never_enters_a_basis,)
    return checks


def name_of(check: Check) -> str:
    """The name of the property, as exceptions and test reports give it."""
    return check.__name__.removeprefix("check_")


__all__ = [
    "CHECKS",
    "Check",
    "Convergence",
    "Row",
    "check_apply_if_finite",
    "check_chain_and_named_chain",
    "check_cond_between_old_and_new_state",
    "check_converges",
    "check_dimension_numbers_as_tree_or_function",
    "check_donated_buffers",
    "check_empty_tree",
    "check_extra_arguments_accepted",
    "check_float32_is_kept_where_float64_is_enabled",
    "check_float64_is_kept",
    "check_inject_hyperparams",
    "check_inject_hyperparams_in_bfloat16",
    "check_jit_equals_eager",
    "check_learning_rate_schedule",
    "check_leaves_of_any_size",
    "check_map_params",
    "check_masked",
    "check_mixed_dtypes_in_one_tree",
    "check_multi_steps",
    "check_nnx_optimizer",
    "check_no_recompilation_at_the_second_call",
    "check_non_finite_gradient_never_enters_a_basis",
    "check_non_finite_gradient_stays_in_its_leaf",
    "check_orbax_round_trip",
    "check_partition",
    "check_sharded_on_an_auto_mesh",
    "check_sharded_on_an_explicit_mesh",
    "check_stacked_leaves_equal_separate_leaves",
    "check_state_is_arrays",
    "check_state_is_parallel_trees",
    "check_state_types_constant",
    "check_tuple_and_list_parameters",
    "check_updates_keep_dtype",
    "check_vmap_equals_a_loop",
    "check_wrappers_in_each_other",
    "check_zero_gradients",
    "checks_for",
    "name_of",
]

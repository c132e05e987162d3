"""Transformations of optax and of this library that are known to be independent, or not to be."""

from collections.abc import Iterator, Sequence
import functools
import inspect
from typing import Any

import optax

from lowrank_optax.slices.call import CannotCutError

# Transformations of optax and this library that compute a number from all leaves.
OVER_ALL_LEAVES = """
add_noise apply_if_finite clip_by_global_norm dadapt_adamw differentially_private_aggregate dog dowg
dpsgd flatten hutchinson_estimator_diag_hessian lbfgs mechanize momo momo_adam monitor_weight_decay
noisy_sgd normalize normalize_by_update_norm per_example_global_norm_clip
per_example_layer_norm_clip polyak_sgd prodigy sam scale_by_backtracking_linesearch scale_by_lbfgs
scale_by_polyak scale_by_zoom_linesearch skip_large_updates sophia
""".split()  # noqa: SIM905
# A number from all rows of a leaf.
OVER_A_LEAF = """
adafactor adaptive_grad_clip centralize clip_by_block_rms fromage lamb lars novograd
scale_by_distance_over_gradients scale_by_factored_rms scale_by_novograd scale_by_param_block_norm
scale_by_param_block_rms scale_by_sm3 scale_by_trust_ratio sm3
""".split()  # noqa: SIM905
# Element by element, or made of others.
ELEMENTWISE = """
adabelief adadelta adagrad adam adamax adamaxw adamw adan add_decayed_weights
ademamix adopt amsgrad chain clip conditionally_mask conditionally_transform ema identity in_float32
inject_hyperparams keep_dtypes keep_params_nonnegative lion masked measure_with_ema nadam nadamw
named_chain partition powerprop_updates radam rmsprop rprop scale scale_by_acprop scale_by_adadelta
scale_by_adam scale_by_adamax scale_by_adan scale_by_ademamix scale_by_adopt scale_by_amsgrad
scale_by_belief scale_by_cocob scale_by_learning_rate scale_by_lion scale_by_madgrad scale_by_nag_gs
scale_by_optimistic_gradient scale_by_radam scale_by_rms scale_by_rprop scale_by_rss
scale_by_schedule scale_by_sign scale_by_simplified_ademamix scale_by_stddev scale_by_yogi
schedule_free set_to_zero sgd simplified_ademamix trace with_extra_args_support yogi
zero_nans
""".split()  # noqa: SIM905
# Matrix by matrix; where rows of a matrix would be cut, the sizes of products tell.
MATRIX_BY_MATRIX = ("muon", "scale_by_muon", "scale_by_shape")
# Packages of this library whose transformations see to their own leaves.
OURS = (
    "lowrank_optax.optimizers.gradient_direction",
    "lowrank_optax.projection",
    "lowrank_optax.slices",
    "lowrank_optax.states",
)
LISTED = ("optax.", "lowrank_optax.")


def check_leaves(tx: optax.GradientTransformation) -> None:
    """Raises CannotCutError, with its name, if ``tx`` has a part that looks at whole leaves."""
    if found := looks_at(tx):
        raise CannotCutError(
            f"{found[0]} computes a number from {found[1]}, which slices would change. One of all "
            "leaves may come before, in_slices(..., before=), or after, in an optax.chain."
        )


def looks_at(
    tx: optax.GradientTransformation, *, whole_leaves: bool = True
) -> tuple[str, str] | None:
    """A part of ``tx`` that computes a number from all leaves, or a whole one, and from which."""
    kinds = [(OVER_ALL_LEAVES, "all leaves"), (OVER_A_LEAF, "a whole leaf")]
    for part in _parts(tx):
        for names, what in kinds if whole_leaves else kinds[:1]:
            if _is_listed(*part, names):
                return part[0], what
    return None


def has_part(tx: optax.GradientTransformation, wanted: str) -> bool:
    """Whether optax's transformation of this name is a part of ``tx``."""
    return any(name == wanted and module.startswith("optax.") for name, module in _parts(tx))


def is_known(tx: optax.GradientTransformation) -> bool:
    """Whether ``tx`` is made of parts that are known to allow slices, or to refuse them."""
    return not unknown_parts(tx)


def unknown_parts(tx: optax.GradientTransformation) -> list[str]:
    """The names of the parts of ``tx`` of which nothing is known."""
    known = (*ELEMENTWISE, *MATRIX_BY_MATRIX)
    return [
        name
        for name, module in _parts(tx)
        if not (module.startswith(OURS) or _is_listed(name, module, known))
    ]


def is_elementwise(tx: optax.GradientTransformation) -> bool:
    """Whether an update is known to be computed element by element, all in one pass."""
    return all(_is_listed(*part, ELEMENTWISE) for part in _parts(tx))


def _is_listed(name: str, module: str, names: Sequence[str]) -> bool:
    return module.startswith(LISTED) and name in names


def _parts(tx: optax.GradientTransformation) -> Iterator[tuple[str, str]]:
    """The name of the function that made each update function in ``tx``, and its module."""
    seen: set[int] = set()
    waiting: list[tuple[Any, bool]] = [(tx.update, True)]  # with whether it is known as an update
    while waiting:
        x, is_update = waiting.pop()
        if id(x) in seen:
            continue
        seen.add(id(x))
        if isinstance(x, optax.GradientTransformation):
            waiting.append((x.update, True))
        elif isinstance(x, functools.partial):
            waiting += [(y, is_update) for y in (x.func, *x.args, *x.keywords.values())]
        elif isinstance(x, dict):
            waiting += [(y, False) for y in x.values()]
        elif isinstance(x, tuple | list):
            waiting += [(y, is_update) for y in x]
        elif inspect.isfunction(x):
            names = zip(x.__code__.co_freevars, x.__closure__ or (), strict=True)
            waiting += [
                (cell.cell_contents, name in ("update_fns", "inner_factory"))
                for name, cell in names
            ]
            if is_update or "update" in x.__name__:
                yield x.__qualname__.split(".")[0], x.__module__ or ""
        elif inspect.ismethod(x):
            waiting += [(x.__func__, is_update), (getattr(x.__self__, "__dict__", {}), False)]
        elif hasattr(x, "__wrapped__"):
            waiting.append((x.__wrapped__, is_update))
        elif is_update:  # an object that can be called, of which nothing is known
            waiting.append((getattr(x, "__dict__", {}), False))
            yield type(x).__name__, type(x).__module__

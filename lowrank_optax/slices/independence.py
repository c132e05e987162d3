"""Whether a transformation gives the same, leaf by leaf and slice by slice.

Known ones are known by their names; of others the program is read, for what reaches which update,
and a small copy of each leaf is tried, for whether one row knows of another.
"""

from collections.abc import Iterator, Sequence
import functools
import inspect
from typing import Any

import jax
from jax.extend import core
import jax.numpy as jnp
import numpy as np
import optax

from lowrank_optax.matrices.paths import normalised_path, owner_of
from lowrank_optax.slices.call import Call
from lowrank_optax.slices.whole import CannotCutError

# Of optax, with its recipes: a number from all leaves.
OVER_ALL_LEAVES = """
add_noise apply_if_finite clip_by_global_norm dadapt_adamw differentially_private_aggregate dog
dowg dpsgd flatten hutchinson_estimator_diag_hessian lbfgs mechanize momo momo_adam noisy_sgd
normalize normalize_by_update_norm per_example_global_norm_clip per_example_layer_norm_clip
polyak_sgd prodigy sam scale_by_backtracking_linesearch scale_by_lbfgs scale_by_polyak
scale_by_zoom_linesearch skip_large_updates sophia
"""
# A number from all rows of a leaf.
OVER_A_LEAF = """
adafactor adaptive_grad_clip centralize clip_by_block_rms fromage lamb lars novograd
scale_by_distance_over_gradients scale_by_factored_rms scale_by_novograd scale_by_param_block_norm
scale_by_param_block_rms scale_by_sm3 scale_by_trust_ratio sm3
"""
# Element by element, or made of others.
ELEMENT_BY_ELEMENT = """
adabelief adadelta adagrad adam adamax adamaxw adamw adan add_decayed_weights ademamix adopt
amsgrad chain clip conditionally_mask conditionally_transform ema identity inject_hyperparams
keep_params_nonnegative lion masked measure_with_ema nadam nadamw named_chain partition radam
rmsprop rprop scale scale_by_acprop scale_by_adadelta scale_by_adam scale_by_adamax scale_by_adan
scale_by_ademamix scale_by_adopt scale_by_amsgrad scale_by_belief scale_by_cocob
scale_by_learning_rate scale_by_lion scale_by_madgrad scale_by_optimistic_gradient scale_by_radam
scale_by_rms scale_by_rprop scale_by_rss scale_by_schedule scale_by_sign
scale_by_simplified_ademamix scale_by_stddev scale_by_yogi schedule_free set_to_zero sgd
simplified_ademamix trace with_extra_args_support yogi
"""
# Packages of this library whose transformations see to their own leaves.
OURS = ("lowrank_optax.projection", "lowrank_optax.slices", "lowrank_optax.states")


def check_leaves(tx: optax.GradientTransformation) -> None:
    """Raises CannotCutError, with its name, if ``tx`` has a part that looks at whole leaves."""
    for name, module in _parts(tx):
        for names, what in ((OVER_ALL_LEAVES, "all leaves"), (OVER_A_LEAF, "a whole leaf")):
            if module.startswith("optax") and name in names.split():
                raise CannotCutError(
                    f"{name} computes a number from {what}, which slices would change. One of all "
                    "leaves may come before: in_slices(..., before=)."
                )


def is_known(tx: optax.GradientTransformation) -> bool:
    """Whether ``tx`` is made of parts that are known to allow slices, or to refuse them."""
    return all(_is_elementwise(*part) or part[1].startswith(OURS) for part in _parts(tx))


def is_elementwise(tx: optax.GradientTransformation) -> bool:
    """Whether an update is known to be computed element by element, all in one pass."""
    return all(_is_elementwise(*part) for part in _parts(tx))


def _is_elementwise(name: str, module: str) -> bool:
    return module.startswith("optax") and name in ELEMENT_BY_ELEMENT.split()


def _parts(tx: optax.GradientTransformation) -> Iterator[tuple[str, str]]:
    """What ``tx`` is made of: the name of what made each update function, and its module."""
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


def check_parts(call: Call, parts: Sequence[optax.GradientTransformation]) -> None:
    """Raises CannotCutError if a part of the call's transformation does not work leaf by leaf."""
    for part in parts:
        check_leaves(part)
        if is_known(part):
            continue
        params = call.tree(dict(enumerate(call.likes)))
        state = jax.tree_util.tree_leaves_with_path(jax.eval_shape(part.init, params))
        part = optax.with_extra_args_support(part)
        if not leaves_are_independent(call._replace(tx=part, state=dict(state))):
            raise CannotCutError("the update of a leaf depends on others, or a count on gradients.")


def leaves_are_independent(call: Call) -> bool:
    """Whether in the program of ``tx.update`` nothing goes from one leaf to another's results.

    Nor from any leaf to what of the state belongs to none.
    """
    names = {normalised_path(path): i for i, path in enumerate(call.paths)}
    structure = jax.tree.structure(call.state_shapes(range(len(call.paths))))
    paths, arrays = list(call.state), list(call.state.values())
    shared = call.shared()
    owner = lambda path: None if path in shared else owner_of(path, names)
    owners = [None if (name := owner(path)) is None else names[name] for path in paths]

    def update(gradients: Any, likes: Any, arrays: Any) -> tuple[Any, Any]:
        updates, state = call.tx.update(
            call.treedef.unflatten(gradients),
            structure.unflatten(arrays),
            call.treedef.unflatten(likes) if call.has_params else None,
            **call.extra_args,
        )
        return call.treedef.flatten_up_to(updates), jax.tree.leaves(state)

    program, shapes = jax.make_jaxpr(update, return_shape=True)(call.gradients, call.likes, arrays)
    of_likes = [i for i, like in enumerate(call.likes) for _ in jax.tree.leaves(like)]
    of_updates = [i for i, update in enumerate(shapes[0]) for _ in jax.tree.leaves(update)]
    inputs = [*range(len(call.gradients)), *of_likes, *owners]
    sources = [frozenset() if i is None else frozenset((i,)) for i in inputs]
    reached = _reached(program.jaxpr, sources)
    targets = [*of_updates, *owners]
    return all(found <= {target} for found, target in zip(reached, targets, strict=True))


def _reached(program: Any, sources: Sequence[frozenset[int]]) -> list[frozenset[int]]:
    """Which sources each result of a jaxpr may depend on."""
    known = dict(zip(program.invars, sources, strict=True))
    look = lambda x: frozenset() if isinstance(x, core.Literal) else known.get(x, frozenset())
    for equation in program.eqns:
        inputs = [look(x) for x in equation.invars]
        inner = _inner(equation)
        if equation.primitive.name == "cond":
            taken = inputs[0]
            branches = [_reached(b.jaxpr, inputs[1:]) for b in equation.params["branches"]]
            results = [taken.union(*each) for each in zip(*branches, strict=True)]
        elif inner is not None:
            results = _reached(inner, inputs)
        else:
            results = [frozenset().union(*inputs)] * len(equation.outvars)
        known |= dict(zip(equation.outvars, results, strict=True))
    return [look(x) for x in program.outvars]


def _inner(equation: Any) -> Any:
    """The program that an equation calls once, with its own operands and results; or None."""
    if equation.primitive.name in ("scan", "while"):
        return None
    for value in equation.params.values():
        program = getattr(value, "jaxpr", value)
        if hasattr(program, "eqns") and len(program.invars) == len(equation.invars):
            return program if len(program.outvars) == len(equation.outvars) else None
    return None


def rows_are_independent(call: Call, leaf: int) -> bool:
    """Whether the first row of a small leaf gets the same update, whatever is in the second."""
    shape_of = lambda x: (2, *(min(size, 256) for size in x.shape[1:]))
    rng = np.random.default_rng(0)
    draw = lambda x: rng.standard_normal(shape_of(x)).astype(x.dtype)
    try:
        with jax.ensure_compile_time_eval():
            param, gradient = jax.tree.map(draw, (call.likes[leaf], call.gradients[leaf]))
            state = call.tx.init(call.tree({leaf: param}))
            params = call.tree({leaf: param}) if call.has_params else None
            first_rows = []
            for factor in (1.0, 1e4, np.nan):
                changed = np.concatenate([gradient[:1], (gradient[1:] * factor)]).astype(
                    gradient.dtype
                )
                updates, _ = call.tx.update(
                    call.tree({leaf: jnp.asarray(changed)}), state, params, **call.extra_args
                )
                first_rows.append([np.asarray(x[0]) for x in jax.tree.leaves(updates)])
    except (TypeError, ValueError):
        return False
    return all(
        np.array_equal(x, y, equal_nan=True)
        for rows in first_rows[1:]
        for x, y in zip(first_rows[0], rows, strict=True)
    )

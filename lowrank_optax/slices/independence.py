"""Whether a transformation gives the same, leaf by leaf and slice by slice.

Known ones are known by their names; of others the program is read: what reaches which update, and
whether rows are kept apart.
"""

from collections.abc import Iterator, Sequence
import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.compat.jax import Literal, branches, called_jaxpr, jaxpr_of
from lowrank_optax.matrices.paths import leaves_by_path
from lowrank_optax.slices.call import Call
from lowrank_optax.slices.rows import ALIKE, MIXED, ROWS, rows_are_apart
from lowrank_optax.slices.whole import CannotCutError, shapes_of_state

# Of optax and of this library, with their recipes: a number from all leaves.
OVER_ALL_LEAVES = """
add_noise apply_if_finite clip_by_global_norm dadapt_adamw differentially_private_aggregate dog dowg
dpsgd flatten hutchinson_estimator_diag_hessian lbfgs mechanize momo momo_adam monitor_weight_decay
noisy_sgd normalize normalize_by_update_norm per_example_global_norm_clip
per_example_layer_norm_clip polyak_sgd prodigy sam scale_by_backtracking_linesearch scale_by_lbfgs
scale_by_polyak scale_by_zoom_linesearch skip_large_updates sophia
"""
# A number from all rows of a leaf.
OVER_A_LEAF = """
adafactor adaptive_grad_clip centralize clip_by_block_rms fromage lamb lars novograd
scale_by_distance_over_gradients scale_by_factored_rms scale_by_novograd scale_by_param_block_norm
scale_by_param_block_rms scale_by_sm3 scale_by_trust_ratio sm3
"""
# Element by element, or made of others.
ELEMENT_BY_ELEMENT = """
adabelief adadelta adagrad adam adamax adamaxw adamw adan add_decayed_weights
ademamix adopt amsgrad chain clip conditionally_mask conditionally_transform ema identity in_float32
inject_hyperparams keep_dtypes keep_params_nonnegative lion masked measure_with_ema nadam nadamw
named_chain partition powerprop_updates radam rmsprop rprop scale scale_by_acprop scale_by_adadelta
scale_by_adam scale_by_adamax scale_by_adan scale_by_ademamix scale_by_adopt scale_by_amsgrad
scale_by_belief scale_by_cocob scale_by_learning_rate scale_by_lion scale_by_madgrad scale_by_nag_gs
scale_by_optimistic_gradient scale_by_radam scale_by_rms scale_by_rprop scale_by_rss
scale_by_schedule scale_by_sign scale_by_simplified_ademamix scale_by_stddev scale_by_yogi
schedule_free set_to_zero sgd simplified_ademamix trace with_extra_args_support yogi
"""
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
    for name, module in _parts(tx):
        for names, what in ((OVER_ALL_LEAVES, "all leaves"), (OVER_A_LEAF, "a whole leaf")):
            if module.startswith(LISTED) and name in names.split():
                raise CannotCutError(
                    f"{name} computes a number from {what}, which slices would change. One of all "
                    "leaves may come before, in_slices(..., before=), or after, in an optax.chain."
                )


def is_known(tx: optax.GradientTransformation) -> bool:
    """Whether ``tx`` is made of parts that are known to allow slices, or to refuse them."""
    known = lambda name, module: name in MATRIX_BY_MATRIX and module.startswith(LISTED)
    return all(
        _is_elementwise(*part) or known(*part) or part[1].startswith(OURS) for part in _parts(tx)
    )


def is_elementwise(tx: optax.GradientTransformation) -> bool:
    """Whether an update is known to be computed element by element, all in one pass."""
    return all(_is_elementwise(*part) for part in _parts(tx))


def _is_elementwise(name: str, module: str) -> bool:
    return module.startswith(LISTED) and name in ELEMENT_BY_ELEMENT.split()


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
        part = optax.with_extra_args_support(part)
        try:
            state = leaves_by_path(shapes_of_state(part, params))
            independent = leaves_are_independent(call._replace(tx=part, state=state))
        except Exception as error:
            raise CannotCutError("the update cannot be tried on some leaves alone.") from error
        if not independent:
            raise CannotCutError("the update of a leaf depends on others, or a count on gradients.")


def leaves_are_independent(call: Call) -> bool:
    """Whether in the program of ``tx.update`` nothing goes from one leaf to another's results.

    Nor from any leaf to what of the state belongs to none.
    """
    everyone = range(len(call.paths))
    structure = jax.tree.structure(call.state_shapes(everyone))
    owner = {path: i for i in everyone for path in leaves_by_path(call.state_shapes([i]))}
    owner |= dict.fromkeys(call.shared())
    owners, arrays = [owner[path] for path in call.state], list(call.state.values())

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
    look = lambda x: frozenset() if isinstance(x, Literal) else known.get(x, frozenset())
    for equation in program.eqns:
        inputs = [look(x) for x in equation.invars]
        inner = called_jaxpr(equation)
        if branched := branches(equation):
            found = [_reached(branch.jaxpr, inputs[1:]) for branch in branched]
            results = [inputs[0].union(*each) for each in zip(*found, strict=True)]
        elif inner is not None:
            results = _reached(jaxpr_of(inner), inputs)
        else:
            results = [frozenset().union(*inputs)] * len(equation.outvars)
        known |= dict(zip(equation.outvars, results, strict=True))
    return [look(x) for x in program.outvars]


def rows_are_independent(call: Call, place: int, parts: Sequence[Any]) -> bool:
    """Whether in the programs of these parts no row of a leaf reaches what another one gets."""
    return all(_keeps_rows_apart(_of_part(call, part), place) for part in parts)


def _of_part(call: Call, part: optax.GradientTransformation) -> Call:
    """The call, of a part of its transformation."""
    if part is call.tx:
        return call
    call = call._replace(tx=optax.with_extra_args_support(part))
    shapes = call.state_shapes(range(len(call.paths)))
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype) if x.size == 1 else x, shapes)
    return call._replace(state=leaves_by_path(state))


def _keeps_rows_apart(call: Call, place: int) -> bool:
    shared, state = call.shared(), leaves_by_path(call.state_shapes([place]))
    own = [path for path in state if path not in shared]

    def update(gradient: Any, like: Any, states: list[Any]) -> Any:
        arrays = dict(zip(own, states, strict=True))
        whole = call.whole._replace(settled=True)
        updates, new = call.update([place], [gradient], [like], arrays, whole)
        return (updates[0], [new[x] for x in own]), [new[x] for x in new if x not in own]

    arrays = call.gradients[place], call.likes[place], [call.state[path] for path in own]
    closed, (of_leaf, _) = jax.make_jaxpr(update, return_shape=True)(*arrays)
    size = (call.gradients[place].shape[0],)
    inputs = [ROWS if x.shape[:1] == size else MIXED for x in jax.tree.leaves(arrays)]
    found = rows_are_apart(closed.jaxpr, inputs)
    count = len(jax.tree.leaves(of_leaf))
    return all(x in (ROWS, ALIKE) for x in found[:count]) and not {ROWS, MIXED} & set(found[count:])

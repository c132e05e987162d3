"""Whether a transformation gives the same, leaf by leaf and slice by slice.

Known ones are known by their names; of others the program is read, for what reaches which update,
and a small copy of each leaf is tried, for whether its slices get what it gets.
"""

from collections.abc import Iterator, Sequence
import functools
import inspect
import math
from typing import Any

import jax
from jax.extend import core
import jax.numpy as jnp
import numpy as np
import optax

from lowrank_optax.matrices.paths import leaves_by_path
from lowrank_optax.slices.call import Call, Path
from lowrank_optax.slices.loop import Cut, taken
from lowrank_optax.slices.whole import CannotCutError, Whole

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
_scale_by_adam adabelief adadelta adagrad adam adamax adamaxw adamw adan add_decayed_weights
ademamix adopt amsgrad chain clip conditionally_mask conditionally_transform ema identity in_float32
inject_hyperparams keep_dtypes keep_params_nonnegative lion masked measure_with_ema nadam nadamw
named_chain partition powerprop_updates radam rmsprop rprop scale scale_by_acprop scale_by_adadelta
scale_by_adam scale_by_adamax scale_by_adan scale_by_ademamix scale_by_adopt scale_by_amsgrad
scale_by_belief scale_by_cocob scale_by_learning_rate scale_by_lion scale_by_madgrad scale_by_nag_gs
scale_by_optimistic_gradient scale_by_radam scale_by_rms scale_by_rprop scale_by_rss
scale_by_schedule scale_by_sign scale_by_simplified_ademamix scale_by_stddev scale_by_yogi
schedule_free set_to_zero sgd simplified_ademamix trace with_extra_args_support yogi
"""
# Operations that change no number, and come and go with axes of size one.
ONLY_SHAPES = ("broadcast_in_dim", "reshape", "squeeze")
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
    return all(_is_elementwise(*part) or part[1].startswith(OURS) for part in _parts(tx))


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
            state = leaves_by_path(jax.eval_shape(part.init, params))
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


def signature(closed: core.ClosedJaxpr) -> Any:
    """A program without its sizes: its operations, numbers, and the shapes of its constants.

    The program for a slice has that for the leaf, unless it goes by the number of rows.
    """
    return _signature(closed.jaxpr), [np.shape(x) for x in closed.consts]


def _signature(program: Any) -> list[Any]:
    found: list[Any] = []
    for equation in program.eqns:
        if equation.primitive.name in ONLY_SHAPES:
            continue
        numbers = [np.asarray(x.val).tolist() for x in equation.invars if hasattr(x, "val")]
        counted = equation.params.get("shape") if equation.primitive.name == "iota" else None
        along = counted and counted[equation.params["dimension"]]
        inner = [
            _signature(getattr(x, "jaxpr", x))
            for value in equation.params.values()
            for x in (value if isinstance(value, tuple | list) else [value])
            if hasattr(getattr(x, "jaxpr", x), "eqns")
        ]
        found.append((equation.primitive.name, repr(numbers), along, inner))
    return found


def slices_agree(call: Call, place: int, cut: Cut, own: Sequence[Path]) -> bool:
    """Whether a small copy of a leaf gets the same in slices, over three steps.

    Its rows differ in size by orders, and in the third step the last ones are not finite.
    """
    stacked = len(jnp.shape(call.gradients[place])) > 2
    small = _small_cut(call.gradients[place], cut, stacked)
    rng = np.random.default_rng(0)
    sizes = 4.0 ** (np.arange(small.size) // small.rows % 4)

    def draw(x: Any) -> jax.Array:
        shape = (small.size, *_shrunk(x.shape[1:], cut.rows, stacked))
        scaled = rng.standard_normal(shape) * sizes.reshape(-1, *[1] * (x.ndim - 1))
        return jnp.asarray(scaled, x.dtype)

    def step(gradient: Any, like: Any, state: list[Any]) -> tuple[list[Any], list[Any]]:
        """The new state, and what each slice gets: from the whole, and by itself."""
        around = small_call._replace(state=dict(zip(paths, state, strict=True)))
        settled = around.whole._replace(settled=True)
        updates, new = around.update([place], [gradient], [like], {}, settled)
        arrays = gradient, like, [around.state[path] for path in own]
        pairs = []
        for first in range(0, small.size, small.rows):
            cut_out = lambda x, first=first: taken(x, first, small.rows, small)
            numbers = small.rows_from(jnp.int32(first), small.rows)
            part = jax.tree.map(cut_out, arrays)
            update, state_of = around.slice_of(place, part, own, numbers, small.rows)
            kept = [cut_out(new[path]) if path in own else new[path] for path in paths]
            expected = jax.tree.map(cut_out, updates[0]), kept
            pairs.append((expected, (update, [state_of[path] for path in paths])))
        return [new[path] for path in paths], pairs

    try:
        with jax.ensure_compile_time_eval():
            like, gradient = jax.tree.map(draw, (call.likes[place], call.gradients[place]))
            tree = call.tree({place: like})
            small_call = call._replace(
                likes=_replaced(call.likes, place, like),
                gradients=_replaced(call.gradients, place, gradient),
                whole=Whole(tree),
                extra_args=jax.tree.map(_concrete, call.extra_args),
            )
            first_state = leaves_by_path(call.tx.init(tree))
            paths, state, run = list(first_state), list(first_state.values()), jax.jit(step)
            for factor in (1.0, -0.5, np.nan):
                factors = jnp.where(jnp.arange(small.size) >= small.size - small.rows, factor, 1.0)
                given = gradient * jnp.expand_dims(factors, range(1, gradient.ndim))
                state, pairs = run(given.astype(gradient.dtype), like, state)
                if not all(_close(found, expected) for expected, found in pairs):
                    return False
    except Exception:  # what cannot be tried
        return False
    return True


def _small_cut(leaf: jax.Array, cut: Cut, stacked: bool) -> Cut:
    rows = min(cut.rows, 2) if stacked else _shrunk((cut.rows, *leaf.shape[1:]), 1, False)[0]
    count = max(2, min(cut.whole, 3 if stacked else 16))
    return Cut(count * rows, rows)


def _shrunk(sides: tuple[int, ...], rows: int, stacked: bool) -> tuple[int, ...]:
    """Sides of a small matrix of the same proportions, and of few batches."""
    scale = min(1.0, 256 / max(rows if not stacked else 1, *sides, 1))
    small = [max(1, round(side * scale)) for side in sides]
    return (*(min(side, 3) for side in sides[:-2]), *small[-2:])


def _replaced(items: Sequence[Any], place: int, item: Any) -> list[Any]:
    return [*items[:place], item, *items[place + 1 :]]


def _concrete(x: Any) -> Any:
    return jnp.ones(x.shape, x.dtype) if isinstance(x, jax.Array) else x


def _close(found: Any, expected: Any) -> bool:
    """Whether two trees agree to half of their digits."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return all(_near(np.asarray(x), np.asarray(y)) for x, y in pairs)


def _near(x: np.ndarray, y: np.ndarray) -> bool:
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return np.array_equal(x, y)
    close = math.sqrt(jnp.finfo(x.dtype).eps)
    x, y = x.astype(np.float64), y.astype(np.float64)
    largest = np.max(np.abs(y), initial=0.0, where=np.isfinite(y))
    return np.allclose(x, y, rtol=close, atol=close * largest, equal_nan=True)

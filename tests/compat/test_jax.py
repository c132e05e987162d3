"""What the library assumes of JAX beyond its documented interface."""

import types
from typing import Any

from close import assert_close
import jax
from jax.ad_checkpoint import checkpoint_name as named
import jax.numpy as jnp
import pytest

from lowrank_optax.compat import jax as compat

X = jnp.ones((4, 3))


def equations(fn: Any, *args: Any) -> list[compat.JaxprEqn]:
    return jax.make_jaxpr(fn)(*args).jaxpr.eqns


def last(fn: Any, *args: Any) -> compat.JaxprEqn:
    return equations(fn, *args)[-1]


def names(program: Any) -> list[str]:
    return [compat.primitive_name(x) for x in compat.jaxpr_of(program).eqns]


@jax.custom_jvp
def with_own_tangent(x: jax.Array) -> jax.Array:
    return jnp.sin(x)


with_own_tangent.defjvps(lambda tangent, value, x: tangent * x)


@jax.custom_vjp
def with_own_backward(x: jax.Array) -> jax.Array:
    return jnp.sin(x)


with_own_backward.defvjp(lambda x: (jnp.sin(x), x), lambda x, cotangent: (cotangent * x,))


@pytest.mark.parametrize(
    "fn", [jax.jit(jnp.sin), jax.checkpoint(jnp.sin), with_own_tangent, with_own_backward]
)
def test_jit_remat_and_custom_derivatives_call_one_jaxpr_with_their_own_operands(fn: Any) -> None:
    program = compat.called_jaxpr(last(fn, X))
    assert program is not None
    assert names(program) == ["sin"]
    assert [names(x) for x in compat.bodies(last(fn, X))] == [["sin"]]


def test_what_calls_nothing_has_no_called_jaxpr() -> None:
    assert compat.called_jaxpr(last(jnp.sin, X)) is None
    assert not list(compat.sub_jaxprs(last(jnp.sin, X)))


def test_a_cond_has_its_branches_and_first_operand_the_index() -> None:
    cond = last(lambda x: jax.lax.cond(x.sum() > 0, jnp.sin, jnp.cos, x), X)
    assert [names(x) for x in compat.branches(cond)] == [["cos"], ["sin"]]
    assert len(cond.invars) == 1 + len(compat.branches(cond)[0].jaxpr.invars)
    assert compat.branches(last(jnp.sin, X)) == ()


def test_a_while_has_condition_and_body() -> None:
    loop = last(lambda x: jax.lax.while_loop(lambda x: x[0, 0] < 5, lambda x: x + 1, x), X)
    assert [names(x)[-1] for x in compat.sub_jaxprs(loop)] == ["lt", "add"]


def test_a_scan_says_how_many_operands_are_constants_and_carried_and_its_length() -> None:
    def turn(carry: Any, x: jax.Array) -> Any:
        return {"a": carry["a"] + x, "b": carry["b"] * x * weight}, carry["a"]

    weight = jnp.ones(3)
    carry = {"a": jnp.zeros(3), "b": jnp.ones(3)}
    (scan,) = equations(lambda *args: jax.lax.scan(turn, *args), carry, X)
    assert sum(compat.scan_operands(scan)) == len(scan.invars) - 1
    assert compat.scan_operands(scan)[1] == 2
    assert compat.scan_length(scan) == 4
    assert compat.scan_length(last(jnp.sin, X)) == 1
    unknown: Any = types.SimpleNamespace(params={"new": 1}, invars=[])
    with pytest.raises(NotImplementedError, match=r"a scan carries .*; its parameters are new"):
        compat.scan_operands(unknown)


def test_a_parameter_that_jax_has_no_more_is_an_error_that_names_the_operation() -> None:
    with pytest.raises(NotImplementedError, match="transpose has no parameter axes"):
        compat.parameter(last(jnp.transpose, X), "axes")


def test_remat_is_a_primitive_whose_parameter_differentiated_tells_its_backward_pass() -> None:
    remat = jax.checkpoint(jnp.sin)
    assert compat.is_remat(last(remat, X))
    assert not compat.is_differentiated(last(remat, X))
    backward = equations(jax.grad(lambda x: remat(x).sum()), X)
    assert [compat.is_differentiated(x) for x in backward if compat.is_remat(x)] == [True]
    assert not compat.is_differentiated(last(jnp.sin, X))


def test_checkpoint_name_is_an_operation_with_the_name() -> None:
    assert compat.checkpoint_name(last(lambda x: named(x, "hidden"), X)) == "hidden"
    assert compat.checkpoint_name(last(jnp.sin, X)) is None


def test_what_is_moved_to_the_host_is_known_by_its_type() -> None:
    moved = last(lambda x: jax.device_put(x, jax.memory.Space.Host), X)
    assert compat.is_on_host(moved.outvars[0])
    assert not compat.is_on_host(moved.invars[0])


@pytest.mark.parametrize("implementation", ["threefry2x32", "rbg"])
def test_random_numbers_are_drawn_by_known_primitives(implementation: str) -> None:
    key = jax.random.key(0, impl=implementation)
    draws = lambda fn: any(map(compat.draws_random_bits, equations(fn)))
    assert draws(lambda: jax.random.normal(key, (3,)))
    assert draws(jax.jit(lambda: jax.random.normal(key, (3,))))
    assert not draws(lambda: jnp.sin(X))


def test_the_body_of_a_scan_can_be_replaced_and_the_program_runs() -> None:
    scan_of = lambda fn: lambda x: jax.lax.scan(lambda i, row: (i + 1, fn(row)), 0, x)[1]
    sine, cosine = last(scan_of(jnp.sin), X), last(scan_of(jnp.cos), X)
    (body,) = compat.bodies(cosine)
    replaced = compat.replace_bodies(sine, lambda _: body)
    inputs = [x for x in replaced.invars if isinstance(x, compat.Var)]
    program = compat.new_jaxpr(inputs, replaced.outvars[1:], [replaced], name="replaced")
    assert jnp.allclose(compat.jaxpr_as_fun(program)(X)[0], jnp.cos(X))


def test_a_loop_has_no_bodies_and_a_cond_has_its_branches() -> None:
    loop = last(lambda x: jax.lax.while_loop(lambda x: x[0, 0] < 5, lambda x: x + 1, x), X)
    assert not list(compat.bodies(loop))
    cond = last(lambda x: jax.lax.cond(x.sum() > 0, jnp.sin, jnp.cos, x), X)
    assert [names(x) for x in compat.bodies(cond)] == [["cos"], ["sin"]]


def test_custom_derivatives_are_operations_by_name() -> None:
    assert compat.has_own_derivative(last(with_own_tangent, X))
    assert compat.has_own_derivative(last(with_own_backward, X))
    assert not compat.has_own_derivative(last(jax.jit(jnp.sin), X))


def test_equations_know_their_scopes_and_the_lines_they_come_from() -> None:
    def layer(x: jax.Array) -> jax.Array:
        with jax.named_scope("mlp"):
            return jnp.sin(x)

    equation = last(layer, X)
    assert compat.name_stack(equation) == "mlp"
    found = [(file, name) for file, name, _ in compat.frames(equation) if file == __file__]
    assert found[0][1].endswith("layer")


def test_a_jitted_function_is_traced_once_for_each_number_of_a_trace() -> None:
    count = []
    fn = jax.jit(lambda x: count.append(1) or x)
    for _ in range(2):
        jax.eval_shape(fn, X)
    assert len(count) == 1
    first, second = compat.new_trace(), compat.new_trace()
    for number, traces in ((first, 2), (second, 3), (first, 3)):
        with compat.in_trace(number):
            jax.eval_shape(fn, X)
        assert len(count) == traces


def test_the_default_layout_is_the_order_of_the_axes() -> None:
    fn = jax.jit(lambda x: compat.in_default_layout(x.T) + 1)
    assert "LayoutConstraint" in fn.lower(X).as_text()
    assert (fn(X) == 2).all()


def lowered_for(platform_of: Any, *args: Any, platforms: Any = None, **how: Any) -> list[Any]:
    """What `single_platform` says while a program is lowered."""
    found: list[Any] = []
    primitive = compat.Primitive("asks_for_its_platform")

    def lower(ctx: Any, x: Any) -> Any:
        found.append(compat.single_platform(ctx))
        return compat.lower_jaxpr(ctx, jax.make_jaxpr(jnp.sin)(*ctx.avals_in), x)

    primitive.def_abstract_eval(lambda x: x)
    compat.set_lowering(primitive, lower)
    compat.set_batching(primitive, lambda args, axes: (primitive.bind(*args), axes[0]))
    fn = jax.jit(platform_of(primitive.bind), **how)
    fn.trace(*args).lower(lowering_platforms=platforms)
    return found


def test_a_program_of_one_device_is_lowered_for_its_platform() -> None:
    assert lowered_for(lambda bind: bind, X) == ["cpu"]
    assert lowered_for(jax.vmap, X) == ["cpu"]
    assert lowered_for(lambda bind: bind, X, platforms=("tpu",)) == ["tpu"]


def test_a_program_of_two_platforms_is_lowered_for_neither() -> None:
    assert set(lowered_for(lambda bind: bind, X, platforms=("cpu", "tpu"))) == {None}


def test_a_program_for_several_devices_is_lowered_for_none_but_within_a_shard_map() -> None:
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("x")
    sharded = jax.device_put(X, jax.NamedSharding(mesh, spec))
    assert lowered_for(lambda bind: bind, sharded) == [None]
    mapped = lambda bind: jax.shard_map(bind, mesh=mesh, in_specs=spec, out_specs=spec)
    assert lowered_for(mapped, sharded) == ["cpu"]


@pytest.mark.parametrize("wrapped", [lambda fn: fn, jax.vmap])
def test_jit_and_custom_jvp_calls_have_the_names_of_their_functions(wrapped: Any) -> None:
    for fn, name in (
        (jax.nn.silu, "silu"),
        (jax.nn.relu, "relu"),
        (with_own_tangent, "with_own_tangent"),
    ):
        (equation,) = equations(wrapped(fn), X)
        assert compat.called_name(equation) == name
    assert compat.called_name(last(jnp.sin, X)) is None


def test_defaults_of_a_jitted_function_are_no_operands_and_numbers_are_literals() -> None:
    (default,) = equations(jax.nn.leaky_relu, X)
    assert len(default.invars) == 1
    (given,) = equations(lambda x: jax.nn.leaky_relu(x, negative_slope=0.25), X)
    x, slope = given.invars
    assert not isinstance(x, compat.Literal)
    assert isinstance(slope, compat.Literal)
    assert slope.val == 0.25


def test_an_equation_is_bound_to_other_operands_and_put_in_place_of_another() -> None:
    program = jax.make_jaxpr(lambda x: jnp.cos(jnp.sin(x)))(X)
    sin, cos = program.jaxpr.eqns
    (result,) = compat.bind(sin, [jnp.ones(2)])
    assert_close(result, jnp.sin(jnp.ones(2)))
    with compat.context(cos):
        new = compat.in_place_of(cos, sin, [sin.invars[0]])
    assert (new.outvars, compat.primitive_name(new)) == (cos.outvars, "sin")
    assert compat.name_stack(new) == compat.name_stack(cos)
    rewritten = compat.new_jaxpr(program.jaxpr.invars, program.jaxpr.outvars, [new], "sin")
    assert_close(compat.jaxpr_as_fun(rewritten)(X)[0], jnp.sin(X))

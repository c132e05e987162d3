"""An adapter's own state is an ordinary tree: Orbax saves it, and it comes back bit for bit."""

from close import assert_close
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import lowrank_optax as lro
from tests.adapters import methods
from tests.adapters.peft_files import Model, adapted, output

OWN = nnx.Any(lro.adapters.AdapterParam, lro.adapters.AdapterConstant, lro.adapters.AlsoTrained)
METHODS = {**methods.METHODS, "ranks": lro.adapters.LoRA(rank=(1, 3, 2), alpha=5)}
# Kinds of arrays: shared, positions, a bias beside what is trained, scales by rank. Of the other
# methods all arrays are float32 and a layer's own, as those of the last are.
STANDARD = {"VeRA", "SaRA", "FlyLoRA", "ranks"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [x if x in STANDARD else pytest.param(x, marks=pytest.mark.full) for x in METHODS],
)
def test_orbax_keeps_adapters_and_trained_parameters(tmp_path, case):
    model = adapted(True, METHODS[case], "query")
    lro.adapters.also_train(model, "norm")
    scale = model.layers.norm.scale
    scale.set_value(jnp.asarray(np.asarray(scale[...]) + np.float32(0.5)))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "adapter", nnx.to_pure_dict(nnx.state(model, OWN)))
    again = Model(True)
    lro.adapters.attach(again, METHODS[case], "query", rngs=3)
    lro.adapters.also_train(again, "norm")
    assert np.abs(output(again) - output(model)).max() > 1e-2
    state = nnx.state(again, OWN)
    template = jax.tree.map(ocp.utils.to_shape_dtype_struct, nnx.to_pure_dict(state))
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "adapter", template)
    nnx.replace_by_pure_dict(state, restored)
    nnx.update(again, state)
    jax.tree.map(np.testing.assert_array_equal, state, nnx.state(model, OWN))
    assert_close(output(again), output(model), 800)

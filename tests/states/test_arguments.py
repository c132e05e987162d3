"""Whatever wraps an optimizer says so where it is given something else."""

from collections.abc import Callable
from typing import Any

import optax
import pytest

import lowrank_optax as lro

WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "low_bit": lro.low_bit,
    "in_float32": lro.in_float32,
    "update_int8_weights": lro.update_int8_weights,
    "with_gradient_direction": lro.with_gradient_direction,
    "extrapolate": lambda inner: lro.extrapolate(inner, 0.1),
    "scale_by_projection": lambda inner: lro.scale_by_projection(inner, lro.subspaces.svd(2)),
    "galore": lambda inner: lro.galore(0.1, 2, inner=inner),
    "powerprop_updates": lambda inner: lro.layers.powerprop_updates(inner, 2.0),
    "mask_updates": lambda inner: lro.layers.mask_updates(inner, {}),
    "flylora_balance": lro.adapters.flylora_balance,
    "lamda_freezing": lambda inner: lro.adapters.lamda_freezing(inner, 10, 0.3),
    "aflora_freezing": lambda inner: lro.adapters.aflora_freezing(inner, 10, 2, 4),
}


@pytest.mark.distinct
@pytest.mark.parametrize("name", WRAPPERS)
def test_what_is_no_transformation_is_refused(name: str) -> None:
    with pytest.raises(TypeError, match=r"^inner=0.001 must be an optax transformation"):
        WRAPPERS[name](1e-3)
    with pytest.raises(TypeError, match=r"^inner=adam must be .*: call it"):
        WRAPPERS[name](optax.adam)


def test_other_arguments_are_named() -> None:
    with pytest.raises(TypeError, match=r"^optimizer=3 must be an optax transformation"):
        lro.subspaces.online_pca(2, 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^non_matrix_transform=3 must be an optax transformation"):
        lro.scale_by_projection(optax.identity(), lro.subspaces.svd(2), non_matrix_transform=3)  # type: ignore

"""The README's Python runs as it is printed, block after block."""

from pathlib import Path
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

nnx = pytest.importorskip("flax.nnx")
from lowrank_optax.models import Decoder, decoder_config  # noqa: E402

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def loss_fn(model: Any, batch: jax.Array) -> jax.Array:
    logits = model(batch[:, :-1])
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()


@pytest.mark.slow
def test_the_blocks_run_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = decoder_config("llama-tiny", num_attention_heads=2, num_key_value_heads=2, **sizes)
    model = Decoder(config, rngs=nnx.Rngs(0))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    names: dict[str, Any] = {
        "nnx": nnx,
        "model": model,
        "params": params,
        "gradients": jax.tree.map(jnp.ones_like, params),
        "loss_fn": loss_fn,
        "batch": jnp.arange(18).reshape(2, 9),
    }
    assert len(BLOCKS) == 6
    for block in BLOCKS:
        exec(block, names)  # the page is the program
    printed = capsys.readouterr().out
    for expected in ("blocks/mlp/up/kernel", "blocks/attention/query", "few_bit_codes"):
        assert expected in printed
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    assert isinstance(names["optimizer"], nnx.Optimizer)
    after = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    assert jax.tree.structure(after) == jax.tree.structure(params)  # a plain model again

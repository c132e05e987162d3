"""WideNet's vision transformer: image patches through one shared block of experts."""

from collections.abc import Callable

from flax import nnx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lowrank_optax.layers.widenet.expert_routing import Experts
from lowrank_optax.layers.widenet.mixture import RoutingStatistics
from lowrank_optax.layers.widenet.widenet_block import WideNetBlock


class WideNetViT(nnx.Module):
    """A vision transformer whose layers are one shared block with experts.

    Patches are embedded by a convolution. A class token of zeros, which is not trained, comes
    first, and trained position embeddings are added; the mean of all tokens goes through a dense
    layer with tanh to the head.

    Args:
        image_size: side of the square images, in pixels; a multiple of `patch_size`.
        patch_size: side of a patch.
        num_classes: number of classes.
        features: width of the tokens.
        num_heads: heads of attention.
        hidden_features: width of an expert's hidden units.
        num_layers: how often the block is applied.
        experts: number of experts, of which each token takes two, or all options.
        channels: channels of an image.
        activation: nonlinearity of the experts.
        dropout_rate: dropout in the experts, in training.
        remat: whether each application of the block is recomputed in the backward pass.
        dtype: dtype of the computation; None for that of inputs and weights.
        param_dtype: dtype of the weights.
        rngs: source of the initial weights.

    Raises:
        ValueError: `patch_size` does not divide `image_size`, or as `WideNetBlock`.

    Example:
        >>> from flax import nnx
        >>> import jax.numpy as jnp
        >>> from lowrank_optax.models import WideNetViT
        >>> model = WideNetViT(8, 2, 10, 32, 4, 64, num_layers=4, channels=1, rngs=nnx.Rngs(0))
        >>> logits, routing = model(jnp.zeros((5, 8, 8, 1)))
        >>> logits.shape, routing.load.shape
        ((5, 10), (4, 4))

    References:
        Xue et al. 2021, Go Wider Instead of Deeper: https://arxiv.org/abs/2107.11817
    """

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        num_classes: int,
        features: int,
        num_heads: int,
        hidden_features: int,
        num_layers: int,
        experts: int | Experts = 4,
        *,
        channels: int = 3,
        activation: Callable[[jax.Array], jax.Array] = nnx.gelu,
        dropout_rate: float = 0.0,
        remat: bool = False,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        if patch_size < 1 or image_size < 1 or image_size % patch_size:
            raise ValueError(
                f"patch_size must be a positive divisor of image_size={image_size}, got "
                f"{patch_size}"
            )
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        init = {"kernel_init": nnx.initializers.glorot_uniform(), **types}
        patch = (patch_size, patch_size)
        self.embed = nnx.Conv(channels, features, patch, patch, padding="VALID", **init)
        tokens = (image_size // patch_size) ** 2 + 1
        position = nnx.initializers.normal(0.02)(rngs.params(), (tokens, features), param_dtype)
        self.position = nnx.Param(position)
        self.blocks = WideNetBlock(
            features,
            num_heads,
            hidden_features,
            num_layers,
            experts,
            activation=activation,
            dropout_rate=dropout_rate,
            remat=remat,
            **types,
        )
        self.norm = nnx.LayerNorm(features, epsilon=1e-6, **types)
        self.pre_logits = nnx.Linear(features, features, **init)
        self.head = nnx.Linear(features, num_classes, **init)

    def __call__(
        self, images: jax.Array, *, training: bool = False, key: jax.Array | None = None
    ) -> tuple[jax.Array, RoutingStatistics]:
        """The logits of images, and how each layer distributed the tokens.

        Args:
            images: [batch, image_size, image_size, channels].
            training: whether experts have a limited capacity; otherwise no token is dropped.
            key: PRNG key of the routers' noise and of dropout, in training.

        Returns:
            The logits [batch, num_classes], and the statistics of all layers, of which a multiple
            of `balance_loss.sum()`, usually 0.01, is to be added to the loss.
        """
        patches = self.embed(images)
        patches = patches.reshape(len(images), -1, patches.shape[-1])
        x = jnp.pad(patches, [(0, 0), (1, 0), (0, 0)])  # the class token
        x = x + self.position[...].astype(x.dtype)
        x, routing = self.blocks(x, training=training, key=key)
        x = self.norm(x).mean(axis=1)
        return self.head(jnp.tanh(self.pre_logits(x))), routing

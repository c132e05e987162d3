"""LoTR: two factors for all layers of a group, and a small core for each."""

from collections.abc import Callable, Hashable, Sequence
import dataclasses
import re
from typing import ClassVar, Literal, TypeAlias, get_args

import jax
from jax.nn import initializers
import jax.numpy as jnp

from lowrank_optax.adapters.base import AdapterParams, Arrays, Axes, Weights, product
from lowrank_optax.adapters.low_rank import LowRank, difference
from lowrank_optax.adapters.methods.tucker import unfolding_vectors
from lowrank_optax.adapters.spectra import check_power_iterations, values_of

GroupBy: TypeAlias = (
    Literal["shape", "kind", "kind_and_block"] | Callable[[str, tuple[int, int]], Hashable]
)
Share = Literal["both", "input", "output"]
Initial = Literal["scaled", "orthonormal", "normal1", "tucker", "tucker_residual"]
Zero = Literal["core", "A", "B"]
_GROUPS = ("shape", "kind", "kind_and_block")
_OWN = {"both": "core", "input": "B", "output": "A"}  # what each layer has of its own


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoTR(LowRank):
    r"""Low tensor rank: :math:`\Delta W_s = s\,A\,G_s B^\top`, :math:`s = \alpha / r`.

    :math:`A` and :math:`B` are shared by the layers of a group, and each layer has a core
    :math:`G_s` of its own: :math:`r d_{in} + L r^2 + r d_{out}` numbers for ``L`` layers, where
    LoRA trains :math:`L r (d_{in} + d_{out})`.

    Parameters of a group: ``A [d_in, r]`` and ``B [d_out, r]``, and for each stack ``core
    [L, r, r]``. Where one side alone is shared, the other is each layer's own, ``[L, d, r]``, and
    is used instead of the core: :math:`A B_s^\top` or :math:`A_s B^\top`.

    Args:
      rank: The rank ``r``, or one for each layer of a stack: a core's rows and columns beyond have
        no part in anything. Layers of another rank (``rank_pattern``) are a group of their own.
      alpha: The scale is ``alpha / rank``, 1 if None; the official runs have ``alpha=1``.
      group_by: Who shares: ``"shape"``, all layers of one shape, as in the paper, whose runs have
        all queries and values in one group, and with the fewest parameters; ``"kind"``, those of
        one last name, as all ``query``; ``"kind_and_block"``, those of one name at one place of
        the model (encoder and decoder are two), in blocks of ``block_size`` consecutive layers; or
        a function of path and shape, whose equal answers make a group. Layers whose shared sides
        differ in size are always apart.
      block_size: Layers per block of ``"kind_and_block"``: between LoRA's one and all layers.
      share: ``"both"`` sides, ``"input"`` for ``A`` alone, or ``"output"`` for ``B`` alone: layers
        of one group may then differ along the other side, as queries and keys of grouped heads.
      initial: Initial values of ``A`` and ``B``. ``"scaled"``: normal of deviation ``1/sqrt(d)``.
        ``"orthonormal"``: random orthonormal columns. ``"normal1"``: standard normal, the paper's,
        which wants a learning rate some ``sqrt(d_in d_out)`` times smaller. ``"tucker"``: the
        leading singular vectors of the group's weights side by side. ``"tucker_residual"``: these,
        with cores ``Aᵀ W_s B``, while the weights become ``W_s - s A G_s Bᵀ``.
      zero: What is zero at the start, so that the model is unchanged: the ``"core"``, or the factor
        ``"A"`` or ``"B"`` with cores of identity.
      power_iterations: Power iterations of the randomized decomposition of ``"tucker"``, the
        official code's two; None for an exact one.

    Other options, and errors, are those of `LowRank`.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> method, weights = lro.adapters.LoTR(rank=1, alpha=1), jnp.zeros((2, 2, 2))
      >>> params = method.init(jax.random.key(0), weights)
      >>> print({name: x.shape for name, x in params.trainable.items()})
      {'A': (2, 1), 'B': (2, 1), 'core': (2, 1, 1)}
      >>> shared = {"A": jnp.array([[1.0], [2.0]]), "B": jnp.array([[1.0], [-1.0]])}
      >>> print(method.delta({**shared, "core": jnp.array([[3.0]])}, weights[0]))
      [[ 3. -3.]
       [ 6. -6.]]

    Reference:
      Bershatsky et al., LoTR: Low Tensor Rank Weight Adaptation, 2024,
      https://arxiv.org/abs/2402.01376.
    """

    axes: ClassVar[Axes] = {
        "A": ("in", None),
        "B": ("out", None),
        "A_0": ("in", None),
        "B_0": ("out", None),
    }

    group_by: GroupBy = "shape"
    block_size: int = 4
    share: Share = "both"
    initial: Initial = "scaled"
    zero: Zero = "core"
    power_iterations: int | None = 2

    def __post_init__(self) -> None:
        """Checks the options."""
        super().__post_init__()
        if not callable(self.group_by) and self.group_by not in _GROUPS:
            raise ValueError(
                f"group_by={self.group_by!r} must be one of {_GROUPS}, or a function of path and "
                "shape."
            )
        for name, kinds in {"share": Share, "initial": Initial, "zero": Zero}.items():
            value = getattr(self, name)
            if value not in get_args(kinds):
                raise ValueError(f"{name}={value!r} must be one of {get_args(kinds)}.")
        if self.block_size < 1:
            raise ValueError(f"block_size={self.block_size} must be at least 1.")
        check_power_iterations(self.power_iterations)
        if self.changes_base and self.dropout:
            raise ValueError(
                f"dropout={self.dropout!r} must be 0 with initial='tucker_residual': it would drop "
                "a part of the pretrained weight."
            )
        if self.zero != "core" and (self.share != "both" or self.changes_base):
            raise ValueError(
                f"zero={self.zero!r} needs share='both' and another start than "
                "'tucker_residual': with one side shared the other is zero at the start, and with "
                "residual weights nothing is."
            )

    @property
    def shared(self) -> frozenset[str]:
        """``A`` and ``B``, or one of them."""
        return frozenset({"A", "B", "A_0", "B_0"} - {self._own, f"{self._own}_0"})

    @property
    def changes_base(self) -> bool:
        """Where the weights become residuals."""
        return self.initial == "tucker_residual"

    @property
    def _own(self) -> str:
        return _OWN[self.share]

    @property
    def reads_weights(self) -> bool:
        """Where the factors are the weights' own singular vectors."""
        return self.initial.startswith("tucker")

    def group(self, path: str, shape: tuple[int, int]) -> Hashable:
        """By ``group_by``; layers of other ranks or sizes of what is shared are apart."""
        sizes = {"both": shape, "input": shape[:1], "output": shape[1:]}[self.share]
        name, index = layer_of(path)
        by = None
        if callable(self.group_by):
            by = self.group_by(path, shape)
        elif self.group_by == "kind":
            by = name.rsplit("/", 1)[-1]
        elif self.group_by == "kind_and_block":
            by = name, None if index is None else index // self.block_size
        return by, sizes, self.max_rank

    def init_shared(self, key: jax.Array, members: Sequence[Weights]) -> AdapterParams:
        """``A`` and ``B``, or one of them; with a leading axis where stacks are cut into blocks."""
        trainable = {}
        for name, k in zip(("A", "B"), jax.random.split(key), strict=True):
            if name in self.shared:
                trainable[name] = self._side(k, name, members)
        # Copies: the trained ones may be donated to a training step.
        frozen = {f"{name}_0": jnp.copy(x) for name, x in trainable.items() if self.changes_base}
        return AdapterParams(trainable, frozen)

    def init_layers(
        self, key: jax.Array, weights: Weights, shared: Arrays, *, embedding: bool = False
    ) -> AdapterParams:
        """The cores, or each layer's own factor; zero, unless ``initial`` or ``zero`` says else."""
        del key, embedding
        layers, d_in, d_out = weights.shape
        frozen, one = self.rank_scales(layers), next(iter(shared.values()))
        if one.ndim == 3:  # a one where a layer's block is, if the shared factors have blocks
            block = jnp.arange(layers) // self.block_size
            frozen["block"] = jax.nn.one_hot(block, one.shape[0])
        if not self.changes_base:
            rows = {"core": self.max_rank, "A": d_in, "B": d_out}[self._own]
            start = jnp.zeros((rows, self.max_rank), self.param_dtype)
            if self.zero != "core":
                start = jnp.eye(self.max_rank, dtype=self.param_dtype)
            return AdapterParams({self._own: jnp.tile(start, (layers, 1, 1))}, frozen)
        return self._residual(values_of(weights), shared, frozen)

    def factors(self, p: Arrays) -> tuple[jax.Array, jax.Array]:
        """``A`` and ``s G Bᵀ``."""
        return self._factors(p, "")

    def removed_factors(self, p: Arrays) -> tuple[jax.Array, jax.Array] | None:
        """The factors at the start, where the weights became residuals."""
        return self._factors(p, "_0") if self.changes_base else None

    def to_lora(self, p: Arrays) -> tuple[jax.Array, jax.Array]:
        """``A`` and ``s G Bᵀ``; of twice the rank where the weights became residuals."""
        start = self.removed_factors(p)
        return self.factors(p) if start is None else difference(self.factors(p), start)

    def with_layers(self, params: AdapterParams, count: int = 1) -> AdapterParams:
        """Room for ``count`` layers more at the end of the stack, of the last one's block.

        Their update is zero; the shared factors and the other layers stay as they are.

        Raises:
          ValueError: If layers have ranks of their own, or weights became residuals.
        """
        if isinstance(self.rank, tuple) or self.changes_base:
            raise ValueError(
                "layers cannot be added where each has its own rank, or weights became residuals."
            )

        def longer(name: str, x: jax.Array) -> jax.Array:
            if name in self.shared:
                return x
            last = x[-1:] if name == "block" else jnp.zeros_like(x[-1:])
            return jnp.concatenate([x, jnp.repeat(last, count, axis=0)])

        trainable = {name: longer(name, x) for name, x in params.trainable.items()}
        frozen = {name: longer(name, x) for name, x in params.frozen.items()}
        return AdapterParams(trainable, frozen)

    def _factors(self, p: Arrays, end: str) -> tuple[jax.Array, jax.Array]:
        """The factors now (``end=""``), or at the start."""
        side = lambda name: self._of_block(p, name, end).astype(jnp.float32)
        second = side("B").mT
        if self.share == "both":
            core = p["core" + end]
            if "rank_scale" in p:  # the columns; the rows are those of the second factor
                core = jnp.where(p["rank_scale"][..., None, :] == 0, 0, core)
            second = product(core, second)
        return side("A"), self.scaled(p, second)

    def _of_block(self, p: Arrays, name: str, end: str = "") -> jax.Array:
        """A factor; of one shared in blocks, that of the layer's own: where ``block`` is one."""
        x = p[name + end]
        if "block" not in p or name not in self.shared:
            return x
        return jnp.einsum("...n,...ndr->...dr", p["block"], x, precision=jax.lax.Precision.HIGHEST)

    def _side(self, key: jax.Array, name: str, members: Sequence[Weights]) -> jax.Array:
        """A shared factor ``[d, r]``, or ``[blocks, d, r]``."""
        axis = {"A": 1, "B": 2}[name]
        sizes = {m.shape[axis] for m in members}
        if len(sizes) > 1:
            raise ValueError(f"weights that share {name} have sizes {sorted(sizes)} on its side.")
        shape = (sizes.pop(), self.max_rank)
        length = max(m.shape[0] for m in members)
        step = self.block_size if self.group_by == "kind_and_block" else length
        random = initializers.normal(shape[0] ** -0.5 if self.initial == "scaled" else 1.0)
        random = initializers.orthogonal() if self.initial == "orthonormal" else random

        def start(key: jax.Array, layers: slice) -> jax.Array:
            if self.zero == name:
                return jnp.zeros(shape)
            if not self.reads_weights:
                return random(key, shape, jnp.float32)
            stacks = [values_of(m)[layers] for m in members]
            stacks = [x if name == "A" else x.mT for x in stacks if x.shape[0]]
            times = self.power_iterations
            return unfolding_vectors(stacks, shape[1], power_iterations=times, key=key)[0]

        sides = []
        for first in range(0, length, step):
            key, k = jax.random.split(key)
            sides.append(start(k, slice(first, first + step)))
        side = jnp.stack(sides) if len(sides) > 1 else sides[0]
        return side.astype(self.param_dtype)

    def _residual(
        self, weights: jax.Array, shared: Arrays, frozen: dict[str, jax.Array]
    ) -> AdapterParams:
        """The cores of the weights in the shared factors, and the residuals, a layer at a time."""

        def of_layer(inputs: tuple[jax.Array, Arrays]) -> tuple[jax.Array, jax.Array]:
            w, p = inputs[0], {**shared, **inputs[1]}
            x = product(w, self._of_block(p, "B")) if "B" in self.shared else w
            x = product(self._of_block(p, "A").T, x) if "A" in self.shared else x
            x = (x.T if self.share == "input" else x).astype(self.param_dtype)
            removed = product(*self.factors({**p, self._own: x}))
            return x, (w.astype(jnp.float32) - removed).astype(w.dtype)

        x, base = jax.lax.map(of_layer, (weights, frozen))
        return AdapterParams({self._own: x}, {**frozen, f"{self._own}_0": jnp.copy(x)}, base)


def layer_of(path: str) -> tuple[str, int | None]:
    """A layer's path without the numbers of layers, and the first of these.

    So a layer has the same name in a stack run by a scan and in a list. In Linen numbers hang on
    names: of these the first alone is dropped, since ``Dense_0`` and ``Dense_1`` in one block are
    two kinds of layers. A weight's path is that of its layer.

    Example:
      >>> layer_of("blocks/3/attention/query"), layer_of("blocks/attention/query")
      (('blocks/attention/query', 3), ('blocks/attention/query', None))
      >>> layer_of("layers_3/Dense_1")
      ('layers/Dense_1', 3)
    """
    index, names = None, []
    for name in re.sub(r"/(kernel|embedding|weight|w)$", "", path).split("/"):
        found = re.fullmatch(r"(?:(.+)_)?(\d+)", name)
        if found is None or (index is not None and found[1]):
            names.append(name)
            continue
        index = int(found[2]) if index is None else index
        if found[1]:
            names.append(found[1])
    return "/".join(names), index

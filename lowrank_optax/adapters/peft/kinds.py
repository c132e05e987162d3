"""Kinds of PEFT's adapters that are only folded into weights.

A kind says the shapes of its tensors and what it makes of a weight. To add one, write its class and
list it in `parsing`; the names of its tensors go to `tensors`. Kinds that are attached too are in
`attached_kinds`.
"""

import abc
from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import math
import re
from typing import TYPE_CHECKING, Any, ClassVar
import warnings

import numpy as np

from lowrank_optax.adapters.peft.config import (
    HARMLESS_OF_LORA,
    MERGE_IN_PEFT,
    BaseConfig,
    Names,
    Selection,
    UnsupportedConfigError,
    as_tuple,
    by_pattern,
)
from lowrank_optax.storage.fields import (
    BOOLEAN,
    NULL,
    NUMBER,
    PATTERN,
    POSITIVE_NUMBER,
    TEXT,
    Kind,
    choice,
    integer,
    list_of,
    mapping_to,
)

if TYPE_CHECKING:
    from lowrank_optax.adapters.peft.tensors import Layout

Shapes = dict[str, tuple[int, ...]]
Arrays = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FoldedConfig(BaseConfig):
    """An adapter_config.json of a kind that is folded into the weights.

    Weights are ``[d_in, d_out]`` and all arrays float32; tensors have PyTorch's shapes.
    """

    @property
    def needs_base(self) -> str:
        """The kind: most tensors do not show the sizes of the layer."""
        return f"peft_type={self.peft_type!r}"

    def layer_shapes(self, module: str, layout: "Layout") -> Shapes:
        """The shapes for a linear layer; see `BaseConfig.layer_shapes`."""
        if layout.kind != "linear":
            raise UnsupportedConfigError(
                f"peft_type={self.peft_type!r} of {module}, which is not a linear layer: "
                f"unsupported. {MERGE_IN_PEFT}"
            )
        return self.shapes(module, layout.d_in, layout.d_out)

    @abc.abstractmethod
    def shapes(self, module: str, d_in: int, d_out: int) -> Shapes:
        """Names and PyTorch's shapes of the tensors of a linear layer's adapter."""

    def factors(
        self, module: str, tensors: Arrays, d_in: int, d_out: int
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """``[d_in, r]`` and ``[r, d_out]``, whose product is the change; None if it has no such."""
        del module, tensors, d_in, d_out
        return None

    def folded(self, module: str, tensors: Arrays, weight: np.ndarray) -> np.ndarray:
        """The weight with the adapter folded in."""
        factors = self.factors(module, tensors, *weight.shape)
        if factors is None:
            raise NotImplementedError(f"{type(self).__name__} defines neither factors nor folded.")
        return weight + factors[0] @ factors[1]

    def changes_bias(self, module: str) -> bool:
        """Whether the layer's bias is changed too, by `folded_bias`."""
        del module
        return False

    def folded_bias(self, tensors: Arrays, bias: np.ndarray) -> np.ndarray:
        """The bias ``[d_out]`` with the adapter folded in."""
        del tensors
        return bias


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaLoRA(FoldedConfig):
    r"""``W + A diag(e) B alpha / (init_r + 1e-5)``, of as many directions as training has left.

    ``init_r`` stays in the scale when directions are pruned. ``rank_pattern`` has for each layer
    which of them are left, and the file has these alone.
    """

    peft_type = "ADALORA"
    field_kinds: ClassVar = {
        **BaseConfig.field_kinds,
        "init_r": integer(1),
        "lora_alpha": POSITIVE_NUMBER,
        "rank_pattern": mapping_to(TEXT, list_of(BOOLEAN)) | NULL,
        "bias": choice("none", "all", "lora_only"),
    }
    harmless = (
        BaseConfig.harmless
        | HARMLESS_OF_LORA
        | {
            "r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight",
            "total_step", "lora_dropout", "use_rslora", "use_dora", "init_lora_weights",
        }
    )  # fmt: skip

    init_r: int = 12
    lora_alpha: float = 8
    rank_pattern: Mapping[str, list[bool]] | None = None
    bias: str = "none"

    @classmethod
    def refused(cls, content: Mapping[str, Any]) -> list[str]:
        """DoRA, which PEFT refuses too."""
        dora = content.get("use_dora")
        return super().refused(content) + [f"use_dora={dora!r} (of AdaLoRA)"] * bool(dora)

    @property
    def needs_base(self) -> str:
        """Nothing."""
        return ""

    def selections(self, layers: Sequence[str], targets: Sequence[str]) -> Iterator[Selection]:
        """``rank_pattern`` has the names of tensors."""
        del layers
        yield Selection("rank_pattern", self.rank_pattern or {}, self._is_of, targets)

    def shapes(self, module: str, d_in: int, d_out: int) -> Shapes:
        """``A``, ``B`` and ``E`` of the directions that are left."""
        kept = (x for name, x in (self.rank_pattern or {}).items() if self._is_of(module, name))
        r = sum(next(kept, [True] * self.init_r))
        return {"lora_A": (r, d_in), "lora_B": (d_out, r), "lora_E": (r, 1)}

    def factors(
        self, module: str, tensors: Arrays, d_in: int, d_out: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """``A^T`` and the scaled ``diag(e) B^T``; where no direction is left, one of zeros."""
        del module
        scale = np.float32(self.lora_alpha / (self.init_r + 1e-5))
        if not len(tensors["lora_E"]):
            return np.zeros((d_in, 1), np.float32), np.zeros((1, d_out), np.float32)
        return tensors["lora_A"].T, scale * tensors["lora_E"] * tensors["lora_B"].T

    @staticmethod
    def _is_of(module: str, name: str) -> bool:
        """Whether a name in ``rank_pattern`` is that of a module's ``E``."""
        return name.replace(".default", "") == f"{module}.lora_E"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Lycoris(FoldedConfig):
    """LoHa and LoKr: a change of full shape, scaled by ``alpha / r``."""

    field_kinds: ClassVar = {
        **BaseConfig.field_kinds,
        "r": integer(1),
        "alpha": NUMBER,
        "rank_pattern": mapping_to(PATTERN, integer(1)) | NULL,
        "alpha_pattern": mapping_to(PATTERN, NUMBER) | NULL,
    }
    # How convolutions are decomposed does not concern linear layers.
    harmless = BaseConfig.harmless | {
        "rank_dropout", "module_dropout", "rank_dropout_scale", "init_weights",
        "use_effective_conv2d",
    }  # fmt: skip
    pattern_fields = ("rank_pattern", "alpha_pattern")

    r: int = 8
    alpha: float = 8
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def rank_of(self, module: str) -> int:
        """The rank of a module's adapter."""
        return by_pattern(module, self.rank_pattern, self.r)

    @abc.abstractmethod
    def unscaled(self, tensors: Arrays) -> np.ndarray:
        """The change ``[d_out, d_in]`` at scale 1."""

    def folded(self, module: str, tensors: Arrays, weight: np.ndarray) -> np.ndarray:
        """See `FoldedConfig.folded`."""
        alpha = by_pattern(module, self.alpha_pattern, self.alpha)
        return weight + np.float32(alpha / self.rank_of(module)) * self.unscaled(tensors).T


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoHa(_Lycoris):
    """The elementwise product of two products of thin factors."""

    peft_type = "LOHA"

    def shapes(self, module: str, d_in: int, d_out: int) -> Shapes:
        """Two pairs of factors."""
        r = self.rank_of(module)
        return {f"hada_w{i}_{x}": s for i in "12" for x, s in (("a", (d_out, r)), ("b", (r, d_in)))}

    def unscaled(self, tensors: Arrays) -> np.ndarray:
        """See `_Lycoris.unscaled`."""
        first, second = (tensors[f"hada_w{i}_a"] @ tensors[f"hada_w{i}_b"] for i in "12")
        return first * second


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoKr(_Lycoris):
    """The Kronecker product of two matrices, each of which may be a product of thin factors."""

    peft_type = "LOKR"
    field_kinds: ClassVar = {
        **_Lycoris.field_kinds,
        "decompose_both": BOOLEAN,
        "decompose_factor": Kind(
            "-1 or a positive integer", lambda x: x == -1 or integer(1).holds(x)
        ),
    }

    decompose_both: bool = False
    decompose_factor: int = -1

    def shapes(self, module: str, d_in: int, d_out: int) -> Shapes:
        """``w1`` and ``w2``, or ``w1_a, w1_b`` where the rank is below half of its larger side."""
        r, shapes = self.rank_of(module), {}
        sides = zip(
            two_factors(d_out, self.decompose_factor),
            two_factors(d_in, self.decompose_factor),
            strict=True,
        )
        for number, (rows, columns) in enumerate(sides, 1):
            name, thin = f"lokr_w{number}", r < max(rows, columns) / 2
            if thin and (number == 2 or self.decompose_both):
                shapes |= {f"{name}_a": (rows, r), f"{name}_b": (r, columns)}
            else:
                shapes[name] = (rows, columns)
        return shapes

    def unscaled(self, tensors: Arrays) -> np.ndarray:
        """See `_Lycoris.unscaled`."""
        first, second = (
            tensors[name] if name in tensors else tensors[f"{name}_a"] @ tensors[f"{name}_b"]
            for name in ("lokr_w1", "lokr_w2")
        )
        return np.kron(first, second)


def two_factors(size: int, factor: int) -> tuple[int, int]:
    """Two numbers whose product is ``size``, as LyCORIS has them.

    ``(factor, size / factor)`` if the factor divides it. Else the smaller number is the largest
    divisor that is at most the square root, and at most the factor unless that is -1.

    Example:
      >>> [two_factors(d, -1) for d in (12, 18, 127)], two_factors(128, 4), two_factors(20, 3)
      ([(3, 4), (3, 6), (1, 127)], (4, 32), (2, 10))
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = math.isqrt(size) if factor == -1 else min(math.isqrt(size), factor)
    smaller = next(d for d in range(limit, 0, -1) if size % d == 0)
    return smaller, size // smaller


@dataclasses.dataclass(frozen=True, kw_only=True)
class IA3(FoldedConfig):
    """Scales of a layer's outputs (and bias), or of its inputs in ``feedforward_modules``."""

    peft_type = "IA3"
    field_kinds: ClassVar = {
        **BaseConfig.field_kinds,
        "feedforward_modules": PATTERN | list_of(TEXT),
    }
    harmless = BaseConfig.harmless | {"init_ia3_weights"}

    feedforward_modules: Names = ()

    @classmethod
    def wrong(cls, content: Mapping[str, Any]) -> list[str]:
        """Also if it leaves it to PEFT which modules are feed-forward."""
        missing = ["feedforward_modules is missing"] * ("feedforward_modules" not in content)
        return super().wrong(content) + missing

    def selections(self, layers: Sequence[str], targets: Sequence[str]) -> Iterator[Selection]:
        """Also layers that are not adapted: PEFT writes its own names where a user gives none."""
        yield from super().selections(layers, targets)
        names = as_tuple(self.feedforward_modules or ())
        yield Selection("feedforward_modules", names, self._is_feedforward, layers)

    def changes_bias(self, module: str) -> bool:
        """Whether outputs are scaled."""
        names = as_tuple(self.feedforward_modules or ())
        return not any(self._is_feedforward(module, name) for name in names)

    def _is_feedforward(self, module: str, name: str) -> bool:
        """Whether a name means a module: by PEFT's rule ends of names, not whole parts of them."""
        if isinstance(self.feedforward_modules, str):
            return re.fullmatch(name, module) is not None
        return module.endswith(name)

    def shapes(self, module: str, d_in: int, d_out: int) -> Shapes:
        """One scale for each output or input."""
        return {"ia3_l": (d_out, 1) if self.changes_bias(module) else (1, d_in)}

    def folded(self, module: str, tensors: Arrays, weight: np.ndarray) -> np.ndarray:
        """See `FoldedConfig.folded`."""
        del module
        return weight * tensors["ia3_l"].T

    def folded_bias(self, tensors: Arrays, bias: np.ndarray) -> np.ndarray:
        """See `FoldedConfig.folded_bias`."""
        return bias * tensors["ia3_l"].reshape(-1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OFT(FoldedConfig):
    """``R W`` with ``R`` of orthogonal blocks: Cayley's transform of skew matrices ``Q``.

    PEFT has two forms, of opposite sign: a truncated series of ``(I + Q) (I - Q)^-1``, and
    ``(I - Q) (I + Q)^-1`` itself without ``use_cayley_neumann``. Each is folded as PEFT computes
    it.
    """

    peft_type = "OFT"
    field_kinds: ClassVar = {
        **BaseConfig.field_kinds,
        "r": integer(0),
        "oft_block_size": integer(0),
        "coft": BOOLEAN,
        "eps": POSITIVE_NUMBER,
        "block_share": BOOLEAN,
        "use_cayley_neumann": BOOLEAN,
        "num_cayley_neumann_terms": integer(1),
        "bias": choice("none", "all", "oft_only"),
    }
    harmless = BaseConfig.harmless | {"module_dropout", "init_weights"}

    r: int = 0
    oft_block_size: int = 32
    coft: bool = False
    eps: float = 6e-5
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = 5
    bias: str = "none"

    def __post_init__(self) -> None:
        """Warns of files whose last term PEFT has changed since."""
        version = [int(n) for n in re.findall(r"\d+", str(self.others.get("peft_version")))]
        if self.use_cayley_neumann and version[:2] < [0, 18]:
            warnings.warn(
                "this OFT adapter was written before PEFT 0.18, which changed the last term of "
                "use_cayley_neumann: it is computed as PEFT computes it now.",
                stacklevel=4,
            )

    @classmethod
    def refused(cls, content: Mapping[str, Any]) -> list[str]:
        """Files of PEFT before 0.14, whose parameters are others."""
        old = ["no oft_block_size (a file of PEFT before 0.14)"]
        return super().refused(content) + old * ("oft_block_size" not in content)

    @classmethod
    def wrong(cls, content: Mapping[str, Any]) -> list[str]:
        """Also if not one of number and size of the blocks is given."""
        wrong, given = (
            super().wrong(content),
            {k: content.get(k, 0) for k in ("r", "oft_block_size")},
        )
        if not wrong and (given["r"] == 0) == (given["oft_block_size"] == 0):
            wrong.append(f"one of r={given['r']} and oft_block_size={given['oft_block_size']} is 0")
        return wrong

    def block_size(self, d_in: int) -> int:
        """The size of a block; PEFT takes the nearest divisor, the smaller one of two."""
        wanted = self.r or self.oft_block_size
        divisors = [d for d in range(1, d_in + 1) if d_in % d == 0]
        nearest = min(divisors, key=lambda d: (abs(d - wanted), d))
        return d_in // nearest if self.r else nearest

    def shapes(self, module: str, d_in: int, d_out: int) -> Shapes:
        """The strict upper triangle of each ``Q``, or of the one that blocks share."""
        del module, d_out
        size = self.block_size(d_in)
        blocks = 1 if self.block_share else d_in // size
        return {"oft_R.weight": (blocks, size * (size - 1) // 2)}

    def rotations(self, upper: np.ndarray, size: int) -> np.ndarray:
        """The blocks of ``R``, ``[blocks, size, size]``."""
        q = np.zeros((len(upper), size, size), np.float32)
        q[:, *np.triu_indices(size, 1)] = upper
        q -= q.swapaxes(1, 2)
        if self.coft:
            norm = np.sqrt(np.sum(q * q, axis=(1, 2), keepdims=True))
            limit = np.float32(self.eps / math.sqrt(len(upper)))
            q = np.where(norm <= limit, q, limit * q / np.maximum(norm, limit))
        identity, terms = np.eye(size, dtype=np.float32), self.num_cayley_neumann_terms
        if not self.use_cayley_neumann:
            # Of commuting matrices: (I - Q) (I + Q)^-1 = (I + Q)^-1 (I - Q).
            return np.linalg.solve(identity + q, identity - q)
        # Three terms are four in PEFT. The last of more than two has weight 1.
        total, power = np.broadcast_to(identity, q.shape), identity
        for exponent in range(1, terms if terms < 3 else max(terms, 4)):
            power = power @ q
            is_last = exponent > 1 and exponent == max(terms, 4) - 1
            total = total + (1 if is_last else 2) * power
        return total

    def folded(self, module: str, tensors: Arrays, weight: np.ndarray) -> np.ndarray:
        """See `FoldedConfig.folded`."""
        del module
        d_in, d_out = weight.shape
        size = self.block_size(d_in)
        rotations = self.rotations(tensors["oft_R.weight"], size)
        return (rotations @ weight.reshape(-1, size, d_out)).reshape(d_in, d_out)

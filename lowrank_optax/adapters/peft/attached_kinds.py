"""Kinds of PEFT's adapters beside LoRA that are attached to a model, and written from it.

To add one, write its class with both directions, and list it in `ATTACHED_KINDS`; the names of its
tensors go to `tensors`.
"""

import abc
from collections.abc import Iterable, Mapping, Sequence
import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

import jax.numpy as jnp
import numpy as np

from lowrank_optax.adapters import base
from lowrank_optax.adapters.methods import miss, randlora, vera
from lowrank_optax.adapters.peft.config import AttachedConfig, BaseConfig
from lowrank_optax.adapters.peft.kinds import Arrays, FoldedConfig, Shapes
from lowrank_optax.storage.fields import BOOLEAN, FRACTION, NUMBER, choice, integer

if TYPE_CHECKING:
    from lowrank_optax.adapters.peft.tensors import Layout


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttachedKind(FoldedConfig, AttachedConfig):
    """An adapter_config.json of a kind that is attached, and written by `save_peft`.

    `fields_of`, `tensors_of` and `shared_tensors_of` are the inverses of `method`, `arrays` and
    `shared_arrays`.
    """

    methods: ClassVar[tuple[type[base.Adapter], ...]]
    """Methods that are written as this kind."""
    limits: ClassVar[str]
    """What PEFT has of it, for the message where an adapter is more than that."""
    bias_only: ClassVar[str]
    """Value of ``bias`` if the adapted layers alone have trained biases."""
    written: ClassVar[Mapping[str, Any]] = {}
    """Further fields of every file."""

    r: int
    bias: str = "none"

    def rank_of(self, module: str) -> int:
        """The rank, which is that of all modules."""
        del module
        return self.r

    @classmethod
    @abc.abstractmethod
    def fields_of(cls, method: Any) -> dict[str, Any] | None:
        """The fields of the file that say the method; None if PEFT does not have it."""

    @classmethod
    @abc.abstractmethod
    def tensors_of(cls, p: base.Arrays) -> dict[str, np.ndarray]:
        """The tensors of one layer from its arrays, float32."""

    @classmethod
    def shared_tensors_of(
        cls, layouts: Sequence["Layout"], groups: Sequence[base.Arrays]
    ) -> dict[str, np.ndarray] | None:
        """The tensors that all layers share, float32; None if PEFT cannot hold them.

        Args:
          layouts: Layouts of all layers.
          groups: Arrays of one layer of each group.
        """
        del layouts, groups
        return {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MiSS(AttachedKind):
    """A block of ``r`` rows that is added to the weight again and again; "bat" depends on it."""

    peft_type, tensor = "MISS", "miss_block"
    methods = (miss.MiSS, miss.MiSSBat)
    limits = (
        "PEFT has MiSS of linear layers only, and one file holds one rank and one mini_rank of "
        "MiSS, or one rank of MiSSBat with side='out'"
    )
    bias_only = "MiSS_only"
    field_kinds: ClassVar = {
        **BaseConfig.field_kinds,
        "r": integer(1),
        "mini_r": integer(1),
        "miss_dropout": FRACTION,
        "init_weights": BOOLEAN | choice("bat", "mini"),
        "bias": choice("none", "all", "MiSS_only", "miss_only", "bone_only"),
    }

    r: int = 64
    mini_r: int = 1
    miss_dropout: float = 0.0
    init_weights: bool | str = True

    @property
    def may_skip_layers(self) -> bool:
        """See `AttachedConfig.may_skip_layers`."""
        return False

    def method(self) -> miss.MiSS | miss.MiSSBat:
        """The method that the file holds. PEFT drops no inputs of "bat"."""
        if self.init_weights == "bat":
            return miss.MiSSBat(rank=self.r)
        mini_rank = self.mini_r if self.init_weights == "mini" else None
        return miss.MiSS(rank=self.r, mini_rank=mini_rank, dropout=self.miss_dropout)

    def arrays(self, layout: "Layout", tensors: Arrays) -> dict[str, np.ndarray]:
        """The block, float32, by its name in the method."""
        del layout
        name = "mini" if self.init_weights == "mini" else "D"
        return {name: tensors[self.tensor].astype(np.float32)}

    @classmethod
    def fields_of(cls, method: miss.MiSS | miss.MiSSBat) -> dict[str, Any] | None:
        """See `AttachedKind.fields_of`."""
        if isinstance(method, miss.MiSSBat):
            return {"r": method.rank, "init_weights": "bat"} if method.side == "out" else None
        fields = {"r": method.max_rank, "miss_dropout": method.dropout}
        if method.mini_rank is None:
            return fields | {"init_weights": True}
        return fields | {"init_weights": "mini", "mini_r": method.mini_rank}

    @classmethod
    def tensors_of(cls, p: base.Arrays) -> dict[str, np.ndarray]:
        """See `AttachedKind.tensors_of`."""
        return {cls.tensor: _float32(p["D" if "D" in p else "mini"])}

    def shapes(self, module: str, d_in: int, d_out: int) -> Shapes:
        """The block; of "bat" one for each ``r`` outputs."""
        if self.r > d_in:
            raise ValueError(f"r={self.r} of {module} must be at most its {d_in} inputs.")
        if self.init_weights == "bat" and (d_in % self.r or d_out % self.r):
            raise ValueError(
                f"r={self.r} of {module} with init_weights='bat' must divide its {d_in} inputs and "
                f"{d_out} outputs."
            )
        if self.init_weights == "mini" and d_out % self.mini_r:
            raise ValueError(f"mini_r={self.mini_r} of {module} must divide its {d_out} outputs.")
        forms = {"bat": (d_out // self.r, self.r, self.r), "mini": (self.r, self.mini_r)}
        return {self.tensor: forms.get(str(self.init_weights), (self.r, d_out))}

    def factors(
        self, module: str, tensors: Arrays, d_in: int, d_out: int
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Which row of the block each input has, and the block."""
        del module
        if self.init_weights == "bat":
            return None
        rows = np.eye(self.r, dtype=np.float32)[np.arange(d_in) % self.r]
        block = tensors[self.tensor]
        return rows, np.tile(block, (1, d_out // block.shape[1]))

    def folded(self, module: str, tensors: Arrays, weight: np.ndarray) -> np.ndarray:
        """See `FoldedConfig.folded`."""
        if self.init_weights != "bat":
            return super().folded(module, tensors, weight)
        (d_in, d_out), r, block = weight.shape, self.r, tensors[self.tensor].swapaxes(1, 2)
        blocks = weight.reshape(d_in // r, r, d_out // r, r).swapaxes(1, 2)
        return weight + (block @ blocks + block).swapaxes(1, 2).reshape(d_in, d_out)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bone(MiSS):
    """MiSS by its old name, which PEFT does not read any more; it is written as MiSS."""

    peft_type, tensor = "BONE", "bone_block"
    methods = ()


class _Projected(AttachedKind):
    """VeRA and RandLoRA: random arrays that all layers share, of which each takes the first rows.

    The arrays are those of PyTorch's generator, so they must be in the file.
    """

    written: ClassVar = {"save_projection": True}

    @classmethod
    def refused(cls, content: Mapping[str, Any]) -> list[str]:
        """Also files without the random arrays."""
        refused = super().refused(content)
        if not content.get("save_projection", True):
            refused.append(
                f"save_projection={content['save_projection']!r} (PyTorch's generator makes the "
                "random projections, so only a file that has them can be read)"
            )
        return refused


@dataclasses.dataclass(frozen=True, kw_only=True)
class VeRA(_Projected):
    """``W + A diag(d) B diag(b)`` with ``A`` and ``B`` of the largest sizes."""

    peft_type = "VERA"
    methods = (vera.VeRA,)
    limits = (
        "PEFT has VeRA of linear layers only, of one rank and with one pair of projections for all "
        "layers, of which each reads the beginning"
    )
    bias_only = "vera_only"
    field_kinds: ClassVar = {
        **BaseConfig.field_kinds,
        "r": integer(1),
        "vera_dropout": FRACTION,
        "bias": choice("none", "all", "vera_only"),
    }
    harmless = BaseConfig.harmless | {
        "projection_prng_key", "save_projection", "d_initial", "init_weights",
    }  # fmt: skip

    r: int = 256
    vera_dropout: float = 0.0

    def method(self) -> vera.VeRA:
        """The method that the file holds."""
        return vera.VeRA(rank=self.r, dropout=self.vera_dropout)

    def arrays(self, layout: "Layout", tensors: Arrays) -> dict[str, np.ndarray]:
        """The two vectors, float32, by their names in the method."""
        del layout
        return {x: tensors[f"vera_lambda_{x}"].astype(np.float32) for x in ("d", "b")}

    def shared_arrays(self, layout: "Layout", tensors: Arrays) -> dict[str, np.ndarray]:
        """What layers of this layout read of the projections, as `arrays`."""
        a, b = (tensors[f"vera_{x}"].astype(np.float32) for x in "AB")
        return {"A": a[:, : layout.d_in].T, "B": b[: layout.d_out].T}

    @classmethod
    def fields_of(cls, method: vera.VeRA) -> dict[str, Any]:
        """See `AttachedKind.fields_of`."""
        return {"r": method.max_rank, "vera_dropout": method.dropout}

    @classmethod
    def tensors_of(cls, p: base.Arrays) -> dict[str, np.ndarray]:
        """The two vectors; directions beyond the layer's own rank are zero."""
        d, b = _float32(p["d"]), _float32(p["b"])
        if "rank_scale" in p:
            d = np.where(np.asarray(p["rank_scale"]) != 0, d, 0)
        return {"vera_lambda_d": d, "vera_lambda_b": b}

    @classmethod
    def shared_tensors_of(
        cls, layouts: Sequence["Layout"], groups: Sequence[base.Arrays]
    ) -> dict[str, np.ndarray] | None:
        """The largest projections, if those of each group are their beginning."""
        del layouts
        firsts, seconds = ([_float32(p[x]).T for p in groups] for x in "AB")
        a, b = max(firsts, key=lambda x: x.shape[1]), max(seconds, key=len)
        agree = all((a[:, : x.shape[1]] == x).all() for x in firsts)
        agree = agree and all((b[: len(x)] == x).all() for x in seconds)
        return {"vera_A": a, "vera_B": b} if agree else None

    def shapes(self, module: str, d_in: int, d_out: int) -> Shapes:
        """Two vectors."""
        del module, d_in
        return {"vera_lambda_d": (self.r,), "vera_lambda_b": (d_out,)}

    def shared_shapes(self, layouts: Iterable["Layout"]) -> Shapes:
        """The projections, of the most inputs and the most outputs."""
        d_in, d_out = _largest(layouts)
        return {"vera_A": (self.r, d_in), "vera_B": (d_out, self.r)}

    def factors(
        self, module: str, tensors: Arrays, d_in: int, d_out: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """``A diag(d)`` and ``B diag(b)``."""
        del module
        a = tensors["vera_A"][:, :d_in] * tensors["vera_lambda_d"][:, None]
        return a.T, tensors["vera_B"][:d_out].T * tensors["vera_lambda_b"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandLoRA(_Projected):
    """A sum of products of scaled random bases, of full rank."""

    peft_type = "RANDLORA"
    methods = (randlora.RandLoRA,)
    limits = "PEFT has RandLoRA of linear layers only, and one file holds one rank and one alpha"
    bias_only = "randlora_only"
    field_kinds: ClassVar = {
        **BaseConfig.field_kinds,
        "r": integer(1),
        "randlora_alpha": NUMBER,
        "randlora_dropout": FRACTION,
        "sparse": BOOLEAN,
        "very_sparse": BOOLEAN,
        "bias": choice("none", "all", "randlora_only"),
    }
    harmless = BaseConfig.harmless | {"projection_prng_key", "save_projection", "init_weights"}

    r: int = 32
    randlora_alpha: float = 640
    randlora_dropout: float = 0.0
    sparse: bool = False
    very_sparse: bool = False

    @property
    def may_skip_layers(self) -> bool:
        """See `AttachedConfig.may_skip_layers`."""
        return False

    def method(self) -> randlora.RandLoRA:
        """The method that the file holds. If both of its kinds of bases are set, PEFT takes one."""
        sparse = "sparse" if self.sparse else "dense"
        return randlora.RandLoRA(
            rank=self.r,
            alpha=self.randlora_alpha,
            dropout=self.randlora_dropout,
            bases="very_sparse" if self.very_sparse else sparse,
        )

    def arrays(self, layout: "Layout", tensors: Arrays) -> dict[str, np.ndarray]:
        """The scales, float32, by their names in the method."""
        del layout
        return {x: tensors[f"randlora_{x}"].astype(np.float32) for x in ("lambda", "gamma")}

    def shared_arrays(self, layout: "Layout", tensors: Arrays) -> dict[str, np.ndarray]:
        """The bases of all layers, as `arrays`."""
        del layout
        return {x: tensors[f"randlora_{x}"].astype(np.float32) for x in "AB"}

    @classmethod
    def fields_of(cls, method: randlora.RandLoRA) -> dict[str, Any]:
        """See `AttachedKind.fields_of`."""
        return {
            "r": method.rank,
            "randlora_alpha": 20 * method.rank if method.alpha is None else method.alpha,
            "randlora_dropout": method.dropout,
            "sparse": method.bases == "sparse",
            "very_sparse": method.bases == "very_sparse",
        }

    @classmethod
    def tensors_of(cls, p: base.Arrays) -> dict[str, np.ndarray]:
        """See `AttachedKind.tensors_of`."""
        return {f"randlora_{x}": _float32(p[x]) for x in ("lambda", "gamma")}

    @classmethod
    def shared_tensors_of(
        cls, layouts: Sequence["Layout"], groups: Sequence[base.Arrays]
    ) -> dict[str, np.ndarray]:
        """The bases in PEFT's sizes. What is added to ours is zero, and no layer reads it."""
        (p,) = groups  # of one rank
        tensors = {}
        for name, shape in cls(r=len(p["A"])).shared_shapes(layouts).items():
            x = _float32(p[name[-1]])
            both = tuple(slice(min(sizes)) for sizes in zip(x.shape, shape, strict=True))
            tensors[name] = np.zeros(shape, np.float32)
            tensors[name][both] = x[both]
        return tensors

    def shapes(self, module: str, d_in: int, d_out: int) -> Shapes:
        """Scales of the bases, and of their smaller side."""
        del module
        smaller = min(d_in, d_out)
        bases = -(-smaller // self.r)
        return {"randlora_lambda": (self.r, bases), "randlora_gamma": (bases, smaller)}

    def shared_shapes(self, layouts: Iterable["Layout"]) -> Shapes:
        """The bases, of the most inputs and the most outputs."""
        smaller, larger = sorted(_largest(layouts))
        bases = -(-smaller // self.r)
        return {"randlora_A": (self.r, 1, smaller), "randlora_B": (larger, bases, self.r)}

    def folded(self, module: str, tensors: Arrays, weight: np.ndarray) -> np.ndarray:
        """See `FoldedConfig.folded`.

        PEFT flattens the two bases in different orders, which is part of the method.
        """
        del module
        smaller, larger = sorted(weight.shape)
        scales, gamma = tensors["randlora_lambda"], tensors["randlora_gamma"]
        first = scales[:, :, None] * tensors["randlora_A"][:, :, :smaller] * gamma
        second = tensors["randlora_B"][:larger, : len(gamma)].reshape(larger, -1)
        change = second @ first.reshape(-1, smaller)
        is_wide = weight.shape[0] == smaller
        return weight + np.float32(self.randlora_alpha / self.r) * (change.T if is_wide else change)


ATTACHED_KINDS: tuple[type[AttachedKind], ...] = (MiSS, Bone, VeRA, RandLoRA)


def kind_of(method: base.Adapter) -> type[AttachedKind] | None:
    """The kind that a method is written as; None if it is written as a LoRA."""
    return next((kind for kind in ATTACHED_KINDS if type(method) in kind.methods), None)


def _float32(x: Any) -> np.ndarray:
    return np.asarray(x.astype(jnp.float32))


def _largest(layouts: Iterable["Layout"]) -> tuple[int, int]:
    """The most inputs and the most outputs."""
    d_in, d_out = zip(*((x.d_in, x.d_out) for x in layouts), strict=True)
    return max(d_in), max(d_out)

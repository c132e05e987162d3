"""NNX modules whose graph definition depends on the context in which they are flattened."""

from collections.abc import Hashable, Iterable
from typing import Any

from flax import nnx

_KEY = "traced_in"


class ContextModule(nnx.Module):
    """A module with one more static attribute, which is computed whenever it is flattened.

    A function that NNX or JAX has compiled for a module is found again by the module's graph
    definition (or tree definition). One that closes over something must not be found again for
    something else; what it closes over is the module's `context`. Nothing is written to the module,
    so threads do not see each other's contexts.
    """

    traced_in: Hashable = None

    def __init__(self) -> None:
        self.traced_in = None

    def context(self) -> Hashable:
        """What functions of the module close over."""
        raise NotImplementedError

    def _graph_node_flatten(self) -> Any:
        nodes, cls = super()._graph_node_flatten()
        # Static attributes are in a box, whose class is not public.
        return [(k, type(x)(self.context()) if k == _KEY else x) for k, x in nodes], cls

    def _pytree__flatten(self) -> Any:
        nodes, static = super()._pytree__flatten()
        return nodes, self._with_context(static)

    def _pytree__flatten_with_paths(self) -> Any:
        nodes, static = super()._pytree__flatten_with_paths()
        return nodes, self._with_context(static)

    # What was flattened with a context is unflattened without it: copies and pickles have none.

    def _graph_node_init(self, attributes: Iterable[tuple[Any, Any]]) -> None:
        super()._graph_node_init((k, None if k == _KEY else x) for k, x in attributes)

    @classmethod
    def _pytree__unflatten(cls, static: Any, node_attrs: Any) -> Any:
        module = super()._pytree__unflatten(static, node_attrs)
        vars(module)[_KEY] = None
        return module

    def _with_context(self, static: Any) -> Any:
        node_keys, static_keys, attributes = static
        pairs = zip(static_keys, attributes, strict=True)
        attributes = tuple(self.context() if k == _KEY else x for k, x in pairs)
        return node_keys, static_keys, attributes

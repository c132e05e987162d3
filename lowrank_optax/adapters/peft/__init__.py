"""Adapter folders of Hugging Face PEFT: what is in them, how a Flax model reads and writes them.

`config` and `matching` are the JSON file and what it selects, `layouts` the tensors of a layer,
`folders` the files; `module_names` finds a model's layers by their PyTorch names, `saving` and
`loading` join the two. `conversion` works on folders alone, without a model.
"""

__all__: list[str] = []  # its names are used by the files above it, or exported there

"""Adapter folders of Hugging Face PEFT: what is in them, how a Flax model reads and writes them.

`config` is the JSON file and what it selects, `attached_kinds` and `kinds` have the kinds of
adapters beside LoRA, and `tensors` is the other file and the layout of a layer. `checking` compares
both with a base, which is a Flax model (`module_names`, `parameter_names`) or files (`base_files`).
`loading`, `saving`, `weight_folding` and `conversion` are what a user calls.
"""

__all__: list[str] = []  # its names are used by the files above it, or exported there

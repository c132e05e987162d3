"""Sphinx configuration: Markdown by MyST, API pages from docstrings, the sphinx-book-theme.

Builder `html` makes the pages, `doctest` runs the code on them:
python -m sphinx -W --keep-going -b html docs docs/_build/html
"""

from collections.abc import Callable, Hashable
import inspect
import os
from pathlib import Path
import re
import sys
from typing import Any

from sphinx.application import Sphinx
from sphinx.util.inspect import TypeAliasForwardRef

# Before anything imports jax. Eight devices, because galore.md shows a sharded state.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
sys.path.insert(0, str(Path(__file__).parents[1]))  # the package beside these pages

import optax

import lowrank_optax
from lowrank_optax.matrices import DimensionNumbersRule

project = "lowrank_optax"
author = "The lowrank_optax authors"
project_copyright = author
version = release = lowrank_optax.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

default_role = "py:obj"  # single backticks in docstrings: a link where the name is known
# Not autodoc_preserve_defaults: it replaces the defaults of the functions themselves, which the
# code on the pages then meets.
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 80
toc_object_entries_show_parents = "hide"
napoleon_custom_sections = [("Reference", "References")]

# Plain `>>>` blocks are those of the docstrings, which pytest runs; here run the blocks of the
# pages, marked {doctest} or {testcode}.
doctest_test_doctest_blocks = ""
doctest_global_setup = """
from flax import nnx
import jax
import jax.numpy as jnp
import lowrank_optax as lro
import optax
"""

html_theme = "sphinx_book_theme"
html_title = f"lowrank_optax {version}"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_copy_source = False
html_theme_options = {
    "home_page_in_toc": True,
    "navbar_persistent": [],  # the sidebar has the search
    "show_toc_level": 2,
    "use_download_button": False,
    "use_fullscreen_button": False,
}


# Types that are shown by name, not spelled out.
TYPE_NAMES = {
    optax.ScalarOrSchedule: "optax.ScalarOrSchedule",
    DimensionNumbersRule: "DimensionNumbersRule",
    Any | Callable[[optax.Params], Any] | None: "Any | Callable[[optax.Params], Any] | None",
}


def name_types(app: Sphinx, obj: Any, bound_method: bool) -> None:
    """Puts names in the place of the types of `TYPE_NAMES` in a function's annotations."""
    annotations = getattr(obj, "__annotations__", {})
    for argument, annotation in annotations.items():
        if isinstance(annotation, Hashable) and annotation in TYPE_NAMES:
            annotations[argument] = TypeAliasForwardRef(TYPE_NAMES[annotation])


def constructor_signature(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str, returns: str
) -> tuple[str, str] | None:
    """Shows the arguments of `__init__` for NNX modules, whose metaclass takes any."""
    if what != "class" or signature != "(*args, **kwargs)":
        return None
    arguments = list(inspect.signature(obj.__init__).parameters.values())[1:]
    untyped = [argument.replace(annotation=inspect.Parameter.empty) for argument in arguments]
    shown = str(inspect.Signature(untyped))
    return re.sub(r"<class '([\w.]+)'>", r"\1", shown), returns


def setup(app: Sphinx) -> None:
    app.connect("autodoc-before-process-signature", name_types)
    app.connect("autodoc-process-signature", constructor_signature)

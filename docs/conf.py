"""How `make docs` builds these pages, and the reference from the docstrings."""

from __future__ import annotations

import re
from typing import Any

from sphinx.ext.napoleon import Config, GoogleDocstring

import fastvae

project = "fastvae"
author = "fastvae developers"
copyright = author  # Sphinx's own name for it
release = fastvae.info()["fastvae"]

extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["conf.py"]
default_role = "code"
smartquotes_action = "D"  # dashes; "logvar" is a string
html_theme = "furo"
html_title = "fastvae"
html_copy_source = False

myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # README begins with what the site's title says

autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
maximum_signature_line_length = 80
add_module_names = False

# Every reference of ours must lead somewhere; those to the types of others lead nowhere.
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(torch|collections|typing|types|numpy)\..*"),
    ("py:class", r"\w+"),  # of an annotation, as its module imports it: TensorLike, Sequence
]

# ---- Docstrings ----------------------------------------------------------------------------------
# They are plain text with `code` in backquotes and formulas in indented blocks: these become
# references, or code, and literal blocks.

_GOOGLE = Config(napoleon_use_param=False, napoleon_use_rtype=False)  # "x, y: ..." is one entry
_CODE = re.compile(r"`([^`]+)`")
_ENUMERATOR = re.compile(r"(^\s*|: )(\w)\.(?=\s|$)")  # as in "samples: K."
_SPECIAL = re.compile(r"[*|]|(?<=\w)_(?=\W|$)")


def _reference(text: str) -> str:
    """Code, which is a link where it is a public name, of the package or of one of its classes."""
    name = text.removeprefix("fastvae.").removesuffix("()")
    first, *rest = name.split(".")
    if first in fastvae.__all__ and len(rest) < 2 and not "".join(rest).startswith("_"):
        owner = getattr(fastvae, first)
        if not rest or (isinstance(owner, type) and rest[0] in vars(owner)):
            return f":py:obj:`{text} <fastvae.{name}>`"
    return f"``{text}``"


def _inline(line: str) -> str:
    """A line of prose, with nothing but its code marked up."""
    if line.lstrip().startswith(">>>"):
        return line
    pieces = _CODE.split(line)
    pieces[::2] = [_SPECIAL.sub(lambda found: "\\" + found[0], piece) for piece in pieces[::2]]
    pieces[0] = _ENUMERATOR.sub(r"\1\2\\.", pieces[0])
    for i in range(1, len(pieces), 2):
        joined = pieces[i + 1][:1].isalnum()  # as in "`Tensor`s"
        pieces[i] = _reference(pieces[i]) + ("\\ " if joined else "")
    return "".join(pieces)


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def as_restructured_text(lines: list[str]) -> list[str]:
    """A docstring's lines, as Sphinx reads them."""
    result: list[str] = []
    level, literal, code = 0, False, False
    for number, line in enumerate(lines):
        if not line.strip():
            result.append("")
            continue
        blank_above = number > 0 and not lines[number - 1].strip()
        if literal and _indent(line) <= level:
            literal = False
        if not literal:
            if blank_above and _indent(line) > level and not code:
                result += [" " * level + "::", ""]
                literal = True
            else:
                level = _indent(line)
                code = line.strip() == "Example:" or (code and level > 0)
        result.append(line if literal or code else _inline(line))
    return result


def _process(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    if lines and lines[0].startswith("Alias for field number"):  # of a NamedTuple
        lines.clear()
    lines[:] = as_restructured_text(lines)
    if what not in ("attribute", "data", "property"):  # whose "[B]: the bound" is no type
        lines[:] = GoogleDocstring(lines, _GOOGLE, app, what, name, obj, options).lines()


def _process_signature(
    app: Any, what: str, name: str, obj: Any, options: Any, signature: str | None, returns: str
) -> tuple[str | None, str]:
    twin = name.removeprefix("fastvae.reference.")
    if twin != name and twin in fastvae.__all__:
        return "(...)", ""  # that of the op
    return signature and signature.replace("<factory>", "..."), returns


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", _process, priority=400)
    app.connect("autodoc-process-signature", _process_signature)

"""Templates, the holes in them, and what stands there."""

from __future__ import annotations

import functools
import json
import re
from importlib import resources


@functools.cache
def read_template(name: str) -> str:
    """The text of a template."""
    return resources.files("qcompile.codegen.templates").joinpath(f"{name}.py").read_text(encoding="utf-8")


def fill_hole(text: str, name: str, content: str, comment: str = "#") -> str:
    """A template's text with other content between the lines `# <name>` and `# </name>`."""
    pattern = re.compile(rf"(^{comment} <{name}>\n).*?(^{comment} </{name}>$)", re.MULTILINE | re.DOTALL)
    filled, count = pattern.subn(lambda match: match[1] + content + match[2], text)
    assert count == 1, f"a template has one hole named {name}, not {count}"
    return filled


def functions_of(template: str, begin: str = "# <") -> str:
    """The constants and functions of a template, with its holes, from a line that begins so."""
    text = read_template(template)
    kernel = text.find("\ndef kernel(")
    end = len(text) if kernel < 0 else text.rindex("@triton.jit", 0, kernel)
    return text[text.index(f"\n{begin}") + 1 : end].rstrip() + "\n\n\n"


def print_constants(values: dict[str, object]) -> str:
    """The lines of a hole that holds constants."""
    lines = []
    for name, value in values.items():
        literal = str(value) if str(value).startswith("tl.") or not isinstance(value, str) else json.dumps(value)
        lines.append(f"{name} = tl.constexpr({literal})\n")
    return "".join(lines)

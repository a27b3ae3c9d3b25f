"""Hooks of MkDocs: links out of docs/ lead to the repository, and ```math blocks become MathML.

The pages read well on a Git host as they are. On the site, files outside docs/ do not exist: their links lead to the
repository that `repo_url` names, or are plain text without it. MathML needs no script from another site.
"""

from __future__ import annotations

import posixpath
import re
from typing import Any

from latex2mathml.converter import convert

LINK = re.compile(r"\[([^\]]*)\]\((\.\./[^)\s]+)\)")
MATH = re.compile(r"^```math\n(.*?)^```$", re.S | re.M)


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """The text of a page, with its links and equations as the site needs them."""
    folder = posixpath.join("docs", posixpath.dirname(page.file.src_uri))

    def link(match: re.Match[str]) -> str:
        label, target = match.groups()
        path = posixpath.normpath(posixpath.join(folder, target))
        if path.startswith("docs/"):
            return match[0]
        if config.repo_url:
            return f"[{label}]({config.repo_url.rstrip('/')}/blob/HEAD/{path})"
        return label if path in label else f"{label} in `{path}`"

    return MATH.sub(_mathml, LINK.sub(link, markdown))


def _mathml(match: re.Match[str]) -> str:
    return f'<div style="overflow-x: auto">{convert(match[1].strip(), display="block")}</div>'

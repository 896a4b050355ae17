"""Sphinx: `scripts/docs.sh` builds docs/ into build/docs and treats every warning as an error."""

import argparse
import io
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

project = "Helix for Megatron"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = project
exclude_patterns = ["_flags.md", "_paper.md"]
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": False}
autodoc_typehints = "signature"
napoleon_google_docstring = True
suppress_warnings = ["toc.not_included", "docutils"]  # docstrings are text with tables, not reST


def _links_into_the_repository(app, docname, source):
    """`../scripts/x` and the like lead to files that are no pages: they must exist, and become names."""
    here = Path(app.srcdir, docname).parent

    def plain(match):
        text, target = match.groups()
        if not (here / target).resolve().exists():
            raise FileNotFoundError(f"{docname}: the link to {target} leads nowhere")
        return f"`{text}`"

    source[0] = re.sub(r"\[([^\]]+)\]\((\.\./[^)#]+)\)", plain, source[0])


def _flags(app):
    """docs/_flags.md from the parsers, so that it cannot go stale."""
    from helix_megatron import cli
    from helix_megatron.megatron.arguments import add_helix_arguments

    parser = argparse.ArgumentParser(prog="pretrain_gpt.py", add_help=False, usage="%(prog)s …")
    add_helix_arguments(parser)
    out = ["## Training\n", "```text", parser.format_help().strip(), "```\n"]
    top = argparse.ArgumentParser(prog="helix")
    subparsers = top.add_subparsers()
    for add in cli.COMMANDS:
        add(subparsers)
    for name, sub in sorted(subparsers.choices.items()):
        sub.formatter_class = lambda prog: argparse.HelpFormatter(prog, width=100)
        text = io.StringIO()
        sub.print_help(text)
        out += [f"## helix {name}\n", "```text", text.getvalue().strip(), "```\n"]
    Path(app.srcdir, "_flags.md").write_text("\n".join(out), encoding="utf-8")


def _paper(app):
    """docs/_paper.md: the paper's statements, checked by helix_megatron.compare.paper."""
    from helix_megatron.compare import paper

    rows = [[check[key] for key in ("claim", "arithmetic", "verdict")] for check in paper.checks()]
    head = [["the paper says", "arithmetic", "verdict"], ["---"] * 3]
    lines = [f"| {' | '.join(row)} |" for row in [*head, *rows]]
    Path(app.srcdir, "_paper.md").write_text("\n".join([*lines, ""]), encoding="utf-8")


def setup(app):
    app.connect("builder-inited", _flags)
    app.connect("builder-inited", _paper)
    app.connect("source-read", _links_into_the_repository)

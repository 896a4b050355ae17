"""What the README shows is what is there."""

import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_file_tree_names_every_module_and_no_other():
    tree = README.split("```\nhelix_megatron/\n")[1].split("```")[0]
    listed = set(re.findall(r"^  (\w+)(?:\.py|/) ", tree, re.MULTILINE))
    package = ROOT / "helix_megatron"
    there = {path.stem for path in package.glob("*.py")} - {"__init__", "__main__"}
    there |= {path.parent.name for path in package.glob("*/__init__.py")}
    assert listed == there
    for folder in re.findall(r"^(\w+)/ ", tree, re.MULTILINE):
        assert (ROOT / folder).is_dir(), folder


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_messages_of_the_troubleshooting_page_are_in_the_code():
    """Every literal piece of a message; an ellipsis stands for what is filled in."""
    import megatron.core.transformer as transformer

    ours = [path for kind in ("helix_megatron/**/*.py", "scripts/slurm/*") for path in ROOT.glob(kind)]
    theirs = Path(transformer.__file__).parent.glob("*config.py")
    code = "\n".join(path.read_text(encoding="utf-8") for path in [*ours, *theirs] if path.is_file())
    code = re.sub(r"\"\s*\n\s*f?\"", "", code)  # literals that go on in the next line
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    messages = [message for row in rows for message in row.split("`")[1::2]]
    pieces = [piece.strip(" :;,()") for message in messages for piece in message.split("…")]
    assert len(rows) > 30
    assert [piece for piece in pieces if piece not in code] == ["Connection closed by peer"]  # gloo's


def test_the_readme_is_read_to_the_end():
    lines = README.splitlines()
    assert len(lines) <= 180
    assert all(len(line) <= 140 or line.startswith("   tp") or "|" in line for line in lines)


def test_every_flag_is_on_the_page_of_flags():
    import argparse

    from helix_megatron.megatron.arguments import add_helix_arguments

    parser = add_helix_arguments(argparse.ArgumentParser(add_help=False))
    page = (ROOT / "docs/flags.md").read_text(encoding="utf-8")
    for action in parser._actions:
        assert all(option in page for option in action.option_strings), action.option_strings


def test_the_pictures_are_drawn_from_the_layout():
    path = ROOT / "docs" / "make_picture.py"
    spec = importlib.util.spec_from_file_location("make_picture", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, draw in module.PICTURES.items():
        assert path.with_name(name).read_text(encoding="utf-8") == draw(), f"{name}: run docs/make_picture.py"

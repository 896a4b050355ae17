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
    there = {path.stem for path in package.glob("*.py")} - {"__init__"}
    there |= {path.parent.name for path in package.glob("*/__init__.py")}
    assert listed == there
    for folder in re.findall(r"^(\w+)/ ", tree, re.MULTILINE):
        assert (ROOT / folder).is_dir(), folder


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_every_flag_is_in_the_readme():
    import argparse

    from helix_megatron.arguments import add_helix_arguments

    parser = add_helix_arguments(argparse.ArgumentParser(add_help=False))
    for action in parser._actions:
        assert all(option in README for option in action.option_strings), action.option_strings


def test_the_picture_is_drawn_from_the_layout():
    path = ROOT / "docs" / "make_picture.py"
    spec = importlib.util.spec_from_file_location("make_picture", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert path.with_name("layout.svg").read_text(encoding="utf-8") == module.picture()

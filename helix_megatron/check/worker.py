"""The process of one section: `python -m helix_megatron.check.worker FUNCTION ROWS PLACE`.

FUNCTION is module:function, ROWS a file, PLACE the fields of rows.Place as JSON. Exit code 0: it came
to its end, whatever its rows say.
"""

from __future__ import annotations

import importlib
import json
import sys
import traceback
import warnings

from helix_megatron.check.rows import Place, Rows, first_line
from helix_megatron.host.processes import die_with_parent


def main(function: str, path: str, place: str) -> int:
    """Run the section; what it raises is a failed row."""
    die_with_parent()
    warnings.simplefilter("ignore")
    rows = Rows(path)
    try:
        module, name = function.split(":")
        getattr(importlib.import_module(module), name)(rows, Place(**json.loads(place)))
    except Exception as error:
        traceback.print_exc()
        rows.add("the section itself", "failed", first_line(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

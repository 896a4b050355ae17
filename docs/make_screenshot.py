"""The picture of a comparison's report in the README, from its folder of results: docs/compare.png.

    python docs/make_screenshot.py FOLDER

Needs chromium (apt-get install chromium); the tests look at the page in the same one, with the same flags.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
_FRAME = '<body style="margin: 0"><iframe src="{}" style="border: 0; width: {}px; height: {}px"></iframe>'


def screenshot(page: Path, png: Path, width: int, height: int) -> None:
    """The top `height` of a page in a window of `width` pixels, as PNG.

    The page stands in a frame, as a window of its own cannot be as narrow as a phone. RuntimeError
    without page, browser or picture.
    """
    if not page.exists():
        raise RuntimeError(f"{page} is not there; give the folder of a comparison's results.")
    if CHROMIUM is None:
        raise RuntimeError("no chromium on PATH; apt-get install chromium.")
    with tempfile.TemporaryDirectory() as folder:
        frame = Path(folder, "frame.html")
        frame.write_text(_FRAME.format(page.resolve().as_uri(), width, height))
        command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder}/profile", "--allow-file-access-from-files"]
        command += [f"--window-size={width},{height}", f"--screenshot={png.resolve()}", frame.as_uri()]
        run = subprocess.run(command, capture_output=True, text=True, timeout=180)
    if run.returncode or not png.exists():
        raise RuntimeError(f"{CHROMIUM} took no picture of {page}: {run.stderr[-500:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="results of a comparison, with its report.html")
    parser.add_argument("--png", type=Path, default=Path(__file__).with_name("compare.png"))
    parser.add_argument("--width", type=int, default=1200, help="390 is a phone's")
    parser.add_argument("--height", type=int, default=1560)
    options = parser.parse_args()
    screenshot(options.folder / "report.html", options.png, options.width, options.height)
    print(options.png)


if __name__ == "__main__":
    main()

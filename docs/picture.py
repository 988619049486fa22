"""docs/report.png: what a report of the tutorial's net shows first, in a headless Chromium.

Run with `python docs/picture.py`, on a machine that does nothing else.
"""

import os
import sys
import tempfile
from io import BytesIO
from pathlib import Path

from PIL import Image

from blocks import ROOT, tutorial
from generate import run

sys.path.insert(0, str(ROOT / "tests"))

from render.html.browser import Browser

COMPARE = (
    "torchfuse compare net.py:build --data samples.npz --targets eager,pt,pte --html report.html"
)
WIDTH, HEIGHT = 1080, 1000  # pixels of the page
SHOWN = 864  # pixels, as wide as GitHub shows a picture


def main() -> None:
    """Compare, open the report, and save what is seen."""
    os.chdir(tutorial())
    run(COMPARE.split(), 0)
    with tempfile.TemporaryDirectory() as folder:
        browser = Browser(Path(folder) / "profile")
        try:
            browser.open(Path("report.html").resolve(), WIDTH)
            seen = Path(folder) / "seen.png"
            # The pages show the table as text; the picture has what text cannot show.
            browser.run("document.querySelector('#rows').remove()")
            browser.screenshot(seen)
        finally:
            browser.close()
        page = Image.open(BytesIO(seen.read_bytes())).convert("RGB").crop((0, 0, WIDTH, HEIGHT))
    picture = page.resize((SHOWN, round(HEIGHT * SHOWN / WIDTH)), Image.Resampling.LANCZOS)
    # A palette makes the file a quarter as large; chosen like this, the charts keep their colours.
    picture.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(
        ROOT / "docs" / "report.png", optimize=True
    )


if __name__ == "__main__":
    main()

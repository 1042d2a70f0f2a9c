"""Make docs/report-desktop.png and docs/report-phone.png anew: the page of a real run of the demo, as Chromium shows it.

    python benchmarks/report_pictures.py    # needs Chromium and chromedriver; two minutes on two cores

The desktop's picture is light, the phone's dark; both end where HEIGHT says, for the page is long.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tests/support")]

COMMAND = "run recipes/demo/checkpoint --recipe digits --control dense --report-images 8 --device cpu --quiet"
HEIGHT = {"desktop": 1808, "phone": 1706}
WIDTH = {"desktop": 1100, "phone": 390}


def main() -> None:
    """Run the demo, open its page, write both pictures."""
    import browser

    if browser.MISSING:
        raise SystemExit(browser.MISSING)
    with tempfile.TemporaryDirectory() as place:
        out = Path(place, "out")
        subprocess.run([sys.executable, "-m", "dsd_refine", *COMMAND.split(), "-o", str(out)], cwd=ROOT, check=True)
        with browser.browser(Path(place)) as opened, browser.served(out / "dsd") as (address, _):
            for name, width in WIDTH.items():
                opened.open(f"{address}/report.html", width, HEIGHT[name], dark=name == "phone")
                opened.screenshot(ROOT / f"docs/report-{name}.png", whole=False)


if __name__ == "__main__":
    main()

"""README's moving picture, from the figure of the landscape: python tools/film.py

Needs a Chromium of the system, as the browser tests do."""

import io
import shutil
import sys
import tempfile
from pathlib import Path

from kdbook.figures import annealing_landscape

OUT = Path(__file__).resolve().parent.parent / "nbs" / "landscape.webp"
FRAMES, WIDTH, MILLISECONDS = 36, 620, 90
SHOW = """phi => {
  const slider = document.querySelector("input[type=range]");
  slider.value = phi;
  slider.dispatchEvent(new Event("input"));
  const turn = new KeyboardEvent("keydown", {key: "ArrowRight"});
  document.querySelector("canvas").dispatchEvent(turn);
}"""


def main() -> int | str:  # what to exit with
    from PIL import Image
    from playwright.sync_api import sync_playwright

    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        return "no Chromium: install it, for example apt-get install chromium"
    page_text = annealing_landscape(phi=0.0)._repr_html_()
    frames = []
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as found:
        file = Path(folder) / "page.html"
        file.write_text(f"<meta charset=utf-8><body>{page_text}", encoding="utf-8")
        chromium = found.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = chromium.new_page(viewport={"width": WIDTH, "height": 520})
        page.goto(file.as_uri())
        for k in range(FRAMES):
            page.evaluate(SHOW, k / (FRAMES - 1))
            shot = page.locator("canvas").screenshot()
            frames.append(Image.open(io.BytesIO(shot)).convert("RGB"))
        chromium.close()
    hold = [MILLISECONDS] * (FRAMES - 1) + [2000]
    first, *others = frames
    first.save(OUT, save_all=True, append_images=others, duration=hold, loop=0)
    print(OUT.name, OUT.stat().st_size // 1000, "kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())

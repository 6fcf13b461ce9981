"""Give every address of the project its owner: python tools/owner.py NAME.

settings.ini says whose name stands there now. While that is the placeholder, the site
shows no badge and no link to it.
"""

import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PLACEHOLDER = "someone"
ADDRESS = re.compile(
    r"(?P<before>github\.com/|/github/|https://)(?P<name>[\w-]+)"
    r"(?P<after>/kdbook|\.github\.io/kdbook)"
)


def owner() -> str:
    "The name in settings.ini."
    settings = ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    return settings["DEFAULT"]["user"]


def texts() -> list[Path]:
    "The files under version control that may hold an address."
    command = ["git", "ls-files", "*.md", "*.ipynb", "*.yml", "*.ini", "*.py", "*.toml"]
    listed = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [ROOT / name for name in listed.stdout.splitlines()]


def main(name: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9-]+", name):
        sys.exit(f"{name!r} is no name of a GitHub account")
    for path in texts():
        text = path.read_text(encoding="utf-8")
        new = ADDRESS.sub(rf"\g<before>{name}\g<after>", text)
        if path.name == "settings.ini":
            new = re.sub(r"(?m)^user = .*$", f"user = {name}", new)
        if new != text:
            path.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])

"""Write the ladder tables of README.md from the records under results/; with --check only say whether they are stale."""

import re
import sys
from pathlib import Path

from kdbook.benchmark import SETTINGS, ladder_table, recorded

README = Path(__file__).resolve().parent.parent / "README.md"
PLACE = re.compile(r"(<!-- ladder -->\n).*?(<!-- /ladder -->)", re.S)


def tables():
    "The movie settings that have records, as Markdown."
    parts = []
    for name in recorded("techniques"):
        if SETTINGS[name].task != "movies":
            continue
        table = (
            ladder_table(name, "techniques")
            .drop(columns=["test nll", "seeds", "lr"])
            .reset_index()
        )
        rows = [
            list(table.columns),
            ["---"] * len(table.columns),
            *table.values.tolist(),
        ]
        parts.append(
            f"**{SETTINGS[name].title[0].upper()}{SETTINGS[name].title[1:]}**\n\n"
            + "\n".join(f"| {' | '.join(row)} |" for row in rows)
        )
    return "\n\n".join(parts) + "\n"


def renewed(text):
    return PLACE.sub(lambda m: m[1] + tables() + m[2], text)


if __name__ == "__main__":
    old = README.read_text(encoding="utf-8")
    new = renewed(old)
    if "--check" in sys.argv:
        sys.exit(
            "README.md is stale: python tools/readme_table.py" if new != old else 0
        )
    README.write_text(new, encoding="utf-8")

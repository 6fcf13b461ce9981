"""Write the ladder tables of README.md: python tools/readme_table.py [--check]

They come from the records under results/; --check only says whether they are stale."""

import re
import sys
from pathlib import Path

from kdbook.records.ladder import ladder_table, recorded
from kdbook.records.settings import SETTINGS

README = Path(__file__).resolve().parent.parent / "README.md"
PLACE = re.compile(r"(<!-- ladder -->\n).*?(<!-- /ladder -->)", re.S)
NOT_SHOWN = ["n", "test nll", "seeds", "lr"]


def as_markdown(table: "pandas.DataFrame") -> str:
    head = list(table.columns)
    rows = [head, ["---"] * len(head), *table.values.tolist()]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)


def tables() -> str:
    "The movie settings that have records, as Markdown."
    sections = []
    for name in recorded("techniques"):
        setting = SETTINGS[name]
        if setting.task == "movies":
            table = ladder_table(name, "techniques").drop(columns=NOT_SHOWN)
            title = setting.title[0].upper() + setting.title[1:]
            sections.append(f"**{title}**\n\n{as_markdown(table.reset_index())}")
    return "\n\n".join(sections) + "\n"


def renewed(
    text: str,  # of the README
    made: str | None = None,  # as `tables` gives them; None makes them
) -> str:
    made = tables() if made is None else made
    return PLACE.sub(lambda match: match[1] + made + match[2], text)


def main() -> int | str:  # what to exit with
    old = README.read_text(encoding="utf-8")
    new = renewed(old)
    if "--check" in sys.argv:
        return "README.md is stale: python tools/readme_table.py" if new != old else 0
    README.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

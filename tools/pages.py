"""What the site's pages get after they were rendered; build_site.py calls `finish`.

Nothing comes from another host, formulas are MathML, pictures and scripts are files
that pages share, and links lead somewhere.
"""

import base64
import hashlib
import html
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from owner import PLACEHOLDER

MATH = re.compile(
    r'(<span class="math (inline|display)">)\\[(\[](.*?)\\[)\]](</span>)', re.S
)
REMOTE = re.compile(
    r'<link\b[^>]*href="https?://[^>]*>'
    r'|<script\b[^>]*src="https?://[^>]*></script>'
    r'|<img\b[^>]*src="https?://[^>]*>'
)
NO_ALT = re.compile(r"<img\b(?![^>]*\balt=)[^>]*>")
FONTS = re.compile(r"""@import\s*(?:url\()?["']?https?://[^"')]*["']?\)?;""")
PICTURE = re.compile(r'src="data:image/png;base64,([A-Za-z0-9+/=]{2000,})"')
SHARED = re.compile(
    r'<(style|script) data-kdbook(?:="(\w+)")?>(.*?)</\1>\n?'
    r"|<script>kdbook\.mount\(\);</script>\n?",
    re.S,
)
EXPLORE = re.compile(r"<script>(\(function \(\) \{\nconst D = .*?)</script>", re.S)
# nbdev's links in signatures, which are code
IN_CODE = re.compile(r"\[`([\w.]+)`\]\([^)\s<]*\)")
# nbdev links private names too, and gives them no place
PRIVATE = re.compile(r'<a\b[^>]*href="[^"]*#_\w+"[^>]*>(.*?)</a>', re.S)
# while settings.ini holds a placeholder, its addresses lead nowhere
NOBODY = re.compile(
    rf'<a\b[^>]*href="https://[^"]*/{PLACEHOLDER}[/"][^>]*>.*?</a>', re.S
)
# a large disc and a small one
ICON = (
    '<link rel="icon" href="data:image/svg+xml,'
    "%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 32 32'%3E"
    "%3Ccircle cx='12' cy='12' r='11' fill='%230072b2'/%3E"
    "%3Ccircle cx='26' cy='26' r='5' fill='%23d55e00'/%3E%3C/svg%3E\">"
)
SKIP = '<a class="kd-skip" href="#quarto-content">Skip to the text</a>'


def known_to_latex2mathml(tex: str) -> str:
    "The formula in words that the converter reads, or reads aright."
    tex = re.sub(r"\\tag\{(.*?)\}", r"\\qquad \\text{(\1)}", tex)
    tex = re.sub(r"(\\(?:begin|end))\{aligned\}", r"\1{align*}", tex)
    tex = re.sub(r"(?<!\\)\\\|", "\u2016", tex)  # misread after \big and its kin
    tex = re.sub(r"\\(mathcal|mathbb)\{?([A-Z])\}?", lettered, tex)
    return re.sub(r"\\arg(?![a-z])", r"\\operatorname{arg}", tex)


# script and double-struck letters that stand elsewhere in Unicode than their alphabet
ELSEWHERE = dict(zip("BEFHILMR", "ℬℰℱℋℐℒℳℛ")), dict(zip("CHNPQRZ", "ℂℍℕℙℚℝℤ"))


def lettered(found: re.Match[str]) -> str:
    "A letter as itself: browsers do not read MathML's variants of letters."
    double = found[1] == "mathbb"
    start = 0x1D538 if double else 0x1D49C
    return ELSEWHERE[double].get(found[2], chr(start + ord(found[2]) - ord("A")))


def mathml(
    match: re.Match[str],  # of MATH
    page: str,  # for messages
    problems: list[str],  # what goes wrong is added
) -> str:
    "The formula as MathML that keeps its TeX as an annotation."
    from latex2mathml.converter import convert

    opening, kind, escaped, closing = match.groups()
    tex = html.unescape(escaped).strip()
    display = "block" if kind == "display" else "inline"
    try:
        drawn = convert(known_to_latex2mathml(tex), display=display)
    except Exception as error:  # the converter has a class per kind of mistake
        problems.append(f"{page}: formula {tex!r}: {type(error).__name__} {error}")
        return match.group(0)
    unknown = re.search(r">(\\[^<]+)<", drawn)
    if unknown:
        problems.append(
            f"{page}: formula {tex!r}: latex2mathml does not know {unknown.group(1)!r}"
        )
    start = re.match(r"<math[^>]*>", drawn).group(0)
    inner = drawn.removeprefix(start).removesuffix("</math>")
    note = f'<annotation encoding="application/x-tex">{html.escape(tex)}</annotation>'
    return f"{opening}{start}<semantics>{inner}{note}</semantics></math>{closing}"


class Files:
    "Pictures and scripts that were part of pages, each once, named by what is in it."

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(exist_ok=True)

    def put(self, content: bytes, ending: str) -> str:
        "The address of a file with this content, from a page."
        name = hashlib.sha256(content).hexdigest()[:16] + ending
        (self.folder / name).write_bytes(content)
        return f"../{self.folder.name}/{name}"

    def picture(self, found: re.Match[str]) -> str:
        address = self.put(base64.b64decode(found[1]), ".png")
        return f'loading="lazy" src="{address}"'

    def explore(self, found: re.Match[str]) -> str:
        script = html.unescape(found[1]) if "&lt;" in found[1] else found[1]
        return f'<script defer src="{self.put(script.encode(), ".js")}"></script>'

    def share(self, text: str) -> str:
        "The page with one link to each script and style of the figures that move."
        links: dict[str, None] = {}
        for kind, _, content in SHARED.findall(text):
            if kind == "style":
                address = self.put(content.encode(), ".css")
                links[f'<link rel="stylesheet" href="{address}">'] = None
            elif kind:
                address = self.put(content.encode(), ".js")
                links[f'<script defer src="{address}"></script>'] = None
        if links:
            text = SHARED.sub("", text).replace("</head>", "".join(links) + "</head>")
        return text


class Page(HTMLParser):
    "The places and the links of a page."

    def __init__(self, text: str):
        super().__init__()
        self.places: set[str] = set()
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.places |= {found[key] for key in ("id", "name") if found.get(key)}
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])


def dead_links(out: Path) -> Iterator[str]:
    "What is wrong with the links between the pages."
    pages = {p: Page(p.read_text(encoding="utf-8")) for p in out.rglob("*.html")}
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve()
            target = path if not parts.path else target
            target = target / "index.html" if target.is_dir() else target
            if not target.exists():
                yield f"{path.name}: {link} leads nowhere"
            elif parts.fragment and target in pages:
                if unquote(parts.fragment) not in pages[target].places:
                    yield f"{path.name}: {link} has no such place"


def shorter_search(path: Path) -> None:
    "Leave formulas out of what a search reads."
    if not path.exists():
        return
    entries = json.loads(path.read_text(encoding="utf-8"))
    for entry in entries:
        entry["text"] = re.sub(r"\\[(\[].*?\\[)\]]|\$[^$]*\$", " ", entry["text"])
    path.write_text(json.dumps(entries, ensure_ascii=False), encoding="utf-8")


def finish(
    out: Path,  # the rendered site
) -> list[str]:  # what is wrong with it
    "Make the pages complete, small and independent of other hosts."
    problems: list[str] = []
    files = Files(out / "files")
    script = (Path(__file__).parent / "site.js").read_bytes()
    ours = f'<script defer src="{files.put(script, ".js")}"></script>'
    for path in sorted(out.rglob("*.html")):
        text = REMOTE.sub("", path.read_text(encoding="utf-8"))
        text = NOBODY.sub("", text)
        text = IN_CODE.sub(r"\1", text)
        text = PRIVATE.sub(r"\1", text)
        text = MATH.sub(lambda m: mathml(m, path.name, problems), text)
        text = files.share(PICTURE.sub(files.picture, text))
        text = EXPLORE.sub(files.explore, text)
        text = text.replace("</head>", ICON + ours + "</head>")
        text = re.sub(r"(<body\b[^>]*>)", rf"\1{SKIP}", text, count=1)
        problems += [
            f"{path.name}: a picture without alt" for _ in NO_ALT.findall(text)
        ]
        path.write_text(text, encoding="utf-8")
    for path in out.rglob("*.css"):
        text = path.read_text(encoding="utf-8")
        path.write_text(FONTS.sub("", text), "utf-8")
    shorter_search(out / "search.json")
    return problems + sorted(dead_links(out))

"""Running text to train on, gathered from folders of books and manuals.

    python benchmarks/prose.py FOLDER... general.jsonl.gz

Rows have ``id`` and ``text``. A folder is a source of its own, so that none of them outweighs the others: at most
``--most`` megabytes are taken of it. Files are read by how they end: text, Markdown, HTML or XML (DocBook, Mallard),
also with .gz. Of these whole English sentences stay, paragraph by paragraph, each at most once; headings, tables, lists
of words, code, notices of copyright and what has no end are left out. The same folders give the same rows.

Prose of free licences, whose models may be passed on: the books of Standard Ebooks (CC0, a folder for each), pages of
the US government (public domain), and the documentation packages of Debian, unpacked (their licences stand in
usr/share/doc/*/copyright).
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
import unicodedata
from collections.abc import Iterator
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

LEAST, MOST = 1_500, 100_000
"""Characters of a text."""
SHORTEST = 40
"""Characters of a paragraph."""
MARKUP = {"html", "htm", "xhtml", "xml", "docbook", "page"}
KINDS = MARKUP | {"txt", "md"}
INLINE = re.compile(
    "a|abbr|acronym|app|application|b|bdi|big|cite|cmd|code|command|dfn|em|emphasis|file|filename|firstterm|font"
    "|gui|guibutton|guiicon|guilabel|guimenu|guimenuitem|guisubmenu|i|kbd|key|keycap|link|literal|mark|menuchoice"
    "|option|phrase|productname|q|quote|replaceable|small|span|strong|sub|sup|systemitem|tt|u|ulink|userinput|var"
    "|wordasword|xref"
)
LEFT_OUT = re.compile(
    "aside|caption|dt|figcaption|footer|form|h1|h2|h3|h4|h5|h6|head|header|indexterm|informaltable|legalnotice|math"
    "|nav|pre|programlisting|screen|script|style|sup|svg|synopsis|table|term|title"
)
OPEN_ENDED = {"dt"}
"""Left out, too, but old pages do not say where it ends: at the next block."""
SENTENCES = re.compile(r"[A-Z0-9\"'“‘(].*[.!?…][\"'”’)]*", re.DOTALL)
ODD = re.compile(r"[{}<>|\\=~^$#@_•↩�]|://|&\w+;|\.\.\.\.|\s[-+*/]\s|\w\(\)|\[\d+\]")
NOTICE = re.compile(
    r"copyright|©|warrant(?:y|ies)\b|permission is|under the terms of|redistribut|GNU (?:General|Free|Lesser)"
    r"|Creative Commons|all rights reserved|Project Gutenberg|Standard Ebooks|cookies|JavaScript",
    re.IGNORECASE,
)
COMMON = re.compile(
    "a|an|and|are|as|at|be|but|by|can|for|from|had|has|have|he|her|his|i|if|in|is|it|its|not|of|on|or|she|that|the"
    "|their|they|this|to|was|we|were|which|will|with|you|your"
)
ENGLISH = 0.2
"""Share of the most common words among those of a paragraph, at least."""
LETTERS = 0.85
"""Share of letters among its characters other than spaces, at least."""
FRONT = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)
FENCE = re.compile(r"^ *(```|~~~).*?^ *\1.*?$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"!?\[([^\]]*)\](?:\([^)]*\)|\[[^\]]*\])(?:\{[^}]*\})?")
BLOCK = re.compile(r"^(?: {4,}|\t|#|\||>|!).*$|^ *(?:[-*+]|\d+\.) +", re.MULTILINE)
EMPHASIS = re.compile(r"(?<!\w)(\*\*|__|\*|_|`)(?=\S)(.+?)(?<=\S)\1(?!\w)")
TAG = re.compile(r"</?\w[^>]*>|<!--.*?-->|\{%.*?%\}", re.DOTALL)


class Reader(HTMLParser):
    """Blocks of HTML or XML."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks: list[str] = []
        self.words: list[str] = []
        self.within: list[str] = []

    def ends(self) -> None:
        self.blocks.append("".join(self.words))
        self.words.clear()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if not INLINE.fullmatch(tag):
            self.ends()
            if self.within and self.within[-1] in OPEN_ENDED:
                self.within.pop()
        note = any(value and ("noteref" in value or "backlink" in value) for _, value in attrs)
        if LEFT_OUT.fullmatch(tag) or note or self.within[-1:] == [tag]:
            self.within.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not INLINE.fullmatch(tag):
            self.ends()
        if tag in self.within:
            del self.within[len(self.within) - 1 - self.within[::-1].index(tag) :]

    def handle_data(self, data: str) -> None:
        if not self.within:
            self.words.append(data)


def blocks(text: str, kind: str) -> list[str]:
    """What may be a paragraph, of a file of some kind."""
    if kind in MARKUP:
        reader = Reader()
        reader.feed(text)
        reader.close()
        reader.ends()
        return reader.blocks
    if kind == "md":
        text = BLOCK.sub("\n\n", FENCE.sub("\n\n", FRONT.sub("", text)))
        text = EMPHASIS.sub(r"\2", EMPHASIS.sub(r"\2", LINK.sub(r"\1", unescape(TAG.sub("", text)))))
    return re.split(r"\n\s*\n", text)


def is_prose(paragraph: str) -> bool:
    """Whether it is made of English sentences."""
    if len(paragraph) < SHORTEST or not SENTENCES.fullmatch(paragraph):
        return False
    if ODD.search(paragraph) or NOTICE.search(paragraph):
        return False
    letters = sum(map(str.isalpha, paragraph)) / len(paragraph.replace(" ", ""))
    words = re.findall(r"\w+", paragraph.lower())
    return letters >= LETTERS and sum(bool(COMMON.fullmatch(word)) for word in words) >= ENGLISH * len(words)


def paragraphs(file: Path) -> Iterator[str]:
    """Prose of a file."""
    data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    try:
        text = data.decode()
    except UnicodeDecodeError:
        text = data.decode("latin-1")
    for block in blocks(text.replace("\r\n", "\n"), kind(file)):
        visible = "".join(char for char in block if unicodedata.category(char) != "Cf")
        paragraph = " ".join(visible.split()).lstrip(".,;: ")
        if is_prose(paragraph):
            yield paragraph


def kind(file: Path) -> str:
    """How its name ends."""
    return file.name.lower().removesuffix(".gz").rpartition(".")[2]


def texts(folder: Path, seen: set[str]) -> Iterator[str]:
    """Of a folder's files; short ones are joined with those beside them."""
    some: list[str] = []
    place = folder
    files = (file for file in folder.rglob("*") if file.is_file() and kind(file) in KINDS)
    for file in sorted(files, key=lambda file: (file.parent, file.name)):
        if file.parent != place:
            some, place = [], file.parent
        for paragraph in paragraphs(file):
            if paragraph.casefold() in seen or len(paragraph) >= MOST - LEAST:
                continue
            seen.add(paragraph.casefold())
            if sum(map(len, some)) + 2 * len(some) + len(paragraph) > MOST:
                yield "\n\n".join(some)
                some = []
            some.append(paragraph)
        if len(text := "\n\n".join(some)) >= LEAST:
            yield text
            some = []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="of a source each")
    parser.add_argument("out", type=Path)
    parser.add_argument("--most", type=float, default=2.0, help="megabytes of a folder")
    args = parser.parse_args()
    rng = random.Random(0)
    seen: set[str] = set()
    rows: list[dict[str, str]] = []
    for folder in args.folders:
        found = [*texts(folder, seen)]
        rng.shuffle(found)
        size = 0
        for index, text in enumerate(found):
            size += len(text.encode())
            if size > args.most * 1e6:
                size -= len(text.encode())
                break
            rows.append({"id": f"{folder.name}-{index:04d}", "text": text})
        print(f"{size / 1e6:6.2f} MB  {folder.name}", flush=True)
    rng.shuffle(rows)
    with gzip.open(args.out, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    print(f"{len(rows):,} texts, {sum(len(row['text'].encode()) for row in rows) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()

"""Reading the README and the guide: their command lines, files, headings, links, pictures; and the heads of other files."""

import dataclasses
import itertools
import re
import shlex
from pathlib import Path

from markdown_it import MarkdownIt  # rich depends on it

from tests.runs import ROOT

README, GUIDE = ROOT / "README.md", ROOT / "docs"
PAGES = [README, *sorted(GUIDE.glob("*.md")), ROOT / "CONTRIBUTING.md"]
COMMANDS = "bash"
MARKDOWN = MarkdownIt("commonmark").enable("table")


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block: its language, the word after it (a file's name), its text and the headings above it."""

    language: str
    name: str
    text: str
    headings: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Line:
    """A command line of a page: its text on one line without its comment, variables that it sets, and its words."""

    page: Path
    text: str
    variables: dict[str, str]
    words: list[str]


def tokens_of(page):
    """Return all tokens of a page, those inside of paragraphs and tables too."""
    tokens = MARKDOWN.parse(page.read_text())
    return [inner for token in tokens for inner in (token, *(token.children or ()))]


def headings_of(page):
    tokens = MARKDOWN.parse(page.read_text())
    return [after.content for token, after in zip(tokens, tokens[1:], strict=False) if token.type == "heading_open"]


def anchors_of(page):
    """Return the names that GitHub gives to a page's headings."""
    plain = (re.sub(r"[`*\[\]]|\(.*?\)", "", heading).lower() for heading in headings_of(page))
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain}


def blocks_of(page):
    """Return the fenced and indented blocks of a page."""
    blocks, headings, tokens = [], (), MARKDOWN.parse(page.read_text())
    for number, token in enumerate(tokens):
        if token.type == "heading_open":
            headings = (*headings, tokens[number + 1].content)
        elif token.type in ("fence", "code_block"):
            language, _, name = token.info.partition(" ")
            blocks.append(Block(language, name, token.content, headings))
    return blocks


def commands_in(page, text):
    """Return the command lines of a block; a line that ends in a backslash goes on, and && stands between two."""
    lines = []
    for whole in text.replace("\\\n", " ").splitlines():
        words = shlex.split(whole, comments=True)
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            own, words = words[:end], words[end + 1 :]
            count = next(number for number, word in enumerate(own) if not re.match(r"[A-Z_]+=", word))
            variables = dict(word.split("=", 1) for word in own[:count])
            lines.append(Line(page, shlex.join(own), variables, own[count:]))
    return lines


def lines_of(page, chapter=None):
    """Return the command lines of a page, or of the chapter under one of its headings."""
    blocks = [block for block in blocks_of(page) if block.language == COMMANDS and chapter in (None, *block.headings[-1:])]
    return [line for block in blocks for line in commands_in(page, block.text)]


def lines_of_head(file):
    """Return the command lines in the comment that a file begins with: what stands indented there."""
    head = itertools.takewhile(lambda line: line.startswith("#"), file.read_text().splitlines())
    return commands_in(file, "\n".join(line.removeprefix("#").strip() for line in head if line.startswith("#   ")))

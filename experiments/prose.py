"""The length of the pages' sentences: ``python -m experiments.prose [PATH ...]``.

Without paths it reads README, CONTRIBUTING and ``docs/*.md``. A path may be a page, a Python file (its docstrings are
read) or a folder of these. It prints the average number of words in a sentence and every sentence that is too long. The
exit code is 1 if there is one, or if the average is too high.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
MOST_WORDS = 40
"""Words of the longest sentence that is allowed."""

MOST_ON_AVERAGE = 20.0
"""Words of a sentence, averaged over all pages."""

LEFT_OUT = re.compile(r"\||#|<!--|!\[.*\]\(.*\)$|\s*\$\$")
"""Lines that are no prose: tables, headings, comments, pictures, formulas."""

LIST_ITEM = re.compile(r"^\s*(?:[-*+]|\d+\.)\s+")
SENTENCE_END = re.compile(r"(?<!e\.g\.)(?<!i\.e\.)(?<!vs\.)(?<=[.!?])[)\"*_]*\s+(?=[\"'`(\[*_$A-Z0-9])")
TABLE = re.compile(r"^ *=+ +=+.*^ *=+ +=+ *$", re.MULTILINE | re.DOTALL)
SECTION = re.compile(r"(Args|Returns|Raises|Attributes|Yields):$")
FIELD = re.compile(r"[A-Za-z_*][\w, *]*: ")


@dataclass(frozen=True)
class Sentence:
    """A sentence, and where its paragraph begins."""

    path: Path
    line: int
    text: str

    @property
    def words(self) -> int:
        """How many there are; code and a formula are one word each."""
        return sum(any(map(str.isalnum, word)) for word in self.text.split())


def pages() -> list[Path]:
    """The pages for people."""
    return [PROJECT / "README.md", PROJECT / "CONTRIBUTING.md", *sorted((PROJECT / "docs").glob("*.md"))]


def sentences(paths: Iterable[Path]) -> list[Sentence]:
    """Every sentence of some pages, Python files and folders of either."""
    found = []
    for path in paths:
        inside = [p for kind in ("*.md", "*.py") for p in sorted(path.rglob(kind))] if path.is_dir() else [path]
        for file in inside:
            split = docstring_paragraphs if file.suffix == ".py" else page_paragraphs
            for line, text in split(file.read_text(encoding="utf-8")):
                found += [Sentence(file, line, part) for part in SENTENCE_END.split(plain(text)) if part.strip()]
    return [sentence for sentence in found if sentence.words]


def page_paragraphs(text: str, first: int = 1) -> Iterator[tuple[int, str]]:
    """``(line, text)`` of each paragraph and list item of Markdown; code blocks, tables and headings are left out."""
    fence = formula = False
    start, held = first, list[str]()
    for number, line in enumerate([*text.splitlines(), ""], start=first):
        is_fence, is_formula = line.lstrip().startswith("```"), line.strip() == "$$"
        inside = fence or formula
        fence, formula = fence ^ is_fence, formula ^ is_formula
        is_prose = not (inside or is_fence or is_formula or LEFT_OUT.match(line)) and line.strip()
        if held and (not is_prose or LIST_ITEM.match(line)):
            yield start, " ".join(held)
            held = []
        if is_prose:
            start = start if held else number
            held.append(LIST_ITEM.sub("", line, count=1).strip())


def docstring_paragraphs(source: str) -> Iterator[tuple[int, str]]:
    """``(line, text)`` of each paragraph of a Python file's docstrings; the entries of ``Args:`` are one each."""
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
            continue
        if isinstance(node.value.value, str):
            text = TABLE.sub(lambda table: "\n" * table[0].count("\n"), node.value.value)
            lines = ["" if SECTION.match(line.strip()) else _as_item(line) for line in text.splitlines()]
            yield from page_paragraphs("\n".join(lines), node.lineno)


def _as_item(line: str) -> str:
    """A field of a docstring's section as a list item."""
    return f"- {line.strip()}" if line.startswith(" ") and FIELD.match(line.strip()) else line.strip()


def plain(text: str) -> str:
    """Prose alone: links without their targets, code and formulas as one word."""
    text = re.sub(r"``[^`]+``|`[^`]+`", lambda code: re.sub(r"\s+", "_", code[0]), text)
    text = re.sub(r"\$[^$]+\$", lambda formula: re.sub(r"\s+", "_", formula[0]), text)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return re.sub(r"<?https?://\S+", "", text)


def average(found: Iterable[Sentence]) -> float:
    """Mean words of a sentence."""
    counts = [sentence.words for sentence in found]
    return sum(counts) / max(len(counts), 1)


def too_long(found: Iterable[Sentence]) -> list[Sentence]:
    """Sentences that no reader should be asked to hold in mind."""
    return [sentence for sentence in found if sentence.words > MOST_WORDS]


def main(arguments: list[str]) -> int:
    """Print the figures; return the exit code."""
    paths = [Path(argument).resolve() for argument in arguments] or pages()
    found = sentences(paths)
    by_file = {path: [sentence for sentence in found if sentence.path == path] for path in {s.path for s in found}}
    for path, own in sorted(by_file.items()):
        place = path.relative_to(PROJECT) if path.is_relative_to(PROJECT) else path
        print(f"{average(own):6.1f} words, {len(own):4d} sentences  {place}")
        for sentence in too_long(own):
            print(f"  {place}:{sentence.line}: {sentence.words} words: {sentence.text}")
    print(f"{average(found):6.1f} words on average (at most {MOST_ON_AVERAGE:g}), {len(too_long(found))} too long")
    return int(bool(too_long(found)) or average(found) > MOST_ON_AVERAGE)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

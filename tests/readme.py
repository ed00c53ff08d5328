"""Write the table of methods into README.md, between two comments: `python tests/readme.py`."""

import re
from pathlib import Path

from pflbench.core import registry
from pflbench.reports.render import grid

README = Path(__file__).parents[1] / "README.md"
_PLACE = re.compile(r"(<!-- methods: python tests/readme.py -->\n).*?(<!-- end of methods -->)", re.DOTALL)


def table() -> str:
    """Return the methods of `algorithms/`, by family and year, as Markdown."""
    folder = Path(__file__).parents[1] / "algorithms"
    names = [name for name in registry.algorithms() if (folder / f"{name.replace('-', '_')}.py").exists()]
    found = {name: registry.facts(name) for name in names}
    first = {facts["family"]: min(f["year"] or 0 for f in found.values() if f["family"] == facts["family"])
             for facts in found.values()}  # fmt: skip
    order = sorted(found.items(), key=lambda item: (first[item[1]["family"]], item[1]["family"], item[1]["year"] or 0))
    head, lines = ["method", "`--algo`", "family", "paper", "personal", "sent"], []
    for name, facts in order:
        paper = f"{facts['venue']} {facts['year']}" if facts["year"] else "-"
        personal = re.split(r"[;.:]|, which", facts["personal"])[0]
        lines.append([facts["title"], f"`{name}`", facts["family"], paper, personal, facts["sent"]])
    return grid(head, lines, left=len(head)) + "\n"


def page(text: str) -> str:
    """Return the README with a current table."""
    return _PLACE.sub(lambda place: f"{place[1]}{table()}{place[2]}", text)


if __name__ == "__main__":
    README.write_text(page(README.read_text(encoding="utf-8")), encoding="utf-8")

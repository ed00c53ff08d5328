"""README.md and docs/ agree with the repository."""

import re
from pathlib import Path

import readme

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_shows_the_whole_file_of_fedprox():
    assert f"```python\n{(ROOT / 'algorithms' / 'fedprox.py').read_text(encoding='utf-8')}```" in README


def test_the_table_of_methods_is_current():
    assert readme.page(README) == README, "run: python tests/readme.py"


def test_links_lead_to_files_of_the_repository():
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")):
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"

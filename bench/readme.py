"""Tables of the README, between markers, each rewritten from its committed record."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
RECORDS = ROOT / "bench" / "records"


def replaced(readme: str, name: str, text: str) -> str:
    """The README with what stands between `<!-- name -->` and `<!-- /name -->` replaced."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    for marker in (begin, end):
        if readme.count(marker) != 1:
            raise ValueError(f"README.md holds {marker} {readme.count(marker)} times, not once")
    before, rest = readme.split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}\n{text.strip()}\n{end}{after}"

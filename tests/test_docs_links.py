"""Links between the pages lead to files and headings; tables are whole; pages are short."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "bids_examples" / "README.md"]


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def prose(page: Path) -> str:
    """Text of a page without its code blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def links(page: Path) -> list[tuple[Path, str]]:
    """File and anchor of every relative link of a page."""
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    local = (target.partition("#") for target in targets if "://" not in target)
    here = page.parent
    return [((here / file).resolve() if file else page, anchor) for file, _, anchor in local]


def anchors(page: Path) -> list[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for target, anchor in links(page):
        assert target.exists(), f"{target} does not exist"
        assert not anchor or anchor in anchors(target), f"{target.name} has no heading #{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_headings_of_a_page_differ(page: Path) -> None:
    found = anchors(page)
    assert len(set(found)) == len(found), "two headings with one anchor"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_rows_of_a_table_have_as_many_cells_as_its_head(page: Path) -> None:
    for table in re.findall(r"(?:^\|.*\n)+", prose(page), re.MULTILINE):
        rows = [re.sub(r"\\\|", "", row).count("|") for row in table.splitlines()]
        assert len(set(rows)) == 1, table


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_a_page_can_be_scanned(page: Path) -> None:
    generated = page.name == "parameters.md"
    assert generated or len(page.read_text().splitlines()) <= 400


def test_every_page_is_reached_from_the_index() -> None:
    index = ROOT / "docs" / "index.md"
    reached, new = set[Path](), {index}
    while new:
        reached |= new
        found = {target for page in new for target, _ in links(page)}
        new = {page for page in found if page.suffix == ".md" and page.is_file()} - reached
    assert set((ROOT / "docs").rglob("*.md")) <= reached

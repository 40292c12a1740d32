"""The report in a real browser: headless Chromium, from file://, without network."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_reports import PAGES, make_output

ROWS = '[aria-labelledby="subjects"] tbody a'
"""Links of the index to acquisitions."""

FLAGS = [
    "--no-sandbox",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("chromium is not installed")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_output(tmp_path_factory.mktemp("out") / "derivatives")


@pytest.fixture
def tab(browser: Any) -> Iterator[Any]:
    """A tab that notes what it should not do."""
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    tab.complaints = []
    tab.on("console", lambda message: tab.complaints.append(message.text))
    tab.on("pageerror", lambda error: tab.complaints.append(str(error)))
    tab.on("requestfailed", lambda request: tab.complaints.append(f"failed: {request.url[:80]}"))
    tab.on(
        "request",
        lambda request: (
            request.url.startswith(("file:", "data:"))
            or tab.complaints.append(f"request: {request.url[:80]}")
        ),
    )
    yield tab
    tab.close()


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("name", PAGES)
def test_a_page_draws_everything_quietly(tab: Any, output: Path, name: str, width: int) -> None:
    tab.set_viewport_size({"width": width, "height": 900})
    tab.goto((output / f"{name}.html").as_uri())
    assert tab.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    assert tab.locator("img").count() == (13 if name == "sub-01" else 0)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width, "it runs off the side"
    assert tab.complaints == []


def test_pictures_are_large_on_a_desktop(tab: Any, output: Path) -> None:
    tab.goto((output / "sub-01.html").as_uri())
    widths = tab.evaluate("[...document.images].map(i => i.clientWidth).filter(w => w > 0)")
    assert min(widths) > 900


def test_the_two_fields_are_looked_at_in_turn(tab: Any, output: Path) -> None:
    tab.goto((output / "sub-01.html").as_uri())
    total, local = (tab.locator(f'img[alt^="{name} field"]') for name in ("Total", "Local"))
    assert total.is_visible()
    assert not local.is_visible()
    tab.get_by_text("Local field", exact=True).first.click()
    assert local.is_visible()
    assert not total.is_visible()
    tab.keyboard.press("ArrowLeft")
    assert total.is_visible()


def test_the_index_leads_to_every_subject_and_back(tab: Any, output: Path) -> None:
    tab.goto((output / "index.html").as_uri())
    targets = tab.locator(ROWS).evaluate_all("links => links.map(link => link.href)")
    assert len(targets) == 4
    for place, target in enumerate(targets):
        tab.locator(ROWS).nth(place).click()
        assert tab.url == target
        assert tab.locator(":target").count() == 1, "the acquisition's own place"
        tab.get_by_role("link", name="All subjects").click()
        assert tab.url.endswith("index.html")
    assert tab.complaints == []


def test_messages_stay_text(tab: Any, output: Path) -> None:
    dialogs: list[str] = []
    tab.on("dialog", lambda dialog: dialogs.append(dialog.message))
    tab.goto((output / "sub-01.html").as_uri())
    assert dialogs == []
    assert "<script>alert('x')</script>" in tab.locator(".messages").inner_text()


def test_dark_mode_is_dark(browser: Any, output: Path) -> None:
    tab = browser.new_page(color_scheme="dark")
    tab.goto((output / "sub-01.html").as_uri())
    colour = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert max(int(part) for part in colour.strip("rgb()").split(",")) < 60
    tab.close()

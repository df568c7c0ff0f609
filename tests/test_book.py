"""The book in a real browser: its pages, at two widths, light and dark, without a network."""

import pytest
from browser import find_chromium
from playwright.sync_api import sync_playwright

from tools import book

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not find_chromium(), reason="no Chromium: install Debian's chromium, or name another in $CHROMIUM"),
]
BROKEN = "[...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src)"
UNREAD = "[...document.images].every(i => (i.loading = 'eager') && i.complete)"


@pytest.fixture(scope="module")
def html(tmp_path_factory):
    """The folder of the built book."""
    page, warnings = book.build(tmp_path_factory.mktemp("book"))
    assert warnings == 0  # such as a link that leads nowhere
    return page.parent


@pytest.fixture(scope="module")
def browser():
    arguments = ["--no-sandbox", "--disable-dev-shm-usage", "--host-resolver-rules=MAP * ~NOTFOUND"]
    with sync_playwright() as playwright, playwright.chromium.launch(executable_path=find_chromium(), args=arguments) as opened:
        yield opened


def test_every_page_is_whole(html, browser):
    page, faults = browser.new_page(), []
    folders = [sorted(html.glob(names)) for names in ("*.html", "notebooks/*.html", "benchmarks/*.html", "reference/*.html")]
    pages = sum(folders[:-1], folders[-1][::5])  # the reference's are all made alike
    page.on("console", lambda message: message.type in ("error", "warning") and faults.append(message.text))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("request", lambda asked: asked.url.startswith(("file:", "data:", "blob:")) or faults.append(asked.url))
    for path in pages:
        page.goto(path.as_uri())
        page.wait_for_function(UNREAD)
        for width, scheme in ((1280, "light"), (700, "dark")):
            page.set_viewport_size({"width": width, "height": 900})
            page.emulate_media(color_scheme=scheme)
            page.wait_for_function(f"document.documentElement.dataset.theme == '{scheme}'")
            assert page.evaluate("document.documentElement.scrollWidth") <= width, path
        assert page.evaluate(BROKEN) == [] and faults == [], path
    assert len(folders[1]) == 9 and len(folders[-1]) == len({*book.modules("pgdlib"), *book.modules("pgdlib.lab")})


def test_a_claim_leads_to_the_cells_that_judge_it(html, browser):
    page = browser.new_page()
    page.goto(f"{(html / 'index.html').as_uri()}#the-papers-claims")
    links = [link.get_attribute("href") for link in page.locator("td:has-text('C2'):has(a) >> nth=0").locator("a").all()]
    assert links == ["notebooks/04_guidance.html#04-verdicts", "notebooks/05_iql_benchmark.html#05-own-c2"]
    page.goto(f"{html.as_uri()}/{links[0]}")
    assert "claims.error_not_raised(" in page.locator('[id="04-verdicts"]').inner_text()


def test_search_finds_without_a_network(html, browser):
    page = browser.new_page()
    page.goto(f"{(html / 'search.html').as_uri()}?q=annealed")
    page.wait_for_selector("ul.search li a")
    found = [link.get_attribute("href").partition("?")[0] for link in page.locator("ul.search li a").all()]
    assert any("08_rules" in link for link in found) and any("pgdlib.guidance" in link for link in found), found

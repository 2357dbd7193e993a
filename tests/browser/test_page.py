"""The page as people use it: from a folder of photographs to a served model, with mistakes, reloads and lost servers."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from browsing import CLASSES, Visit, photograph
from playwright.sync_api import Page, expect

pytestmark = pytest.mark.browser

SIZES = [{"width": 1280, "theme": "light"}, {"width": 390, "theme": "dark", "language": "de"}]
WORDS = {
    "en": {
        "compare": "Compare them", "try": "Try it",
        "live": "Make it live", "back": "Back to what was live before", "settings": "More settings", "name": "Name of the model",
        "source": "Pictures to train on", "seeds": "Runs of each way", "look": "Where did it look?",
        "close": "Close",
    },
    "de": {
        "compare": "Vergleichen", "try": "Testen",
        "live": "Live schalten", "back": "Zurück zu dem, was vorher live war", "settings": "Weitere Einstellungen",
        "name": "Name des Modells", "source": "Bilder zum Trainieren", "seeds": "Läufe je Weg",
        "look": "Wohin hat es geschaut?", "close": "Schließen",
    },
}  # fmt: skip


def words(page: Page) -> dict[str, str]:
    return WORDS[page.evaluate("document.documentElement.lang")]


def choose_a_tiny_network(page: Page) -> None:
    page.get_by_text(words(page)["settings"], exact=True).click()
    page.get_by_label("backbone", exact=True).fill("test_resnet")
    page.get_by_label("weights", exact=True).fill("none")
    page.get_by_label("input_size_px", exact=True).fill("64")
    page.get_by_label("n_epochs", exact=True).fill("2")
    page.get_by_label("threads", exact=True).fill("1")


def accessible(page: Page) -> None:
    """Assert that axe finds nothing, and that nothing is wider than the window."""
    page.wait_for_selector("main:not([aria-busy]) h1")
    if folder := os.environ.get("FINETUNE_SCREENSHOTS"):
        name = f"{page.viewport_size['width']}-{len(list(Path(folder).iterdir())):03d}.png"  # type: ignore[index]
        page.screenshot(path=Path(folder) / name, full_page=page.locator("dialog").count() == 0)
    found = Axe().run(page, options={"resultTypes": ["violations"]})
    assert found.violations_count == 0, found.generate_report()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page scrolls sideways"


@pytest.mark.parametrize("visit", SIZES, indirect=True, ids=["desktop", "phone"])
def test_from_a_folder_of_photographs_to_a_served_model_and_back(visit: Visit, photographs: Path) -> None:
    page = visit.page
    visit.go("")
    say = words(page)
    expect(page.locator(".view-train")).to_be_visible()  # nothing is here yet, so the page begins where one begins
    accessible(page)
    for place in ("try", "runs", "compare", "models", "data"):
        visit.go(place)
        expect(page.locator(".empty, .card").first).to_be_visible()
        accessible(page)

    # Upload and train, with a mistake first.
    visit.go("train")
    page.locator("#train-folder").set_input_files(photographs)
    expect(page.locator(".class-card")).to_have_count(len(CLASSES))
    page.get_by_label(say["name"]).fill("Flowers")
    choose_a_tiny_network(page)
    page.get_by_label("learning_rate", exact=True).fill("-1")
    page.locator("button[type=submit]").click()
    expect(page.get_by_label("learning_rate", exact=True)).to_have_attribute("aria-invalid", "true")
    accessible(page)
    page.get_by_label("learning_rate", exact=True).fill("")
    page.locator("button[type=submit]").click()
    page.wait_for_url(re.compile("#/runs/ftjob-"))
    page.reload()
    accessible(page)
    expect(page.locator(".accuracy")).to_be_visible()
    accessible(page)

    # The result: pictures behind a cell of the matrix, and where the model looked at a mistake.
    page.locator(".confusion button").first.click()
    expect(page.locator("dialog img.thumbnail").first).to_have_js_property("complete", True)
    accessible(page)
    page.locator("dialog").get_by_role("button", name=say["close"]).click()
    page.locator(".gallery .tile").first.click()
    page.get_by_role("button", name=say["look"]).click()
    expect(page.locator("dialog .bars li").first).to_be_visible()
    page.keyboard.press("Escape")

    # Try it.
    page.get_by_role("link", name=say["try"]).first.click()
    page.locator("#try-file").set_input_files({"name": "a rose.jpg", "mimeType": "image/jpeg", "buffer": photograph(1, 99)})
    expect(page.locator(".answer .bars li")).to_have_count(len(CLASSES))
    expect(page.locator(".code")).to_contain_text("curl -F 'image=@a rose.jpg'")
    accessible(page)

    # Compare two ways on the same pictures.
    visit.go("train")
    page.get_by_label(say["source"]).select_option(index=1)
    page.get_by_text(say["compare"], exact=True).locator("visible=true").last.click()
    page.get_by_label(say["seeds"]).fill("1")
    page.get_by_label(say["name"]).fill("Flowers")
    choose_a_tiny_network(page)
    page.locator("button[type=submit]").click()
    page.wait_for_url(re.compile("#/compare/ftcmp-"))
    page.reload()
    expect(page.locator(".verdict")).to_be_visible()
    expect(page.locator(".chart svg").first).to_be_visible()
    accessible(page)

    # Promote what it chose, but not under a condition that it does not meet; and go back.
    page.get_by_role("button", name=say["live"]).click()
    page.locator("dialog input[type=number]").fill("100")
    page.locator("dialog").get_by_role("button", name=say["live"]).click()
    expect(page.locator("dialog [role=alert]")).to_contain_text("test/top1")
    accessible(page)
    page.locator("dialog input[type=number]").fill("")
    page.locator("dialog").get_by_role("button", name=say["live"]).first.click()
    expect(page.locator("dialog")).to_have_count(0)
    visit.go("models")
    expect(page.locator(".live .figure")).to_have_text("flowers @ 2")
    accessible(page)
    page.get_by_role("button", name=say["back"]).click()
    expect(page.locator(".live .figure")).to_have_text("flowers @ 1")

    visit.go("data")
    page.locator(".card a").first.click()
    expect(page.locator(".virtual img.thumbnail").first).to_have_js_property("complete", True)
    accessible(page)
    expected = ("422", "409")  # the refusals above, which the console reports too
    assert [error for error in visit.errors if not any(code in error for code in expected)] == []

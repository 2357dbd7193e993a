"""The page as people use it: from a folder of photographs to a served model, with mistakes, reloads and lost servers."""

from __future__ import annotations

import contextlib
import os
import re
import signal
from collections.abc import Sequence
from pathlib import Path

import httpx
import pytest
from archives import zip_of
from axe_playwright_python.sync_playwright import Axe
from browsing import CLASSES, ENVIRONMENT, Visit, photograph
from playwright.sync_api import Page, Route, expect
from serving import live_server, registered, until
from standin import write_bundle

from finetune.jobs.database import open_jobs
from finetune.jobs.keys import KeyStore

pytestmark = [pytest.mark.browser, pytest.mark.timeout(1800)]  # the whole way takes minutes, on a busy machine many

SIZES = [{"width": 1280, "theme": "light"}, {"width": 390, "theme": "dark", "language": "de"}]
WORDS = {
    "en": {
        "compare": "Compare them", "try": "Try it",
        "live": "Make it live", "back": "Back to what was live before", "settings": "More settings", "name": "Name of the model",
        "source": "Pictures to train on", "seeds": "Runs of each way", "look": "Where did it look?",
        "close": "Close", "correct": "Correct the label", "relabel": "Change the class", "save": "Save as a new version",
    },
    "de": {
        "compare": "Vergleichen", "try": "Testen",
        "live": "Live schalten", "back": "Zurück zu dem, was vorher live war", "settings": "Weitere Einstellungen",
        "name": "Name des Modells", "source": "Bilder zum Trainieren", "seeds": "Läufe je Weg",
        "look": "Wohin hat es geschaut?", "close": "Schließen",
        "correct": "Beschriftung berichtigen", "relabel": "Klasse ändern", "save": "Als neue Version speichern",
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
        number = len(list(Path(folder).iterdir()))
        name = f"{page.viewport_size['width']}-{os.getpid()}-{number:03d}.png"  # type: ignore[index]
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
    expect(page.locator(".network")).to_contain_text(["", "2", "5", ""])  # how many stages of this network
    expect(page.locator(".estimate span")).to_have_count(4)
    accessible(page)
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

    # A mistake may be a wrong label: correct it, in a new version of the data.
    page.locator(".gallery .tile").first.click()
    page.get_by_role("link", name=say["correct"]).click()
    page.wait_for_url(re.compile("#/data/file-"))
    before = page.url.split("/")[5]
    chosen = page.locator("dialog select").input_value()
    page.locator("dialog select").select_option(next(name for name in CLASSES if name != chosen))
    page.locator("dialog").get_by_role("button", name=say["relabel"]).click()
    expect(page.locator(".pending")).to_contain_text("1 ")
    accessible(page)
    page.get_by_role("button", name=say["save"]).click()
    page.wait_for_url(lambda url: "#/data/file-" in url and before not in url)
    expect(page.locator(".pending:empty")).to_have_count(1)
    visit.go("runs")
    page.locator(".card a").first.click()

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


def test_the_first_model_takes_at_most_six_clicks(visit: Visit, tmp_path: Path) -> None:
    """From a folder of 150 photographs of 4 classes to an answer of the model, with nothing but defaults."""
    page = visit.page
    folder = tmp_path / "shapes"
    for label, name in enumerate(("circle", "line", "square", "star")):
        (folder / name).mkdir(parents=True)
        for number in range(38 if label < 2 else 37):
            (folder / name / f"{number:02d}.jpg").write_bytes(photograph(label, number))
    refused: list[str] = []

    def busy_at_first(route: Route) -> None:
        if route.request.url in refused:
            route.continue_()
        else:
            refused.append(route.request.url)
            route.fulfill(status=503, json={"code": "overloaded", "detail": "Try again in a moment"})

    page.route("**/v1/fine_tuning/jobs", busy_at_first)
    page.route("**/v1/fine_tuning/plans", busy_at_first)
    page.add_init_script("window.clicks = 0; addEventListener('pointerdown', (event) => { clicks += event.isTrusted; }, true)")
    visit.go("")
    with page.expect_file_chooser() as chooser:
        page.get_by_text("Choose a folder", exact=True).click()
    chooser.value.set_files(folder)
    expect(page.locator(".estimate span")).to_have_count(4)  # the page has asked again
    page.get_by_role("button", name="Train", exact=True).click()
    expect(page.locator(".accuracy")).to_be_visible()
    page.get_by_role("link", name="Try it").first.click()
    with page.expect_file_chooser() as chooser:
        page.get_by_text("Choose a picture", exact=True).click()
    chooser.value.set_files({"name": "a star.jpg", "mimeType": "image/jpeg", "buffer": photograph(3, 99)})
    expect(page.locator(".answer .bars li")).to_have_count(4)
    assert 1 <= page.evaluate("clicks") <= 6, "a click too many before the first answer"
    assert len(refused) == 2
    expected = ("422", "503")  # the model may not know when it is unsure, and the server was busy
    assert [error for error in visit.errors if not any(code in error for code in expected)] == []


def test_a_key_is_asked_for_kept_in_memory_alone_and_decides_what_is_shown(visit: Visit, tmp_path: Path) -> None:
    page = visit.page
    keys = KeyStore(open_jobs(tmp_path / "home"))
    trainer, _ = keys.create("ann", ("jobs", "predict"))
    asker, _ = keys.create("bob", ("predict",))
    until(lambda: httpx.get(f"{visit.server.url}/v1/caller", timeout=60).status_code == 401)
    page.goto(visit.server.url)
    accessible(page)
    page.get_by_label("API key").fill("ft_wrong")
    page.get_by_role("button", name="Use this key").click()
    expect(page.get_by_role("alert")).to_contain_text("not accepted")
    page.get_by_label("API key").fill(trainer)
    page.get_by_role("button", name="Use this key").click()
    expect(page.locator("#who")).to_contain_text("ann")
    expect(page.locator("nav li:visible")).to_have_count(6)
    expect(page.locator(".view-train")).to_be_visible()
    accessible(page)
    stored = page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie, location.href])")
    assert trainer not in stored
    page.reload()
    page.get_by_label("API key").fill(asker)
    page.get_by_role("button", name="Use this key").click()
    expect(page.locator("nav li:visible")).to_have_text(["Models", "Try"])
    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_label("API key")).to_be_visible()


def kill(processes: Sequence[int]) -> None:
    """Kill processes, the youngest first; some end by themselves when those that they wait for do."""
    for process in reversed(processes):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def test_a_run_is_found_again_after_its_worker_and_then_the_server_were_killed(
    visit: Visit, photographs: Path, tmp_path: Path
) -> None:
    page = visit.page
    visit.go("train")
    page.locator("#train-folder").set_input_files(photographs)
    choose_a_tiny_network(page)
    page.get_by_label("n_epochs", exact=True).fill("600")
    page.get_by_label("early_stopping_epochs", exact=True).fill("600")  # it must still train when the server is back
    page.get_by_text("Better", exact=True).click()
    page.locator("button[type=submit]").click()
    page.wait_for_url(re.compile("#/runs/ftjob-"))
    expect(page.locator(".phases .now")).to_have_text(re.compile("Computing features|Training"))  # an idle machine is soon done
    _, *worker = visit.server.process_tree()
    kill(worker)
    expect(page.get_by_text("The process that worked on it is gone")).to_be_visible()  # when its lease has run out
    kill(visit.server.process_tree())
    visit.server.process.wait()
    expect(page.get_by_text("The connection is lost.")).to_be_visible()
    port = int(visit.server.url.rpartition(":")[2])
    with live_server(tmp_path / "home", worker=True, ready=False, port=port, environment=ENVIRONMENT):
        expect(page.get_by_text("The connection is lost.")).to_have_count(0)
        page.get_by_role("button", name="Stop training").click()
        expect(page.locator(".state-cancelled")).to_be_visible()


def test_thousands_of_thumbnails_exist_only_where_they_are_seen(shared_visit: Visit) -> None:
    page = shared_visit.page
    picture = photograph(0, 0, 32)
    archive = zip_of({f"{name}/{number:04d}.jpg": picture for name in ("a", "b") for number in range(1200)})
    sent = {"file": ("many.zip", archive)}
    file = httpx.post(f"{shared_visit.server.url}/v1/files", files=sent, data={"purpose": "fine-tune"}, timeout=240).json()
    shared_visit.go(f"data/{file['id']}")
    for position in (0.25, 0.5, 0.75, 1):
        page.evaluate(f"scrollTo(0, {position} * document.documentElement.scrollHeight)")
        expect(page.locator(".cell img[src]").first).to_be_visible()
        assert page.locator(".cell").count() < 400
    expect(page.locator('[aria-posinset="2400"] img[src]')).to_be_visible()


def test_an_upload_goes_on_after_a_lost_connection_and_after_a_reload(shared_visit: Visit, tmp_path: Path) -> None:
    page = shared_visit.page
    page.on("dialog", lambda dialog: dialog.accept())  # "leave this page?"
    archive = tmp_path / "large.zip"
    megabyte = os.urandom(1 << 20)
    archive.write_bytes(zip_of({f"{name}/{n}.jpg": photograph(n % 2, n, 32) + megabyte for name in "ab" for n in range(13)}))
    arrived: list[str] = []
    connected = False

    def on_the_way(route: Route) -> None:
        if arrived and not connected:
            route.abort()
        else:
            arrived.append(route.request.url)
            route.continue_()

    page.route("**/v1/uploads/*/parts", on_the_way)
    page.route("**/v1/fine_tuning/jobs", lambda route: route.abort())
    shared_visit.go("train")
    page.locator("#train-files").set_input_files(archive)
    page.locator("button[type=submit]").click()
    expect(page.get_by_text("sending goes on by itself")).to_be_visible()
    accessible(page)
    page.reload()
    connected = True
    page.locator("#train-files").set_input_files(archive)
    page.locator("button[type=submit]").click()
    expect(page.get_by_role("alert")).to_be_visible()  # the job cannot be sent; the pictures have arrived
    files = httpx.get(f"{shared_visit.server.url}/v1/files", timeout=60).json()["data"]
    (file,) = (one for one in files if one["filename"] == "large.zip")
    assert file["summary"]["counts"] == {"all": {"a": 13, "b": 13}}
    assert len(arrived) == 4  # parts of 8 MiB, each once
    assert len(set(arrived)) == 1


def test_what_an_examination_finds_is_dealt_with_by_its_button(shared_visit: Visit) -> None:
    page = shared_visit.page
    pictures = {f"{name}/{n:02d}.jpg": photograph(label, n) for label, name in enumerate("ab") for n in range(12)}
    copies = {f"a/copy-{n}.jpg": photograph(0, n) for n in range(3)}
    sent = {"file": ("letters.zip", zip_of({**pictures, **copies}))}
    file = httpx.post(f"{shared_visit.server.url}/v1/files", files=sent, data={"purpose": "fine-tune"}, timeout=240).json()
    shared_visit.go(f"data/{file['id']}")
    page.get_by_role("button", name="Examine the pictures").click()
    leave_out = page.get_by_role("button", name="Leave 3 pictures out")
    expect(leave_out).to_be_visible()
    accessible(page)
    page.locator("#language").select_option("de")  # what the server has found is said in the person's language too
    expect(page.get_by_role("heading", name="Dateien mit genau demselben Inhalt")).to_be_visible()
    accessible(page)
    page.locator("#language").select_option("en")
    expect(page.get_by_role("heading", name="Files with the same bytes")).to_be_visible()

    copies_card = page.locator(".findings section").filter(has=page.get_by_role("heading", name="Files with the same bytes"))
    copies_card.get_by_role("button", name="as they should be").click()
    expect(leave_out).to_have_count(0)
    expect(page.get_by_text("was accepted").or_(page.get_by_text("were accepted"))).to_be_visible()
    accessible(page)
    page.get_by_role("button", name="Show again").click()
    expect(leave_out).to_be_visible()

    def found_in_two_ways(route: Route) -> None:
        answer = route.fetch()
        found = answer.json()
        again = [
            {
                **one,
                "kind": "again",
                "title": "Found again",
                "cases": [{**case, "ids": case["ids"][::-1]} for case in one["cases"]],
            }
            for one in found["findings"]
            if one["kind"] == "duplicates"
        ]
        route.fulfill(response=answer, json={**found, "findings": [*found["findings"], *again]})

    page.route("**/v1/checks/*/result", found_in_two_ways)
    page.reload()  # what was found is there again
    expect(page.get_by_text("Found again")).to_be_visible()
    for button in page.get_by_role("button", name=re.compile(r"Leave \d+ pictures? out")).all():
        button.click()  # one of each picture stays, whatever is chosen
    expect(page.locator(".pending")).to_contain_text("change")
    page.get_by_role("button", name="Save as a new version").click()
    page.wait_for_url(lambda url: "#/data/file-" in url and file["id"] not in url)
    expect(page.locator("main")).to_contain_text("24 pictures")
    assert shared_visit.errors == []


def test_several_pictures_are_corrected_together_and_taken_back_together(shared_visit: Visit) -> None:
    page = shared_visit.page
    archive = zip_of(
        {f"{name}/{number:02d}.jpg": photograph(label, number, 32) for label, name in enumerate("ab") for number in range(8)}
    )
    sent = {"file": ("letters.zip", archive)}
    file = httpx.post(f"{shared_visit.server.url}/v1/files", files=sent, data={"purpose": "fine-tune"}, timeout=240).json()
    shared_visit.go(f"data/{file['id']}")
    page.get_by_role("button", name="Choose several").click()
    tiles = page.locator(".tile")
    tiles.nth(0).click()
    tiles.nth(4).click(modifiers=["Shift"])
    expect(page.locator('.tile[aria-pressed="true"]')).to_have_count(5)
    tiles.nth(2).click()
    expect(page.get_by_text("4 pictures chosen")).to_be_visible()
    page.get_by_label("These are").fill("c")
    accessible(page)
    page.get_by_role("button", name="Change the class").click()
    expect(page.locator(".tile-note")).to_have_count(4)
    tiles.nth(15).click()
    page.get_by_role("button", name="Leave out").click()
    expect(page.locator(".tile-note")).to_have_text(["c", "c", "c", "c", "left out"])
    page.get_by_role("button", name="Undo the last").click()
    expect(page.locator(".tile-note")).to_have_text(["c", "c", "c", "c"])
    page.get_by_role("button", name="Save as a new version").click()
    page.wait_for_url(lambda url: "#/data/file-" in url and file["id"] not in url)
    expect(page.locator("section").filter(has=page.get_by_role("heading", name="Classes")).locator(".bars li")).to_have_text(
        [re.compile("a.*4"), re.compile("b.*8"), re.compile("c.*4")]
    )
    assert shared_visit.errors == []


def test_pictures_with_labels_in_a_table_are_shown_and_corrected(shared_visit: Visit) -> None:
    page = shared_visit.page
    pictures = {f"{number:02d}.jpg": photograph(number % 2, number, 32) for number in range(12)}
    table = "\n".join(["file,label", *(f"{name},{'ab'[number % 2]}" for number, name in enumerate(pictures))])
    sent = {"file": ("table.zip", zip_of({**pictures, "labels.csv": table.encode()}))}
    file = httpx.post(f"{shared_visit.server.url}/v1/files", files=sent, data={"purpose": "fine-tune"}, timeout=240).json()
    shared_visit.go(f"data/{file['id']}")
    expect(page.locator(".cell img[src]")).to_have_count(12)
    accessible(page)
    page.locator(".tile").first.click()
    page.locator("dialog select").select_option("b")
    page.locator("dialog").get_by_role("button", name="Change the class").click()
    page.get_by_role("button", name="Save as a new version").click()
    page.wait_for_url(lambda url: "#/data/file-" in url and file["id"] not in url)
    expect(page.locator("section").filter(has=page.get_by_role("heading", name="Classes")).locator(".bars li")).to_have_text(
        [re.compile("a.*5"), re.compile("b.*7")]
    )
    assert shared_visit.errors == []


def test_a_model_is_taken_along_in_the_formats_that_the_server_can_write(shared_visit: Visit, tmp_path: Path) -> None:
    registered(shared_visit.server.home, write_bundle(tmp_path / "bundle"), "luggage")
    page = shared_visit.page
    shared_visit.go("models/luggage")
    page.get_by_role("button", name="Download").click()
    dialog = page.locator("dialog")
    expect(dialog.get_by_role("button", name="Download: Weights for timm (PyTorch)")).to_be_visible()
    accessible(page)
    with page.expect_download() as download:
        dialog.get_by_role("link", name="Download: Everything, as it runs here").click()
    assert download.value.suggested_filename == "luggage-1.tar"
    dialog.get_by_role("button", name="Download: All weights in one file").click()  # this bundle has no weights
    expect(dialog.get_by_role("alert")).to_be_visible()
    assert len(shared_visit.errors) == 1  # the refusal


def test_a_webcam_is_answered_live(shared_visit: Visit, tmp_path: Path) -> None:
    registered(shared_visit.server.home, write_bundle(tmp_path / "bundle"))
    page = shared_visit.page
    shared_visit.go("try")
    page.get_by_role("button", name="Use the webcam").click()
    expect(page.locator(".answer .bars li")).to_have_count(3)
    accessible(page)
    page.get_by_role("button", name="Stop the webcam").click()
    expect(page.get_by_role("button", name="Use the webcam")).to_be_visible()
    assert shared_visit.errors == [error for error in shared_visit.errors if "422" in error]

"""Run an exported model in OpenVINO and in ONNX Runtime Web, each in an environment of its own, and compare with ONNX Runtime.

Run it with a Python that has the train and dev dependencies, where `npm` and a network are. The page that `--format web` writes
is opened too, where Chromium is installed.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from processes import run

REPOSITORY = Path(__file__).resolve().parent.parent
OPENVINO = "openvino==2026.4.1"
RUNTIME_WEB = "onnxruntime-web@1.30.0"
TOLERANCE = 5e-6
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM_FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")

IN_NODE = """
import * as ort from "onnxruntime-web";
import { readFileSync } from "node:fs";
ort.env.wasm.numThreads = 1;
const [model, pixels, shape] = process.argv.slice(2);
const session = await ort.InferenceSession.create(readFileSync(model));
const size = JSON.parse(shape);
const images = new ort.Tensor("uint8", new Uint8Array(readFileSync(pixels)), size);
const answer = await session.run({ images }, ["probs"]);
console.log(JSON.stringify(Array.from(answer.probs.data)));
"""


def main() -> None:
    assert shutil.which("npm"), "needs npm (Debian: apt-get install npm)"
    with tempfile.TemporaryDirectory(prefix="finetune-formats-") as name:
        folder = Path(name)
        make_bundle(folder)
        print("formats: OpenVINO:", check_openvino(folder), flush=True)
        print("formats: ONNX Runtime Web:", check_web(folder), flush=True)
    print("formats: all checks passed", flush=True)


def make_bundle(folder: Path) -> None:
    """Write a bundle with the checkout's test helpers, images, and what ONNX Runtime answers to them."""
    script = (
        "import sys; from pathlib import Path; import numpy as np; folder = Path(sys.argv[1]); "
        "from exporting import FACTS, classifier_of, export_classifier, pictures; "
        "from finetune.export.formats.bundle import Opened; "
        "export_classifier(classifier_of('test_efficientnet'), FACTS, pictures(folder, 4), folder / 'bundle'); "
        "opened = Opened(folder / 'bundle'); (folder / 'images.bin').write_bytes(opened.images.tobytes()); "
        "np.savez(folder / 'answers.npz', shape=opened.images.shape, probs=opened.outputs.probs)"
    )
    run([sys.executable, "-c", script, str(folder)], environment={"PYTHONPATH": f"{REPOSITORY / 'tests'}:{REPOSITORY}"})


def check_openvino(folder: Path) -> str:
    """Let `finetune export` write and compare OpenVINO's format, without anything that trains."""
    run([sys.executable, "-m", "venv", str(folder / "environment")])
    python = folder / "environment" / "bin" / "python"
    constraints = str(REPOSITORY / "constraints.txt")
    run([str(python), "-m", "pip", "install", "--quiet", "--constraint", constraints, str(REPOSITORY), OPENVINO])
    command = [str(python.with_name("finetune")), "export", str(folder / "bundle"), "--format", "openvino"]
    return run([*command, "--out", str(folder / "openvino")], cwd=folder, stderr_too=True).strip()


def check_web(folder: Path) -> str:
    """Run the model in ONNX Runtime Web, then the page in a browser."""
    web = folder / "web"
    web.mkdir()
    (web / "package.json").write_text(json.dumps({"private": True, "type": "module"}))
    run(["npm", "install", "--silent", "--no-audit", "--no-fund", RUNTIME_WEB], cwd=web)
    (web / "run.mjs").write_text(IN_NODE)
    with np.load(folder / "answers.npz") as known:
        shape, probs = [int(side) for side in known["shape"]], known["probs"]
    said = run(["node", "run.mjs", str(folder / "bundle" / "model.onnx"), str(folder / "images.bin"), json.dumps(shape)], cwd=web)
    given = np.array(json.loads(said.strip().splitlines()[-1]), np.float32).reshape(probs.shape)
    difference = float(np.abs(given - probs).max())
    assert difference <= TOLERANCE, f"probabilities differ by {difference:.2g}"
    return f"probabilities differ by {difference:.1g} at most; {check_page(folder, web)}"


def check_page(folder: Path, web: Path) -> str:
    """Open the page in Chromium and let it classify a picture that it is given; its answer is the bundle's."""
    finetune = [sys.executable, "-m", "finetune", "export", str(folder / "bundle"), "--format", "web"]
    runtime = web / "node_modules" / "onnxruntime-web"
    run(
        [*finetune, "--onnxruntime-web", str(runtime), "--out", str(folder / "page")], environment={"PYTHONPATH": str(REPOSITORY)}
    )
    browser = next((found for name in CHROMIUM if (found := shutil.which(name))), None)
    if browser is None:
        return "the page was not opened: no Chromium here"
    script = f"""
import json, sys
from pathlib import Path
from playwright.sync_api import sync_playwright
from finetune.bundle.predictor import Predictor
picture = Path({str(folder)!r}) / "picture.png"
import numpy as np
from PIL import Image
rng = np.random.default_rng(5)
Image.fromarray(rng.integers(0, 256, (90, 140, 3), dtype=np.uint8)).resize((280, 180)).save(picture)
expected = dict(Predictor.load(Path({str(folder / "bundle")!r})).predict(picture.read_bytes()).labels)
with sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path={browser!r}, args={list(CHROMIUM_FLAGS)!r})
    page = browser.new_page()
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto((Path({str(folder / "page")!r}) / "index.html").as_uri())
    page.get_by_text("Ready.").wait_for(timeout=60000)
    page.set_input_files("#file", str(picture))
    page.locator("#answers tr").first.wait_for(timeout=60000)
    rows = page.locator("#answers tr").all()
    value_of = lambda row: float(row.locator("meter").evaluate("meter => meter.value"))
    given = {{row.locator("td").first.inner_text(): value_of(row) for row in rows}}
    browser.close()
assert not errors, errors
worst = max(abs(given[name] - expected[name]) for name in given)
assert len(given) == len(expected) and worst < 5e-3, (given, expected)
print(f"the page's answer to a picture differs by {{worst:.1g}}")
"""
    (folder / "open_page.py").write_text(script)
    return run([sys.executable, str(folder / "open_page.py")], environment={"PYTHONPATH": str(REPOSITORY)}).strip()


if __name__ == "__main__":
    main()

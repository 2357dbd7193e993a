#!/usr/bin/env python3
"""Generate a Python and a TypeScript client from the server's OpenAPI document, and drive a job with each.

Generators read less of OpenAPI than the standard has, so only generated code that works proves that the document can be used.
Run it with a Python that has the core and dev dependencies, where `npm` is.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import tempfile
import urllib.request
from pathlib import Path

from processes import free_port, run, serving

REPOSITORY = Path(__file__).resolve().parents[1]
GENERATOR = "openapi-python-client==0.29.1"
NPM_PACKAGES = ("openapi-typescript@7.13.0", "openapi-fetch@0.17.0", "typescript@5.9.3")

PYTHON_CLIENT = """
import io, sys
from pathlib import Path
from finetune_client import Client
from finetune_client.api.comparisons import cancel_comparison, comparison_runs, create_comparison
from finetune_client.api.files import upload_file
from finetune_client.api.jobs import cancel_job, create_job, get_job, job_events, list_jobs
from finetune_client.api.models import get_version, list_models
from finetune_client.api.predict import predict_with_default_model
from finetune_client.models import ComparisonCreate, ComparisonDocument, JobCreate, JobDocument, PredictionAnswer, UploadFileBody
from finetune_client.models import ComparisonCreateMethodsItem as Method
from finetune_client.models import UploadFileBodyPurpose
from finetune_client.types import File

client = Client(base_url=sys.argv[1])
archive, image = Path(sys.argv[2]), Path(sys.argv[3])
body = UploadFileBody(file=File(io.BytesIO(archive.read_bytes()), "photos.zip"), purpose=UploadFileBodyPurpose.FINE_TUNE)
file = upload_file.sync(client=client, body=body)
job = create_job.sync(client=client, body=JobCreate(training_file=file.id, suffix="python"))
assert isinstance(job, JobDocument), job
assert get_job.sync(job.id, client=client).status == "queued"
assert cancel_job.sync(job.id, client=client).status == "cancelled"
kinds = [event.kind for event in job_events.sync(job.id, client=client).data]
assert kinds == ["cancelled", "queued"], kinds
assert [one.id for one in list_jobs.sync(client=client).data][0] == job.id
asked = ComparisonCreate(training_file=file.id, methods=[Method.LINEAR_PROBE, Method.FULL], seeds=2)
comparison = create_comparison.sync(client=client, body=asked)
assert isinstance(comparison, ComparisonDocument), comparison
assert [arm.name for arm in comparison.arms] == ["linear_probe", "full"], comparison
assert len(comparison_runs.sync(comparison.id, client=client).data) == 4
assert cancel_comparison.sync(comparison.id, client=client).status == "cancelled"
(model,) = list_models.sync(client=client).data
version = get_version.sync(model.id, model.versions[0].version, client=client)
assert len(version.classes) > 1, version
from finetune_client.models import PredictWithDefaultModelFilesBody as Body
body = Body(image=File(io.BytesIO(image.read_bytes()), "a.png", "image/png"))
answer = predict_with_default_model.sync(client=client, body=body)
assert isinstance(answer, PredictionAnswer), answer
print("job", job.id, "answer", answer.predictions[0].label)
"""

TYPESCRIPT_CLIENT = """
import { readFileSync } from "node:fs";
import createClient from "openapi-fetch";
import type { components, paths } from "./api";

const [url, archive, image] = process.argv.slice(2) as [string, string, string];
const client = createClient<paths>({ baseUrl: url });

function form(fields: Record<string, string | Blob>): FormData {
  const data = new FormData();
  for (const [name, value] of Object.entries(fields)) data.append(name, value);
  return data;
}

function check(condition: boolean, what: unknown): asserts condition {
  if (!condition) throw new Error(JSON.stringify(what));
}

async function main(): Promise<void> {
  const file = await client.POST("/v1/files", {
    body: { file: "", purpose: "fine-tune" },
    bodySerializer: () => form({ file: new File([readFileSync(archive)], "photos.zip"), purpose: "fine-tune" }),
  });
  check(file.data !== undefined, file.error);
  const body: components["schemas"]["JobCreate"] = {
    training_file: file.data.id, suffix: "typescript", method: { type: "partial", stages: 1 },
  } as components["schemas"]["JobCreate"];
  const job = await client.POST("/v1/fine_tuning/jobs", { body });
  check(job.data !== undefined, job.error);
  const path = { job_id: job.data.id };
  const found = await client.GET("/v1/fine_tuning/jobs/{job_id}", { params: { path } });
  check(found.data?.status === "queued", found);
  const cancelled = await client.POST("/v1/fine_tuning/jobs/{job_id}/cancel", { params: { path } });
  check(cancelled.data?.status === "cancelled", cancelled);
  const events = await client.GET("/v1/fine_tuning/jobs/{job_id}/events", { params: { path, query: { order: "asc" } } });
  const page = events.data;
  check(page !== undefined && typeof page === "object" && "data" in page, events);
  check(page.data.map((event) => event.kind).join() === "queued,cancelled", events);
  const wrong = await client.POST("/v1/fine_tuning/jobs", { body: { ...body, seed: -1 } });
  check(wrong.error?.code === "invalid_spec", wrong);
  const compared = await client.POST("/v1/fine_tuning/comparisons", {
    body: {
      training_file: file.data.id, models: ["resnet18", "resnet50"], seeds: 1,
    } as components["schemas"]["ComparisonCreate"],
  });
  check(compared.data?.arms.length === 2, compared);
  const comparison = { comparison_id: compared.data.id };
  const runs = await client.GET("/v1/fine_tuning/comparisons/{comparison_id}/runs", { params: { path: comparison } });
  check(runs.data?.data.map((run) => run.status).join() === "waiting,waiting", runs);
  const ended = await client.POST("/v1/fine_tuning/comparisons/{comparison_id}/cancel", { params: { path: comparison } });
  check(ended.data?.status === "cancelled", ended);
  const answer = await client.POST("/predict", {
    body: {}, bodySerializer: () => form({ image: new File([readFileSync(image)], "a.png", { type: "image/png" }) }),
  });
  check(answer.data !== undefined && "predictions" in answer.data, answer);
  console.log("job", job.data.id, "answer", answer.data.predictions[0]?.label);
}

main().catch((error) => { console.error(error); process.exit(1); });
"""


def main() -> None:
    assert shutil.which("npm"), "needs npm (Debian: apt-get install npm)"
    with tempfile.TemporaryDirectory(prefix="finetune-clients-") as name:
        folder = Path(name)
        archive, image = make_material(folder)
        port = free_port()
        server = [sys.executable, "-m", "service", "--no-worker", "--port", str(port)]
        own = {"PYTHONPATH": str(REPOSITORY), "FINETUNE_HOME": str(folder / "home")}
        with serving(server, port, folder, own) as url:
            with urllib.request.urlopen(f"{url}/docs.json", timeout=30) as response:
                (folder / "openapi.json").write_bytes(response.read())
            print("clients: Python:", drive_python(folder, url, archive, image), flush=True)
            print("clients: TypeScript:", drive_typescript(folder / "typescript", folder, url, archive, image), flush=True)
    print("clients: all checks passed", flush=True)


def drive_python(folder: Path, url: str, archive: Path, image: Path) -> str:
    run([sys.executable, "-m", "venv", str(folder / "environment")])
    python = folder / "environment" / "bin" / "python"
    run([str(python), "-m", "pip", "install", "--quiet", GENERATOR])
    generate = [str(python.with_name("openapi-python-client")), "generate", "--path", str(folder / "openapi.json")]
    said = run([*generate, "--output-path", str(folder / "python")], cwd=folder, stderr_too=True)
    assert "WARNING" not in said, f"the generator leaves something out:\n{said}"
    bodies = re.findall(
        r"class (\w+FilesBody|\w+Body)\b", "".join(path.read_text() for path in (folder / "python").rglob("*.py"))
    )
    script = PYTHON_CLIENT.replace(
        "PredictWithDefaultModelFilesBody", next(body for body in bodies if body.startswith("PredictWithDefaultModel"))
    )
    (folder / "drive.py").write_text(script)
    return run(
        [str(python), str(folder / "drive.py"), url, str(archive), str(image)], environment={"PYTHONPATH": str(folder / "python")}
    ).strip()


def drive_typescript(folder: Path, parent: Path, url: str, archive: Path, image: Path) -> str:
    folder.mkdir()
    (folder / "package.json").write_text(json.dumps({"private": True, "type": "commonjs"}))
    run(["npm", "install", "--silent", "--no-audit", "--no-fund", *NPM_PACKAGES], cwd=folder)
    run(["npx", "openapi-typescript", str(parent / "openapi.json"), "-o", "api.d.ts"], cwd=folder)
    (folder / "drive.ts").write_text(TYPESCRIPT_CLIENT)
    options = [
        "--strict",
        "--target",
        "es2022",
        "--lib",
        "es2023,dom",
        "--module",
        "commonjs",
        "--moduleResolution",
        "node10",
        "--skipLibCheck",
    ]
    (folder / "node.d.ts").write_text(
        'declare module "node:fs" { export function readFileSync(path: string): Uint8Array<ArrayBuffer>; }\n'
        "declare const process: { argv: string[]; exit(code: number): never };\n"
    )
    run(["npx", "tsc", *options, "drive.ts", "node.d.ts"], cwd=folder)
    return run(["node", "drive.js", url, str(archive), str(image)], cwd=folder).strip()


def make_material(folder: Path) -> tuple[Path, Path]:
    """Write a workspace with a model, an archive of photographs and an image, with the checkout's test helpers."""
    script = (
        "import sys; from pathlib import Path; from archives import photographs, zip_of; from serving import registered; "
        "from standin import picture, write_bundle; folder = Path(sys.argv[1]); (folder / 'home').mkdir(); "
        "registered(folder / 'home', write_bundle(folder / 'bundle')); "
        "(folder / 'photos.zip').write_bytes(zip_of(photographs())); (folder / 'red.png').write_bytes(picture('red'))"
    )
    run([sys.executable, "-c", script, str(folder)], environment={"PYTHONPATH": f"{REPOSITORY / 'tests'}:{REPOSITORY}"})
    return folder / "photos.zip", folder / "red.png"


if __name__ == "__main__":
    main()

"""Live bundles: what is served, when it is ready, and how a new version takes over without a failed or a mixed answer."""

from __future__ import annotations

import shutil
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from answers import table
from serving import in_process, registered, state_of, until
from standin import picture, write_bundle
from starlette.testclient import TestClient

from finetune.bundle.manifest import MODEL
from finetune.bundle.predictor import Predictor
from finetune.bundle.registry import Registry
from finetune.errors import BundleError, NotFound, NotReady
from finetune.evaluation import predictions as tables
from service.models import LoadedModels


def bundle_of(folder: Path, version: int) -> Path:
    """A bundle whose every label begins with its version, so that an answer shows which bundle gave it."""
    return write_bundle(folder / f"bundle-{version}", [f"v{version}-{colour}" for colour in ("red", "green", "blue")])


def damage(version_folder: Path) -> None:
    """Change the model in place, as a failing disk would."""
    model = version_folder / MODEL
    model.write_bytes(model.read_bytes()[:-1])


# --- readiness ------------------------------------------------------------------------------------


def test_a_server_without_a_model_is_alive_but_not_ready_and_says_how_to_make_one(tmp_path: Path) -> None:
    with in_process(tmp_path, wait=False) as client:
        assert client.get("/livez").status_code == 200
        until(lambda: "No model is registered" in client.get("/readyz").json()["detail"])
        for answer in (client.get("/readyz"), client.post("/predict", content=picture())):
            assert (answer.status_code, answer.json()["code"]) == (503, "not_ready")
            assert "finetune train --data" in answer.json()["detail"]
            assert answer.headers["retry-after"] == "1"
        assert client.get("/v1/models").json() == {
            "object": "list",
            "data": [],
            "has_more": False,
            "first_id": None,
            "last_id": None,
        }


def test_the_first_model_is_served_without_a_restart(tmp_path: Path) -> None:
    with in_process(tmp_path, wait=False) as client:
        assert client.get("/readyz").status_code == 503
        registered(tmp_path, bundle_of(tmp_path, 1))
        until(lambda: client.get("/readyz").status_code == 200)
        assert client.post("/predict", content=picture()).json()["predictions"][0]["label"] == "v1-red"


def test_a_damaged_model_is_never_ready_and_the_reason_is_given(tmp_path: Path) -> None:
    registered(tmp_path, bundle_of(tmp_path, 1))
    damage(tmp_path / "models" / "colours" / "1")
    with in_process(tmp_path, wait=False) as client:
        until(lambda: "colours@1 is not served" in client.get("/readyz").json()["detail"])
        assert "sha256" in client.get("/readyz").json()["detail"]
        named = client.post("/v1/models/colours/predict", content=picture())
        assert (named.status_code, named.json()["code"]) == (409, "invalid_bundle")


def test_a_bundle_folder_can_be_served_from_where_it_lies(tmp_path: Path) -> None:
    folder = bundle_of(tmp_path, 7)
    with in_process(tmp_path, model=str(folder)) as client:
        answer = client.post("/predict", content=picture("blue")).json()
    assert (answer["model"], answer["version"], answer["predictions"][0]["label"]) == ("colours", "0", "v7-blue")


def test_a_folder_that_is_written_anew_is_swapped_and_one_that_is_damaged_is_not(tmp_path: Path) -> None:
    folder = bundle_of(tmp_path / "a", 1)
    models = LoadedModels(Registry(tmp_path / "models"), default=str(folder))
    models.refresh()
    first = models.default()
    shutil.rmtree(folder)
    models.refresh()
    assert models.default() is first
    bundle_of(tmp_path / "b", 2).rename(folder)
    models.refresh()
    assert models.default().predictor.predict(picture()).labels[0][0] == "v2-red"
    assert models.swaps == 1


def test_when_nobody_watches_any_more_the_server_is_not_ready(tmp_path: Path) -> None:
    registered(tmp_path, bundle_of(tmp_path, 1))
    models = LoadedModels(Registry(tmp_path / "models"))
    models.refresh()
    models.default()
    with pytest.raises(NotReady, match="has stopped"):
        models.check_ready()


def test_whatever_is_wrong_with_a_folder_the_next_look_finds_it_repaired(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registered(tmp_path, bundle_of(tmp_path, 1))
    look = LoadedModels.refresh

    def first_look(models: LoadedModels) -> None:
        monkeypatch.setattr(LoadedModels, "refresh", look)
        raise RecursionError("maximum recursion depth exceeded")

    monkeypatch.setattr(LoadedModels, "refresh", first_look)
    models = LoadedModels(Registry(tmp_path / "models"), watch_seconds=0.01)
    models.start()
    try:
        until(lambda: bool(models.loaded()))
        models.check_ready()
    finally:
        models.stop()


# --- listing --------------------------------------------------------------------------------------


def test_models_are_listed_by_page_with_versions_aliases_and_what_is_live(tmp_path: Path) -> None:
    registry = registered(tmp_path, bundle_of(tmp_path, 1), "colours")
    registry.register(bundle_of(tmp_path, 2), "colours")
    registry.set_alias("colours", "champion", "1")
    for name in ("birds", "cats"):
        registry.register(tmp_path / "bundle-1", name)
    with in_process(tmp_path, model="colours") as client:
        first = client.get("/v1/models?limit=2").json()
        assert [model["id"] for model in first["data"]] == ["birds", "cats"]
        assert (first["has_more"], first["first_id"], first["last_id"]) == (True, "birds", "cats")
        second = client.get(f"/v1/models?limit=2&after={first['last_id']}").json()
        assert ([model["id"] for model in second["data"]], second["has_more"]) == (["colours"], False)
        shown = client.get("/v1/models/colours").json()
        assert shown == second["data"][0]
        assert (shown["id"], shown["object"], shown["owned_by"]) == ("colours", "model", "finetune")
        versions = [(one["version"], one["aliases"], one["live"], one["refused"]) for one in shown["versions"]]
        assert versions == [("2", ["latest"], False, None), ("1", ["champion"], True, None)]
        assert shown["visibility"] == "shared"


# --- swapping -------------------------------------------------------------------------------------


def test_ten_swaps_under_load_fail_no_request_and_mix_no_answer(tmp_path: Path) -> None:
    answers = swap_under_load(tmp_path, 10)
    assert answers.total() >= 200


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_sixty_swaps_and_promotions_under_load_fail_no_request_and_mix_no_answer(tmp_path: Path) -> None:
    answers = swap_under_load(tmp_path, 60)
    assert answers.total() >= 1200


def swap_under_load(tmp_path: Path, n_swaps: int) -> Counter[tuple[int, bool, str]]:
    """Promote version after version, by the registry and over HTTP in turn; return the answers: status, unmixed, version."""
    registry = registered(tmp_path, bundle_of(tmp_path, 1))
    answers: Counter[tuple[int, bool, str]] = Counter()
    counting, done = threading.Lock(), threading.Event()

    def ask(client: TestClient, path: str) -> None:
        while not done.is_set():
            answer = client.post(path, content=picture())
            body = answer.json()
            version = body.get("version", "")
            same = all(row["label"].startswith(f"v{version}-") for row in body.get("predictions", []))
            with counting:
                answers[answer.status_code, same, version] += 1

    with in_process(tmp_path) as client:
        paths = ["/predict", "/v1/models/colours/predict"] * 2
        threads = [threading.Thread(target=ask, args=(client, path)) for path in paths]
        for thread in threads:
            thread.start()
        try:
            for version in range(1, n_swaps + 2):
                if version > 1:
                    registry.register(bundle_of(tmp_path, version), "colours")
                if version > 1 and version % 2:
                    registry.set_alias("colours", "champion", str(version))
                elif version > 1:
                    wanted = {"version": str(version), "force": True}  # its classes have other names
                    assert client.put("/v1/models/colours/aliases/champion", json=wanted).status_code == 200
                until(lambda: answers[200, True, str(version)] >= 20)  # noqa: B023 - called before the loop goes on
        finally:
            done.set()
            for thread in threads:
                thread.join()
        metrics = client.get("/metrics").text
    assert {(status, same) for status, same, _ in answers} == {(200, True)}
    assert {version for *_, version in answers} == {str(version) for version in range(1, n_swaps + 2)}
    assert f'finetune_model_loaded{{model="colours",version="{n_swaps + 1}"}} 1.0' in metrics
    assert f'finetune_model_loaded{{model="colours",version="{n_swaps}"}}' not in metrics
    return answers


def test_a_new_version_that_fails_its_checks_is_refused_and_the_old_one_goes_on(tmp_path: Path) -> None:
    registry = registered(tmp_path, bundle_of(tmp_path, 1))
    with in_process(tmp_path) as client:
        registry.register(bundle_of(tmp_path, 2), "colours")
        registry.set_alias("colours", "champion", "2")
        until(lambda: client.post("/predict", content=picture()).json()["version"] == "2")
        client.post("/v1/models/colours/predict", content=picture())
        damaged = tmp_path / "models" / "colours" / "3"
        shutil.copytree(tmp_path / "models" / "colours" / "2", damaged)
        damage(damaged)
        registry.set_alias("colours", "champion", "3")
        until(lambda: client.get("/v1/models/colours").json()["versions"][0]["refused"] is not None)
        refused = client.get("/v1/models/colours").json()["versions"]
        assert next(one for one in refused if one["version"] == "3")["live"] is False
        for path in ("/predict", "/v1/models/colours/predict"):
            answer = client.post(path, content=picture())
            assert (answer.status_code, answer.json()["version"]) == (200, "2")
        assert client.get("/readyz").status_code == 200
        assert "finetune_model_refused 1.0" in client.get("/metrics").text
        registry.register(bundle_of(tmp_path, 4), "colours")
        registry.set_alias("colours", "champion", "4")
        until(lambda: client.post("/predict", content=picture()).json()["version"] == "4")


@pytest.mark.parametrize("damage", ["{", "[1]"])
def test_a_damaged_alias_file_changes_nothing_and_a_restart_still_becomes_ready(tmp_path: Path, damage: str) -> None:
    registered(tmp_path, bundle_of(tmp_path, 1))
    aliases = tmp_path / "models" / "colours" / "aliases.json"
    with in_process(tmp_path) as client:
        aliases.write_text(damage)
        assert client.get("/v1/models").json()["data"][0]["versions"][0]["aliases"] == ["champion", "latest"]
        assert client.post("/predict", content=picture()).json()["version"] == "1"
    with in_process(tmp_path) as client:
        assert client.get("/readyz").json()["version"] == "1"


def test_promoting_and_rolling_back_changes_what_is_served(tmp_path: Path) -> None:
    registry = registered(tmp_path, bundle_of(tmp_path, 1))
    registry.register(bundle_of(tmp_path, 2), "colours")
    models = LoadedModels(registry)
    seen = []
    for move in (lambda: None, lambda: registry.set_alias("colours", "champion", "2")):
        move()
        models.refresh()
        seen.append((models.default().version, models.named("colours@champion").version))
    registry.rollback("colours")
    models.refresh()
    assert seen == [("1", "1"), ("2", "2")]
    assert models.default().version == "1"


def test_a_request_keeps_the_bundle_it_started_with(tmp_path: Path) -> None:
    registry = registered(tmp_path, bundle_of(tmp_path, 1))
    models = LoadedModels(registry)
    models.refresh()
    held = models.default()
    registry.delete("colours", force=True)
    models.refresh()
    assert held.predictor.predict(picture()).labels[0][0] == "v1-red"
    with pytest.raises(NotReady):
        models.default()


def test_a_deleted_model_is_404_and_its_neighbours_stay(tmp_path: Path) -> None:
    registry = registered(tmp_path, bundle_of(tmp_path, 1), "first")
    registry.register(bundle_of(tmp_path, 2), "second")
    models = LoadedModels(registry)
    assert (models.named("first").version, models.named("second").version) == ("1", "1")
    registry.delete("first", force=True)
    models.refresh()
    with pytest.raises(NotFound, match="first"):
        models.named("first")
    assert models.named("second").name == "second"


def test_a_job_that_ends_never_takes_over_and_a_promotion_does(tmp_path: Path) -> None:
    registry = registered(tmp_path, bundle_of(tmp_path, 1), "hats")
    with in_process(tmp_path) as client:
        registry.register(bundle_of(tmp_path, 2), "insects")
        registry.register(bundle_of(tmp_path, 3), "hats")
        until(lambda: len(client.get("/v1/models").json()["data"]) == 2)
        assert client.get("/readyz").json() == {"status": "ok", "reference": "hats@champion", "model": "hats", "version": "1"}
        answer = client.post("/predict", content=picture()).json()
        assert (answer["model"], answer["version"]) == ("hats", "1")
        assert 'finetune_default_model{model="hats",version="1"} 1.0' in client.get("/metrics").text
        promoted = client.put("/v1/models/hats/aliases/champion", json={"version": "2"})
        assert (promoted.status_code, promoted.json()["code"]) == (409, "promotion_refused")  # other classes
        promoted = client.put("/v1/models/hats/aliases/champion", json={"version": "2", "force": True})
        assert promoted.status_code == 200
        assert client.post("/predict", content=picture()).json()["version"] == "2"
        deployed = client.put("/v1/deployments/default", json={"reference": "insects"}).json()
        assert (deployed["reference"], deployed["model"], deployed["version"]) == ("insects", "insects", "1")
        assert client.post("/predict", content=picture()).json()["model"] == "insects"
        assert client.post("/v1/deployments/default/rollback").json()["reference"] == "hats@champion"
        assert client.post("/predict", content=picture()).json()["model"] == "hats"
        assert client.post("/v1/models/hats/aliases/champion/rollback").status_code == 200
        assert client.post("/predict", content=picture()).json()["version"] == "1"
        assert client.get("/readyz").json()["version"] == "1"


def test_a_version_that_is_worse_on_the_same_images_is_promoted_by_force_alone(tmp_path: Path) -> None:
    registry, targets = Registry(tmp_path / "models"), np.arange(60) % 3
    for version, right in ((1, 60), (2, 40)):
        logits = np.eye(3, dtype=np.float32)[np.where(np.arange(60) < right, targets, (targets + 1) % 3)]
        tables.write(tmp_path / "test.npz", table(logits, targets))
        registry.register(
            write_bundle(tmp_path / f"bundle-{version}", ("c0", "c1", "c2")), "hats", predictions=tmp_path / "test.npz"
        )
    with in_process(tmp_path) as client:
        refused = client.put("/v1/models/hats/aliases/champion", json={"version": "2"})
        assert (refused.status_code, refused.json()["code"]) == (409, "promotion_refused")
        (error,) = refused.json()["errors"]
        assert error["field"] == "not_worse"
        assert "top1 0.667 on the same 60 test images where version 1 has 1.000" in error["detail"]
        assert client.put("/v1/deployments/default", json={"reference": "hats@2"}).status_code == 409
        place = "/v1/models/hats/versions/2/predictions"
        assert client.get("/v1/models/hats/versions/2").json()["links"]["predictions"] == place
        lines = client.get(place).text.splitlines()
        assert (len(lines), lines[0].split(",")[:4]) == (61, ["file", "sha256", "label", "predicted"])
        assert client.get(f"{place}?format=npz").content == (tmp_path / "models/hats/predictions/2.npz").read_bytes()
        assert client.post("/predict", content=picture()).json()["version"] == "1"
        forced = client.put("/v1/models/hats/aliases/champion", json={"version": "2", "force": True})
        assert forced.status_code == 200
        assert client.post("/predict", content=picture()).json()["version"] == "2"


def test_a_server_that_was_given_a_model_refuses_to_be_promoted(tmp_path: Path) -> None:
    registry = registered(tmp_path, bundle_of(tmp_path, 1), "hats")
    registry.register(bundle_of(tmp_path, 2), "insects")
    with in_process(tmp_path, model="hats@1") as client:
        refused = client.put("/v1/deployments/default", json={"reference": "insects"})
        assert refused.status_code == 409
        assert "--model" in refused.json()["detail"]
        assert client.get("/v1/deployments/default").json()["pinned"] is True
        assert client.post("/predict", content=picture()).json()["model"] == "hats"


def test_a_canary_answers_its_share_and_a_shadow_is_compared(tmp_path: Path) -> None:
    registry = registered(tmp_path, bundle_of(tmp_path, 1), "hats")
    registry.register(bundle_of(tmp_path, 2), "hats")
    with in_process(tmp_path) as client:
        every = {"reference": "hats@1", "canary": {"reference": "hats@2", "percent": 100}}
        assert client.put("/v1/deployments/default", json=every).status_code == 200
        assert {client.post("/predict", content=picture()).json()["version"] for _ in range(5)} == {"2"}
        some = {**every, "canary": {"reference": "hats@2", "percent": 50}}
        client.put("/v1/deployments/default", json=some)
        seen: set[str] = set()
        until(lambda: bool(seen.add(client.post("/predict", content=picture()).json()["version"]) or len(seen) == 2))
        shadow = {"reference": "hats@1", "shadow": {"reference": "hats@2", "percent": 100}}
        client.put("/v1/deployments/default", json=shadow)
        assert client.post("/predict", content=picture()).json()["version"] == "1"
        counted = 'finetune_shadow_answers_total{model="hats",outcome="differs",version="2"}'
        until(lambda: counted in client.get("/metrics").text)
        assert 'role="canary",version="2"' in client.get("/metrics").text


def test_a_deleted_model_leaves_no_series_in_the_metrics(tmp_path: Path) -> None:
    registry = registered(tmp_path, bundle_of(tmp_path, 1), "coats")
    registry.register(bundle_of(tmp_path, 2), "hats")
    registry.register(bundle_of(tmp_path, 3), "hats")
    registry.set_alias("hats", "champion", "2")
    with in_process(tmp_path) as client:
        for reference in ("coats", "hats@1", "hats@2"):
            assert client.post(f"/v1/models/{reference}/predict", content=picture()).status_code == 200
        drift = state_of(client).drift
        drift.stop()  # the next round of its thread would remove what the deletion must remove
        drift.run_round()
        before = client.get("/metrics").text
        assert 'finetune_predictions_total{model="hats",role="named",version="1"} 1.0' in before
        assert 'finetune_drift_images{model="hats",version="2"} 1.0' in before
        assert client.delete("/v1/models/hats@1").status_code == 200
        after = client.get("/metrics").text
        assert 'model="hats",role="named",version="1"' not in after
        assert 'model="hats",role="named",version="2"' in after
        assert client.delete("/v1/models/hats?force=true").status_code == 200
        after = client.get("/metrics").text
        assert 'model="hats"' not in after
        assert 'finetune_predictions_total{model="coats",role="named",version="1"} 1.0' in after
        assert 'finetune_prediction_seconds_count{model="coats",stage="decode"} 1.0' in after


# --- memory ---------------------------------------------------------------------------------------


def counting(load: Callable[[Path], Predictor], loaded: list[str]) -> Callable[[Path], Predictor]:
    def counted(path: Path) -> Predictor:
        loaded.append(f"{path.parent.name}@{path.name}")
        return load(path)

    return counted


def test_the_least_recently_used_model_makes_room(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "models")
    for name in ("a", "b", "c"):
        registry.register(bundle_of(tmp_path / name, 1), name)
    models = LoadedModels(registry, capacity=2)
    for name in ("a", "b", "a", "c"):
        models.named(name)
    assert sorted(models.loaded()) == [("a", "1"), ("c", "1")]


def test_one_bundle_asked_for_under_many_names_is_loaded_once(tmp_path: Path) -> None:
    registry = registered(tmp_path, bundle_of(tmp_path, 1))
    loaded: list[str] = []
    models = LoadedModels(registry, load=counting(Predictor.load, loaded))
    models.refresh()
    for reference in ("colours", "colours@1", "colours@latest", "colours"):
        models.named(reference)
    models.refresh()
    assert loaded == ["colours@1"]


def test_a_refused_bundle_is_not_tried_again_until_it_is_written_again(tmp_path: Path) -> None:
    registry = registered(tmp_path, bundle_of(tmp_path, 1))
    folder = tmp_path / "models" / "colours" / "1"
    whole = (folder / MODEL).read_bytes()
    damage(folder)
    loaded: list[str] = []
    models = LoadedModels(registry, load=counting(Predictor.load, loaded))
    for _ in range(3):
        models.refresh()
        with pytest.raises(BundleError, match="sha256"):
            models.named("colours")
    assert loaded == ["colours@1"]
    assert models.refused().keys() == {("colours", "1")}
    (folder / MODEL).write_bytes(whole)
    shutil.copy(folder / "bundle.json", folder / "again")
    (folder / "again").rename(folder / "bundle.json")
    models.refresh()
    assert models.default().version == "1"
    assert models.refused() == {}

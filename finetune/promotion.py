"""Promote a version: check it, then move the alias or the server's default, and record who did it and what was checked.

The checks are: the bundle's checksums and its self-test (by loading it), the parity that was measured at export, minimum
values of metrics, the same classes as the replaced version, and not worse than that version on the test images that both have
predicted and neither was trained or chosen on. Torch-free.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.bundle.aliases import CHAMPION
from finetune.bundle.deployment import Deployment, deploy, read_deployment
from finetune.bundle.manifest import Manifest, read_manifest
from finetune.bundle.predictor import Predictor, read_seen
from finetune.bundle.registry import ModelVersion, Registry
from finetune.errors import BundleError, Conflict, InvalidInput, NotFound, Problem
from finetune.evaluation.paired import compare_two
from finetune.evaluation.predictions import read

ALPHA = 0.05  # significance level of the paired test for "worse"
_SHOWN_CLASSES = 5


@dataclass(frozen=True)
class Check:
    """One condition of a promotion."""

    name: str
    passed: bool
    detail: str


class PromotionRefused(Conflict):
    """A version failed its checks; `problems` lists them."""

    code = "promotion_refused"


def check_version(
    registry: Registry, candidate: ModelVersion, present: ModelVersion | None, minimum: Mapping[str, float]
) -> list[Check]:
    """Check `candidate`, which would replace `present`; return the results.

    Args:
        minimum: least value of each metric, by key (``test/top1``).
    """
    try:
        manifest = Predictor.load(candidate.path).manifest
    except BundleError as error:
        return [Check("loads", False, str(error).removeprefix(f"{candidate.path}: "))]
    checks = [Check("loads", True, "checksums are right and the self-test passes"), _parity(manifest)]
    checks += [_reaches(manifest, metric, least) for metric, least in sorted(minimum.items())]
    if present is not None and present.path != candidate.path:
        checks.append(_same_classes(manifest, present))
        if checks[-1].passed:
            checks.append(_not_worse(registry, candidate, present))
    return checks


def promote(
    registry: Registry,
    name: str,
    version: str,
    alias: str = CHAMPION,
    *,
    minimum: Mapping[str, float] | None = None,
    force: bool = False,
    by: str,
) -> tuple[ModelVersion, Sequence[Check]]:
    """Point an alias of `name` at `version` if it passes all checks, or regardless with `force`; return version and checks.

    A version that cannot be loaded is refused even with `force`, because it could not be served.

    Raises:
        NotFound: there is no such model or version.
        PromotionRefused: a check failed; the alias is unchanged.
    """
    candidate = registry.resolve(name, version)
    checks = check_version(registry, candidate, _present(registry, name, alias), minimum or {})
    _refuse_if_failed(f"{name}@{candidate.version}", checks, force)
    audit = {"by": by, "forced": force, "checks": [dataclasses.asdict(check) for check in checks]}
    return registry.set_alias(name, alias, candidate.version, **audit), checks


def promote_to_default(
    registry: Registry,
    deployment: Deployment,
    *,
    minimum: Mapping[str, float] | None = None,
    force: bool = False,
    by: str,
) -> Sequence[Check]:
    """Make `deployment` the server's default if its model passes all checks; return the checks.

    Raises:
        NotFound: a reference does not exist.
        PromotionRefused: a check failed, or the model is private; the default is unchanged.
    """
    candidate = registry.lookup(deployment.reference)
    try:
        present: ModelVersion | None = registry.default()
    except NotFound:
        present = None
    same_model = present is not None and present.name == candidate.name
    checks = check_version(registry, candidate, present if same_model else None, minimum or {})
    shares = [share.reference for share in (deployment.canary, deployment.shadow) if share is not None]
    private = [name for name in _names([deployment.reference, *shares]) if registry.access(name).visibility == "private"]
    if private and read_deployment(registry) != deployment:
        raise PromotionRefused(
            f"{private[0]} is private to its owner, and the server's default answers everybody. "
            f"Share it first: finetune models share {private[0]}"
        )
    for reference in shares:
        checks += [check for check in check_version(registry, registry.lookup(reference), None, {}) if check.name == "loads"]
    _refuse_if_failed(deployment.reference, checks, force)
    deploy(registry, deployment, by=by, forced=force, checks=[dataclasses.asdict(check) for check in checks])
    return checks


def _names(references: Sequence[str]) -> list[str]:
    return [reference.partition("@")[0] for reference in references]


def _present(registry: Registry, name: str, alias: str) -> ModelVersion | None:
    try:
        return registry.resolve(name, alias)
    except NotFound:
        return None


def _refuse_if_failed(what: str, checks: Sequence[Check], force: bool) -> None:
    failed = [check for check in checks if not check.passed]
    can_be_forced = all(check.name != "loads" for check in failed)
    if not failed or (force and can_be_forced):
        return
    problems = [Problem(check.name, check.detail) for check in failed]
    way_out = ". To promote it nevertheless, set force (in a terminal: --force)" if can_be_forced else ""
    raise PromotionRefused(
        f"{what} is not promoted, because it failed: {', '.join(one.name for one in failed)}{way_out}", problems
    )


def _parity(manifest: Manifest) -> Check:
    parity = manifest.parity
    tolerance = parity.get("tolerances", {}).get("prob")
    measured = [parity.get(key) for key in ("max_prob_difference", "max_prob_difference_from_bytes")]
    numbers = [value for value in (*measured, tolerance) if isinstance(value, int | float)]
    if len(numbers) < 3:
        return Check("parity", True, "not recorded in this bundle")
    worst = max(numbers[:2])
    return Check(
        "parity", worst <= numbers[2], f"probabilities of ONNX and torch differ by {worst:.2g}, allowed is {numbers[2]:g}"
    )


def _reaches(manifest: Manifest, metric: str, least: float) -> Check:
    value: Any = manifest.metrics.get(metric)
    if value is None:
        known = ", ".join(sorted(manifest.metrics)) or "none"
        return Check(metric, False, f"this version has no such metric; it has {known}")
    return Check(metric, value >= least, f"is {value:.4f}, at least {least:g} is required")


def _same_classes(manifest: Manifest, present: ModelVersion) -> Check:
    before, now = set(read_manifest(present.path).classes), set(manifest.classes)
    gone, new = sorted(before - now), sorted(now - before)
    if not gone and not new:
        return Check("classes", True, f"the same {len(now)} as version {present.version}")
    parts = [f"{word} {', '.join(names[:_SHOWN_CLASSES])}" for word, names in (("without", gone), ("with the new", new)) if names]
    return Check("classes", False, f"other classes than version {present.version}: {' and '.join(parts)}")


def _not_worse(registry: Registry, candidate: ModelVersion, present: ModelVersion) -> Check:
    """Compare both versions on the same test images. The check passes if they cannot be compared."""
    name = "not_worse"
    tables = [registry.predictions_of(version) for version in (candidate, present)]
    missing = [version.version for version, table in zip((candidate, present), tables, strict=True) if not table.exists()]
    if missing:
        return Check(name, True, f"not compared: version {missing[0]} was evaluated on no test images")
    try:
        found = compare_two(read(tables[0]), read(tables[1]), _seen_by(candidate, present))
    except InvalidInput as error:
        return Check(name, True, f"not compared: {error.message}")
    if found is None:
        return Check(name, True, f"not compared: no test image in common with version {present.version} that neither has seen")
    worse = found.second > found.first and found.p_value < ALPHA
    detail = (
        f"{found.metric} {found.first:.3f} on the same {found.n:,} test images where version {present.version} has "
        f"{found.second:.3f} (p = {found.p_value:.2g}, {found.test})"
    )
    return Check(name, not worse, f"worse than version {present.version}: {detail}" if worse else detail)


def _seen_by(*versions: ModelVersion) -> Callable[[str], bool]:
    known = [seen for version in versions if (seen := read_seen(version.path)) is not None]
    return lambda sha256: any(seen.trained_on(sha256) or seen.chosen_on(sha256) for seen in known)

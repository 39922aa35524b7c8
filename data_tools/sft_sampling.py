"""Which conversations prepare_sft.py takes: the smallest hashes of each type."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.sft_worker import ScanJob, Settings
from mini_llm.data.unit_files import read_array, read_record, write_unit

# Sampling holds about so many hashes at a time.
SAMPLED_AT_ONCE = 1 << 20


def sample(jobs: Sequence[ScanJob], quotas: dict[str, int], settings: Settings, key: str) -> None:
    """Choose the conversations with the smallest hashes of each type and write the unit `sample`.

    Goes through the hashes in slices, smallest first, so it holds one slice and, of each type, as
    many conversations as could be taken.
    """
    stages = Path(settings.stages)
    total = sum(len(read_array(stages, job.name, "hashes")) for job in jobs)
    slices = max(-(-total // SAMPLED_AT_ONCE), 1)
    edges = [int(2**64 * part / slices) for part in range(1, slices)]
    cuts = []  # where the slices begin and end in each unit, whose rows stand in this order
    for job in jobs:
        hashes = read_array(stages, job.name, "hashes")
        cuts.append([0, *np.searchsorted(hashes, np.array(edges, np.uint64)).tolist(), len(hashes)])
    strata: dict[tuple[str, str], int] = {}
    codes = []  # of each unit's strata, in all units the same
    file_of_path = {path: i for i, path in enumerate(dict.fromkeys(job.file.path for job in jobs))}
    for job in jobs:
        own = [tuple(pair) for pair in (read_record(stages, job.name) or {})["strata"]]
        codes.append(np.array([strata.setdefault(s, len(strata)) for s in own], np.int32))
    available = np.zeros(len(strata), np.int64)
    wanted = [min(quotas[kind], total) for kind, _ in strata]
    kept: list[np.ndarray] = []
    duplicates = 0
    row_type = np.dtype(
        [("hash", "<u8"), ("file", "<i4"), ("place", "<i8"), ("stratum", "<i4"), ("held_out", "u1")]
    )
    for part in range(slices):
        found = [np.zeros(0, row_type)]
        for job, cut, code in zip(jobs, cuts, codes, strict=True):
            start, stop = cut[part], cut[part + 1]
            rows = np.zeros(stop - start, row_type)
            rows["hash"] = read_array(stages, job.name, "hashes", start, stop)
            rows["place"] = read_array(stages, job.name, "places", start, stop)
            if stop > start:
                rows["stratum"] = code[read_array(stages, job.name, "strata", start, stop)]
            rows["held_out"] = read_array(stages, job.name, "held_out", start, stop)
            rows["file"] = file_of_path[job.file.path]
            found.append(rows)
        rows = np.concatenate(found)
        rows = rows[np.lexsort((rows["place"], rows["file"], rows["hash"]))]
        # Equal conversations have equal hashes; the first one in the input stays.
        is_new = np.append(True, rows["hash"][1:] != rows["hash"][:-1])[: len(rows)]
        duplicates += int((~is_new).sum())
        rows = rows[is_new]
        for stratum in np.unique(rows["stratum"]).tolist():
            members = rows[rows["stratum"] == stratum]
            kept.append(members[: max(wanted[stratum] - int(available[stratum]), 0)])
            available[stratum] += len(members)
    candidates = np.concatenate([np.zeros(0, row_type), *kept])
    taken_of = np.zeros(len(strata), np.int64)
    table: dict[str, Any] = {}
    for kind, quota in quotas.items():
        members = {name: code for (k, name), code in sorted(strata.items()) if k == kind}
        shares = largest_remainder([int(available[code]) for code in members.values()], quota)
        for code, share in zip(members.values(), shares, strict=True):
            taken_of[code] = share
        table[kind] = {
            "asked_for": quota,
            "available": int(sum(available[code] for code in members.values())),
            "taken": sum(shares),
            "types": {
                name: {"available": int(available[code]), "taken": int(taken_of[code])}
                for name, code in members.items()
            },
        }
        if sum(shares) < quota:
            print(f"--{kind} {quota:,}: only {sum(shares):,} are there; all are taken")
    chosen = [
        candidates[candidates["stratum"] == code][: taken_of[code]] for code in strata.values()
    ]
    rows = np.concatenate([np.zeros(0, row_type), *chosen])
    rows = rows[np.argsort(rows["hash"], kind="stable")]
    write_unit(
        stages,
        "sample",
        {name: rows[name] for name in ("hash", "file", "place", "held_out")},
        {
            "key": key,
            "duplicates": duplicates,
            "not_sampled": int(available.sum()) - len(rows),
            "sampling": table,
        },
    )


def largest_remainder(available: Sequence[int], quota: int) -> list[int]:
    """Share a quota in proportion to what is available, by largest remainder; ties to the first.

    The shares sum to the quota, or to all there is when that is less.
    """
    total = sum(available)
    quota = min(quota, total)
    if not total:
        return [0] * len(available)
    shares = [count * quota // total for count in available]
    remainders = [count * quota % total for count in available]
    by_remainder = sorted(range(len(available)), key=lambda i: (-remainders[i], i))
    for i in by_remainder[: quota - sum(shares)]:
        shares[i] += 1
    return shares

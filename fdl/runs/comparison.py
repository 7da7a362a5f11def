"""Measures of the runs of one comparison: quality, bytes, and the gain of each site.

Three of the variants are references, compared seed by seed: a centralised one whose student counts as 1, one whose
bytes count as 100 %, and one whose clients train alone, the zero point of gains and of the recovered gap.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fdl.metrics.federation import (
    bytes_by_round,
    equity,
    knowledge_transfer_efficiency,
    metric_by_round,
    paired_difference,
    recovered_gap,
    rounds_to_target,
)

SCORE_TARGETS = (95, 98)
"""Fractions of the centralised score, in %, at which bytes are compared."""

COLUMNS = {
    "student_last": "Student, last round",
    "kte": "KTE",
    "recovered_gap": "Recovered gap",
    "recovered_gap_nll": "Recovered gap, NLL",
    "specialists": "Mean specialist",
    "student_best": "Student, best round",
    "rounds_to_best": "Best round",
    "bytes_to_best": "Messages to best round",
    "bytes_total": "Messages",
    "bytes_total_percent": "Messages, %",
    "setup_bytes": "Set-up",
    "student_delivery_bytes": "Student to all sites",
    "bytes_all": "Together",
    "bytes_all_percent": "Together, %",
    **{
        f"{name}_{target}{part}": f"{title}, {target} %{suffix}"
        for target in SCORE_TARGETS
        for name, title, part, suffix in (
            ("rounds_to", "Round", "", ""),
            ("bytes_to", "Messages", "", ""),
            ("bytes_to", "Messages", "_percent", " (%)"),
            ("bytes_to", "Together", "_all", ""),
            ("bytes_to", "Together", "_all_percent", " (%)"),
        )
    },
    **{
        f"{whose}_gain{part}": f"{title}: {what}"
        for whose, title in (("student", "Student"), ("specialist", "Own model"))
        for part, what in (("", "mean gain"), ("_min", "least"), ("_variance", "variance"), ("_jain", "Jain"))
    },
    "seconds": "Seconds",
}
"""Measures of every run, with their titles in tables."""

DIFFERENCES = ("vs_reference", "vs_bytes_reference")
"""Paired differences of the student's last round, by the field of `References` that names the other variant."""


class References(NamedTuple):
    """Variants with which the others of a comparison are compared; None for no reference.

    Attributes:
        reference: the variant whose student counts as 1, usually centralised.
        bytes_reference: the variant whose bytes count as 100 %, usually FedAvg.
        single_site: the variant whose clients train alone: the zero point of gains and of the recovered gap.
    """

    reference: str | None = None
    bytes_reference: str | None = None
    single_site: str | None = None


NO_REFERENCES = References()


def compare_table(
    rows: Sequence[Mapping[str, Any]],
    references: References = NO_REFERENCES,
) -> list[dict[str, Any]]:
    """Summarise several variants, each over its seeds.

    All scores are on test data, of the student after the last round unless noted otherwise. The best round is chosen on
    validation data, seed by seed, which takes labels that a real server hardly has.

    Args:
        rows: ``{"variant", "seed", "summary"}`` for every run.
        references: the variants with which the others are compared.

    Returns:
        One row per variant, in order of first appearance: ``variant``, ``method``, ``seeds`` (their number), ``score``
        (the compared metric), ``validation_samples`` (on which the best round was chosen, 0 if it was not), and the
        mean and sample standard deviation of everything in `COLUMNS` as ``<name>_mean`` and ``<name>_std``. For each of
        `DIFFERENCES` ``<name>_mean``, ``_low`` and ``_high``: the mean difference to that variant over common seeds
        with its 95 % interval; and for each of `SCORE_TARGETS` ``reached_<target>``, the number of seeds that reach it.
        Means up to a target are None unless all seeds reach it. Ratios are computed seed by seed, over the seeds that
        the reference has too. Undefined values are None: a student in a variant that trains none, a ratio without its
        reference, a deviation of one seed.
    """
    measured = measure_all(rows, references)
    students = {
        name: {seed: m["student_last"] for (variant, seed), m in measured.items() if variant == name}
        for name in references[:2]
    }
    table = []
    for variant in dict.fromkeys(row["variant"] for row in rows):
        mine = {seed: m for (name, seed), m in measured.items() if name == variant}
        summary = next(row["summary"] for row in rows if row["variant"] == variant)
        line = {
            "variant": variant,
            "method": summary["method"],
            "seeds": len(mine),
            "score": summary["score"]["metric"],
            "validation_samples": summary["best"].get("validation_samples", 0),
        }
        for target in SCORE_TARGETS:
            line[f"reached_{target}"] = sum(m[f"rounds_to_{target}"] is not None for m in mine.values())
        for name in COLUMNS:
            values = [m[name] for m in mine.values() if m[name] is not None and math.isfinite(m[name])]
            if "_to_9" in name and len(values) < len(mine):  # a mean over the seeds that reach it would be too good
                values = []
            line[f"{name}_mean"] = statistics.fmean(values) if values else None
            line[f"{name}_std"] = statistics.stdev(values) if len(values) > 1 else None
        for key, other in zip(DIFFERENCES, references[:2]):
            own = {seed: m["student_last"] for seed, m in mine.items()} if variant != other else {}
            line |= _difference(key, own, students[other])
        table.append(line)
    return table


def measure_all(
    rows: Sequence[Mapping[str, Any]],
    references: References = NO_REFERENCES,
) -> dict[tuple[str, int], dict[str, Any]]:
    """Measure every run against the references of its seed.

    Args:
        rows: ``{"variant", "seed", "summary"}`` for every run.
        references: the variants with which the others are compared.

    Returns:
        By variant and seed: a value for everything in `COLUMNS`, None for undefined ones.
    """
    summaries = {(row["variant"], row["seed"]): row["summary"] for row in rows}

    def one(variant: str, seed: int) -> dict[str, Any]:
        summary, central = summaries[variant, seed], summaries.get((references.reference, seed))
        alone = summaries.get((references.single_site, seed))
        other = summaries.get((references.bytes_reference, seed))
        sent = _bytes(summary, _target_rounds(summary, central, alone))
        base = {} if other is None else _bytes(other, _target_rounds(other, central, alone))
        for name in (
            "bytes_total",
            "bytes_all",
            *(f"bytes_to_{t}{part}" for t in SCORE_TARGETS for part in ("", "_all")),
        ):
            whole, part = base.get(name), sent[name]
            sent[f"{name}_percent"] = 100 * part / whole if whole and part is not None else None
        whose = None if variant == references.single_site else alone
        return (
            _quality(summary, central, alone) | sent | _gains(summary, whose) | {"seconds": summary["time"]["total_s"]}
        )

    return {key: one(*key) for key in summaries}


def client_gains(summary: Mapping[str, Any], alone: Mapping[str, Any]) -> dict[str, dict[int, float]]:
    """Compute each client's gain from participation: its score on the common test set minus that of training alone.

    Args:
        summary: summary of a run.
        alone: summary of the single-site run with the same seed, whose clients have the same samples.

    Returns:
        ``student`` and ``specialist``: by client id, the gain if the client uses the student, or its own model; larger
        is better, also for losses. Empty if the run has no such model.
    """
    key, sign = f"test/{summary['score']['metric']}", 1 if summary["score"]["higher_is_better"] else -1
    before = _by_client(alone, key)
    student = _finite(summary["metrics"].get(f"student/{key}"))
    everybody = dict.fromkeys(before, student) if student is not None else {}
    after = {"student": everybody, "specialist": _by_client(summary, key)}
    return {
        whose: {client: sign * (score - before[client]) for client, score in scores.items() if client in before}
        for whose, scores in after.items()
    }


def _by_client(summary: Mapping[str, Any], key: str) -> dict[int, float]:
    found = {entry["id"]: _finite(entry["metrics"].get(key)) for entry in summary.get("participants", ())}
    return {client: value for client, value in found.items() if value is not None}


def _gains(summary: Mapping[str, Any], alone: Mapping[str, Any] | None) -> dict[str, float | None]:
    """Compute the mean and `fdl.metrics.federation.equity` of the gains."""
    gains = {} if alone is None else client_gains(summary, alone)
    found: dict[str, float | None] = {}
    for whose in ("student", "specialist"):
        values = list(gains.get(whose, {}).values())
        even = equity(values)
        found |= {
            f"{whose}_gain": statistics.fmean(values) if values else None,
            f"{whose}_gain_min": _finite(even["minimum"]),
            f"{whose}_gain_variance": _finite(even["variance"]),
            f"{whose}_gain_jain": _finite(even["jain"]),
        }
    return found


def _quality(
    summary: Mapping[str, Any], central: Mapping[str, Any] | None, alone: Mapping[str, Any] | None
) -> dict[str, float | None]:
    """Compute the scores of one run, and the fraction of the gap between single sites and the centralised model."""
    last, best, score = summary["metrics"], summary["best"], summary["score"]["metric"]
    own = f"student/test/{score}"
    gap, student, goal = _recovered(score, summary, central, alone), last.get(own), _last(central, own)
    kte = gap  # of a loss, a ratio has no fixed points
    if summary["score"]["higher_is_better"]:
        kte = None if student is None or goal is None else knowledge_transfer_efficiency(student, goal)
    return {
        "student_last": student,
        "kte": kte,
        "recovered_gap": gap,
        "recovered_gap_nll": None if score == "nll" else _recovered("nll", summary, central, alone),
        "specialists": last.get(f"specialists/test/{score}"),
        "student_best": best["metrics"].get(own),
        "rounds_to_best": best["round"],
    }


def _recovered(
    metric: str, summary: Mapping[str, Any], central: Mapping[str, Any] | None, alone: Mapping[str, Any] | None
) -> float | None:
    own = f"student/test/{metric}"
    ends = _last(alone, f"specialists/test/{metric}"), summary["metrics"].get(own), _last(central, own)
    return None if None in ends else _finite(recovered_gap(*ends))


def _bytes(summary: Mapping[str, Any], reached: Mapping[int, int | None]) -> dict[str, float | None]:
    """Compute the bytes of one run: messages, set-up before the first round, delivery of the student, and their sum."""
    sent = summary["communication"]
    setup, delivery = sent["setup_bytes"], sent.get("student_delivery_bytes")
    around = None if delivery is None else setup + delivery  # runs of earlier versions did not count the delivery
    total, by_round = sent["upload_bytes"] + sent["download_bytes"], bytes_by_round(summary.get("history", ()))
    found: dict[str, float | None] = {
        "bytes_to_best": _traffic(summary["best"]["communication"]),
        "bytes_total": total,
        "setup_bytes": setup,
        "student_delivery_bytes": delivery,
        "bytes_all": None if around is None else total + around,
    }
    for target, round in reached.items():
        messages = None if round is None else by_round[round]
        found[f"rounds_to_{target}"] = round
        found[f"bytes_to_{target}"] = messages
        found[f"bytes_to_{target}_all"] = None if messages is None or around is None else messages + around
    return found


def _target_rounds(
    summary: Mapping[str, Any], central: Mapping[str, Any] | None, alone: Mapping[str, Any] | None
) -> dict[int, int | None]:
    """Find the first round whose student reaches each target; a single evaluated round suffices for every method.

    A score whose larger values are better reaches e.g. 95 % of the centralised one; a loss covers 95 % of the distance
    from the mean of the single sites to the centralised one.
    """
    score, higher = summary["score"]["metric"], summary["score"]["higher_is_better"]
    goal, zero = _last(central, f"student/test/{score}"), _last(alone, f"specialists/test/{score}")
    if goal is None or (zero is None and not higher):
        return dict.fromkeys(SCORE_TARGETS)
    found = metric_by_round(summary.get("history", ()), f"student/test/{score}")
    history = {round: value if higher else -value for round, value in found.items() if _finite(value) is not None}
    levels = {
        target: target / 100 * goal if higher else -(zero + target / 100 * (goal - zero)) for target in SCORE_TARGETS
    }
    return {target: rounds_to_target(history, level, window=1) for target, level in levels.items()}


def _difference(
    key: str, ours: Mapping[int, float | None], theirs: Mapping[int, float | None]
) -> dict[str, float | None]:
    seeds = [seed for seed in ours if _finite(ours[seed]) is not None and _finite(theirs.get(seed)) is not None]
    if not seeds:
        return dict.fromkeys((f"{key}_mean", f"{key}_low", f"{key}_high"))
    found = paired_difference([ours[seed] for seed in seeds], [theirs[seed] for seed in seeds])
    return dict(zip((f"{key}_mean", f"{key}_low", f"{key}_high"), map(_finite, found)))


def _last(summary: Mapping[str, Any] | None, key: str) -> float | None:
    return None if summary is None else _finite(summary["metrics"].get(key))


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _traffic(communication: Mapping[str, Any]) -> int:
    return communication["upload_bytes"] + communication["download_bytes"]

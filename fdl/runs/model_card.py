"""Model card of an exported student: origin, quality, communication and privacy."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping
from typing import Any

from omegaconf import OmegaConf
from rich.filesize import decimal

import fdl
from fdl.recipe.config import Recipe
from fdl.registry.component import Component
from fdl.runs.redaction import without_paths


def model_card(recipe: Recipe, summary: Mapping[str, Any], round: int, usage: str, inputs: Mapping[str, Any]) -> str:
    """Write the card of an exported student, in Markdown.

    Args:
        recipe: the recipe of the run.
        summary: the summary of the run.
        round: the round of the student.
        usage: lines of Python that load it.
        inputs: description of its inputs and outputs; may have ``images``, ``texts`` and ``classes``.
    """
    # cards are made to be published, so they contain no local paths
    recipe = dataclasses.replace(
        recipe,
        **{
            part: dataclasses.replace(one, args=without_paths(one.args))
            for part in ("data", "student")
            if (one := getattr(recipe, part)) is not None
        },
        specialists=[dataclasses.replace(one, args=without_paths(one.args)) for one in recipe.specialists],
    )
    record = next((r for r in summary["history"] if r["round"] == round), None)
    return "\n\n".join(
        [
            _front_matter(summary),
            f"# {summary['name']}",
            f"A student distilled by fdl {fdl.__version__} with the method "
            f"`{summary['method']}`: round {round} of {summary['rounds']}, seed {summary['seed']}.",
            f"```python\n{usage}\n```\n\n`FOLDER` stands for this folder.",
            f"## Model\n\n{_model(recipe)}",
            f"## Inputs\n\n{_inputs(inputs)}",
            f"## Data\n\n{_data(recipe, summary)}",
            f"## Quality\n\n{_quality(summary, record)}",
            f"## Communication\n\n{_communication(summary, record)}",
            f"## Privacy\n\n{_privacy(summary)}",
            f"## Recipe\n\n```yaml\n{OmegaConf.to_yaml(without_paths(recipe.to_dict()))}```\n",
        ]
    )


def _front_matter(summary: Mapping[str, Any]) -> str:
    tags = "\n".join(f"- {tag}" for tag in ("federated-distillation", "fdl", summary["method"]))
    return f"---\ntags:\n{tags}\n---"


def _model(recipe: Recipe) -> str:
    student = _named(recipe.student)
    if not recipe.specialists:
        return f"Student: {student}. Every client has this architecture."
    return f"Student: {student}. Specialists at the clients: {', '.join(_named(one) for one in recipe.specialists)}."


def _inputs(inputs: Mapping[str, Any]) -> str:
    lines = []
    if "images" in inputs:
        images = inputs["images"]
        mean, std = (", ".join(f"{value:.6g}" for value in images[key]) for key in ("mean", "std"))
        size = "×".join(map(str, images["shape"][1:]))
        lines.append(
            f"- Images: {size} (channels×height×width), 0 is black and 1 is white, then normalised: mean {mean}, "
            f"standard deviation {std}. {images['resize'][0].upper()}{images['resize'][1:]}."
        )
    if "texts" in inputs:
        lines.append(f"- Texts: at most {inputs['texts']['shape'][1]} tokens, ids {inputs['texts']['ids']}.")
    if "classes" in inputs:
        lines.append(f"- Classes, in the order of the logits: {', '.join(inputs['classes'])}.")
    return "\n".join(lines) or "As the data of the recipe give them."


def _data(recipe: Recipe, summary: Mapping[str, Any]) -> str:
    samples = [participant["samples"] for participant in summary["participants"]]
    lines = [
        f"- Data: {_named(recipe.data)}, partitioned by {_named(recipe.partition)}.",
        f"- {len(samples)} clients with {sum(samples):,} private training samples ({min(samples):,} to "
        f"{max(samples):,} each). They did not leave the clients.",
    ]
    return "\n".join(lines)


def _quality(summary: Mapping[str, Any], record: Mapping[str, Any] | None) -> str:
    metrics = (record or summary)["metrics"]
    rows = [(key, value) for key, value in metrics.items() if key.startswith(("student/", "specialists/"))]
    lines = [f"| `{key}` | {value:.4f} |" for key, value in rows if value is not None]
    score = f"test/{summary['score']['metric']}"
    # of the same round as the table; the participants' list has each client's latest metrics
    measured = [p["metrics"] for p in summary["participants"]] if record is None else record["clients"].values()
    own = [metrics[score] for metrics in measured if metrics.get(score) is not None]
    table = "\n".join(["| metric | value |", "|---|---|", *lines])
    if not own:
        return table
    return f"{table}\n\nSpecialists: {score} {statistics.fmean(own):.4f} on average, {min(own):.4f} to {max(own):.4f}."


def _communication(summary: Mapping[str, Any], record: Mapping[str, Any] | None) -> str:
    sent, total = (record or summary)["communication"], summary["communication"]
    kinds = ", ".join(f"{kind} {decimal(size)}" for kind, size in total["by_kind"].items() if size)
    lines = [
        f"- Until this round: {decimal(sent['upload_bytes'])} up and {decimal(sent['download_bytes'])} down, all "
        "clients together; every message was encoded and counted.",
        f"- Once, before the first round: {decimal(total['setup_bytes'])}.",
    ]
    last = record is None or record["round"] == summary["rounds"]
    return "\n".join([*lines, *([f"- By kind: {kinds}."] if kinds and last else [])])


def _privacy(summary: Mapping[str, Any]) -> str:
    spent = summary.get("privacy") or {}
    largest = spent.get("epsilon")
    if largest is None or math.isinf(largest):
        why = "Not all that clients sent had noise" if "delta" in spent else "No noise was added anywhere"
        return (
            f"{why}: ε = ∞. What clients sent, and the student, may reveal something of their "
            "data; that data stayed at the sites is no bound on this."
        )
    level, limit = spent["level"], spent.get("limit")
    budget = "" if limit is None else f", of a budget of {limit:g}"
    hidden = "one example of a client, in or out" if level == "example" else "all data of a client, put in for others"
    source = (
        "Noise was drawn from a secret noise seed: who has it can take the noise off."
        if spent.get("noise") == "secret"
        else "Noise was drawn from the recipe's seed, as in a simulation: whoever knows it can take the noise off."
    )
    each = ", ".join(f"client {client} {value:.3f}" for client, value in spent["clients"].items())
    return "\n".join(
        [
            f"- ε ≤ {largest:.3f} at δ = {spent['delta']:g}{budget}: {hidden} can hardly be told from all that was "
            f"sent and from this student (differential privacy, {spent['accountant'].upper()} accountant, all rounds).",
            f"- By client: {each}.",
            "- Not covered: how many samples a client has, who took part in which round, and what is known of a "
            f"person who has several examples. {source}",
        ]
    )


def _named(component: Component | None) -> str:
    if component is None:
        return "none"
    args = ", ".join(f"{key}={value}" for key, value in component.args.items())
    return f"`{component.target}`" + (f" ({args})" if args else "")

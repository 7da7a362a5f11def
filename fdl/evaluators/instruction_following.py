"""Instruction following, verified by rules."""

from __future__ import annotations

import inspect
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fdl.datamodules.records import Record, existing
from fdl.datamodules.table_files import read_table
from fdl.errors import UserError
from fdl.evaluators.base import Evaluator
from fdl.evaluators.continuation import continuations, require_tokenizer
from fdl.evaluators.instructions import RULES, is_followed
from fdl.utils.arguments import at_least
from fdl.utils.suggest import suggest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning import LightningModule

    from fdl.participants import Server


@dataclass(frozen=True)
class Prompt:
    """A prompt with verifiable instructions.

    Attributes:
        text: the prompt.
        instructions: its instructions as pairs of a rule's id and the rule's arguments.
    """

    text: str
    instructions: list[tuple[str, dict[str, Any]]]


class InstructionFollowing(Evaluator):
    """Fraction of verifiable instructions that a language model follows; no judge model is needed.

    Metrics: ``prompt_strict``, the fraction of prompts of which all instructions are followed; ``instruction_strict``,
    the fraction of all instructions; ``prompt_loose`` and ``instruction_loose``, which also accept the response without
    its first line, its last line, both, or its asterisks; and ``strict_<type>`` per type of instruction.

    Decoding is greedy and ends at the tokenizer's end of text. If prompt and response exceed the model's context, the
    beginning of the prompt is cut off.

    Source: IFEval (Zhou et al., 2023, arXiv:2311.07911).

    Args:
        prompts: path of a JSONL or JSONL.GZ file in IFEval's format: ``prompt``, ``instruction_id_list`` and
            ``kwargs``, one object per instruction (null values are ignored).
        limit: use the first `limit` prompts only; None: all.
        new_tokens: maximum length of a response in tokens.
        template: prompt template that the model was trained with; ``{}`` stands for the prompt.
        every: number of rounds between two evaluations; 0: only after the last round.
        label: name under which the metrics are recorded; None: ``"instruction_following"``.
    """

    name = "instruction_following"
    tasks = ("language",)

    def __init__(
        self,
        prompts: str,
        limit: int | None = None,
        new_tokens: int = 256,
        template: str = "{}\n\n",
        every: int = 0,
        label: str | None = None,
    ):
        super().__init__(every, label)
        if "{}" not in template:
            raise UserError(f"template must have {{}} for the prompt, got {template!r}")
        self.path, self.template = prompts, template
        self.limit = None if limit is None else at_least("limit", limit, 1)
        self.new_tokens = at_least("new_tokens", new_tokens, 1)
        self._prompts: list[Prompt] | None = None

    def prepare(self, server: Server) -> None:
        """Read the prompts."""
        self._read()
        require_tokenizer(server, self.new_tokens, self.name)

    def evaluate(self, server: Server, module: LightningModule) -> dict[str, float]:
        """Generate responses to all prompts, and verify them."""
        prompts = self._read()
        tokenizer = require_tokenizer(server, self.new_tokens, self.name)
        asked = [tokenizer.encode(self.template.replace("{}", prompt.text)) for prompt in prompts]
        answers = continuations(server, module, asked, self.new_tokens)
        return score_responses(prompts, [tokenizer.decode(ids) for ids in answers])

    def _read(self) -> list[Prompt]:
        if self._prompts is None:
            self._prompts = [_prompt(record) for record in read_table(existing(self.path))[: self.limit]]
        return self._prompts


def score_responses(prompts: Sequence[Prompt], answers: Sequence[str]) -> dict[str, float]:
    """Verify responses by the rules.

    Args:
        prompts: the prompts.
        answers: one response per prompt.

    Returns:
        The metrics of `InstructionFollowing`.
    """
    metrics: dict[str, float] = {}
    for reading in ("strict", "loose"):
        whole, single = [], []
        types: dict[str, list[bool]] = defaultdict(list)
        for prompt, answer in zip(prompts, answers, strict=True):
            followed = [is_followed(rule, kwargs, answer, reading == "loose") for rule, kwargs in prompt.instructions]
            whole.append(all(followed))
            single += followed
            for (rule, _), done in zip(prompt.instructions, followed, strict=True):
                types[rule].append(done)
        metrics[f"prompt_{reading}"] = sum(whole) / len(whole)
        metrics[f"instruction_{reading}"] = sum(single) / len(single)
        if reading == "strict":
            by_type = {
                f"strict_{rule.partition(':')[2]}": sum(done) / len(done) for rule, done in sorted(types.items())
            }
    return metrics | by_type


def _prompt(record: Record) -> Prompt:
    """Parse one line of the file; its instructions must be known and their arguments complete."""
    rules, arguments = record["instruction_id_list"], record["kwargs"]
    if not isinstance(rules, list) or not isinstance(arguments, list) or len(rules) != len(arguments) or not rules:
        raise UserError(f"{record.place}: instruction_id_list and kwargs must be lists of one length, at least 1")
    instructions = []
    for rule, given in zip(rules, arguments, strict=True):
        if rule not in RULES:
            raise UserError(f"{record.place}: unknown instruction {rule!r}{suggest(str(rule), RULES)}")
        kwargs = {key: value for key, value in given.items() if value is not None}
        try:
            inspect.signature(RULES[rule]).bind("", **kwargs)
            is_followed(rule, kwargs, "x")
        except (TypeError, AttributeError, UserError) as error:
            raise UserError(f"{record.place}: {rule}: {error}") from error
        instructions.append((rule, kwargs))
    return Prompt(record.text("prompt"), instructions)

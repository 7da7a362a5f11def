"""How many instructions whose fulfilment a rule can check a model follows."""

from __future__ import annotations

import inspect
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fdl.datamodules.records import Record, existing
from fdl.datamodules.table_files import read_table
from fdl.errors import UserError
from fdl.evaluators.base import Evaluator, at_least
from fdl.evaluators.continuation import continuations, text_model
from fdl.evaluators.instructions import RULES, follows
from fdl.utils.suggest import suggest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning import LightningModule

    from fdl.participants import Server


@dataclass(frozen=True)
class Prompt:
    """What a model is told to do.

    Attributes:
        text: the prompt.
        instructions: those in it, as pairs of a rule's id and its arguments.
    """

    text: str
    instructions: list[tuple[str, dict[str, Any]]]


class InstructionFollowing(Evaluator):
    """Asks a language model to do what rules can check, as IFEval does (Zhou et al., 2023); no judge is needed.

    Metrics: ``prompt_strict``, the share of prompts all of whose instructions are followed; ``instruction_strict``,
    the share of all instructions; ``prompt_loose`` and ``instruction_loose``, where a response also counts without
    its first line, its last, both, or its asterisks; and ``strict_<type>`` for each of the instruction types.

    Answers are greedy and end with the tokenizer's end of text. Where prompt and answer are too long for the model, it
    does not read the prompt's beginning.

    Args:
        prompts: a file of prompts, JSONL or JSONL.GZ, in IFEval's form: ``prompt``, ``instruction_id_list`` and
            ``kwargs``, one object an instruction (null values are left out).
        limit: only so many of them, the first ones; None: all.
        new_tokens: length of an answer at most.
        template: what a prompt is put into, with ``{}`` for it, as the model was trained.
        every: as in `Evaluator`.
        label: as in `Evaluator`.
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
        text_model(server, self.new_tokens, self.name)

    def evaluate(self, server: Server, module: LightningModule) -> dict[str, float]:
        """Let the model answer all prompts, and check its answers."""
        prompts = self._read()
        tokenizer = text_model(server, self.new_tokens, self.name)
        asked = [tokenizer.encode(self.template.replace("{}", prompt.text)) for prompt in prompts]
        answers = continuations(server, module, asked, self.new_tokens)
        return check(prompts, [tokenizer.decode(ids) for ids in answers])

    def _read(self) -> list[Prompt]:
        if self._prompts is None:
            self._prompts = [_prompt(record) for record in read_table(existing(self.path))[: self.limit]]
        return self._prompts


def check(prompts: Sequence[Prompt], answers: Sequence[str]) -> dict[str, float]:
    """Check answers by the rules.

    Args:
        prompts: what was asked.
        answers: one a prompt.

    Returns:
        The metrics of `InstructionFollowing`.
    """
    metrics: dict[str, float] = {}
    for reading in ("strict", "loose"):
        whole, single = [], []
        types: dict[str, list[bool]] = defaultdict(list)
        for prompt, answer in zip(prompts, answers, strict=True):
            followed = [follows(rule, kwargs, answer, reading == "loose") for rule, kwargs in prompt.instructions]
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
    """One line of the file, its instructions known and their arguments complete."""
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
            follows(rule, kwargs, "x")
        except (TypeError, AttributeError, UserError) as error:
            raise UserError(f"{record.place}: {rule}: {error}") from error
        instructions.append((rule, kwargs))
    return Prompt(record.text("prompt"), instructions)

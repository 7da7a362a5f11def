"""What can go wrong, in the words of the person who has to mend it."""


class UserError(Exception):
    """A mistake in what the user gave us.

    The message is complete: it names the file, key or client and what was expected. The command line prints
    it without a traceback and exits with code 2.
    """


class RecipeError(UserError):
    """Everything that is wrong with a recipe, listed at once.

    Args:
        source: the recipe's file name.
        problems: one sentence each, with the full key first.
    """

    def __init__(self, source: str, problems: list[str]):
        self.source, self.problems = source, list(problems)
        count = "one problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        super().__init__("\n".join([f"{source}: {count}", *(f"  - {p}" for p in self.problems)]))


class RefusedError(Exception):
    """A message that the receiver will not use: damaged, not finite, or of a wrong shape.

    The round goes on without it; the ledger counts it under the client that sent it.

    Args:
        reason: what was wrong, without the sender's name.
    """

    def __init__(self, reason: str):
        self.reason = reason
        super().__init__(reason)

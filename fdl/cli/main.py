"""Command-line interface; it imports torch only after a recipe has been read and checked."""

from __future__ import annotations

import argparse
import errno
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from fdl import __version__
from fdl.cli.terminal import log_to_stderr, replace_unencodable
from fdl.engine.distributed.launch_environment import is_follower
from fdl.errors import MissingPathError, UserError
from fdl.utils.console import console
from fdl.utils.interrupts import GracefulShutdown, Interrupted
from fdl.utils.paths import expanded

FORMATS = ("timm", "transformers", "open_clip", "torch", "onnx")

AUDIT_FAILED = 3
"""Exit code of a run that finished, but whose audit violates its claimed privacy bounds."""

_SYSTEM_ERRORS = (errno.ENAMETOOLONG, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
"""Errors of the operating system that are not the program's fault: a sentence is as informative as a traceback."""


def run(argv: list[str]) -> int:
    """Run one command.

    Args:
        argv: the command-line arguments, without the program's name.

    Returns:
        The exit code.
    """
    options = None
    replace_unencodable()
    try:
        if not argv:
            _parser().print_help()
            return 0
        options, overrides = _parse(argv)
        log_to_stderr()
        with GracefulShutdown(at_once=True):
            return _run(options, overrides, argv)
    except UserError as error:
        where = " in another process of the run" if is_follower() else ""
        print(f"error{where}: {error}{_missing_path_hint(error, options)}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in _SYSTEM_ERRORS or not error.filename:
            raise
        print(f"error: {str(error.filename)[:200]}: {error.strerror}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace, overrides: list[str], argv: Sequence[str]) -> int:
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # for user-defined plug-ins; `python -m` adds this folder, `fdl` does not
    return COMMANDS[options.command](options, overrides, argv)


def fit_command(options: argparse.Namespace, overrides: list[str], argv: Sequence[str]) -> int:
    """Run a federation: ``fdl fit``.

    Args:
        options: the parsed options.
        overrides: ``key=value`` strings.
        argv: the command-line arguments, for the command that resumes an interrupted run.

    Returns:
        The exit code.
    """
    from fdl import recipe
    from fdl.runs import run as runs

    loaded = recipe.load(options.recipe, overrides)
    folder = runs.folder_of(loaded, options.output_dir)
    try:
        summary = runs.run_recipe(loaded, folder, options.resume, options.overwrite)
    except Interrupted as stop:
        if not stop.saved:
            raise
        if not is_follower():
            command = [word for word in argv if word not in ("--resume", "--overwrite")]
            print(
                f"interrupted; the run is saved in {folder}. To go on:\n"
                f"  {_program()} {shlex.join([*command, '--resume'])}",
                file=sys.stderr,
            )
        return stop.code
    if is_follower():
        return 0
    from fdl.runs.report import print_summary

    print_summary(summary, console(), folder)
    return 0 if (summary.get("audit") or {}).get("passed", True) else AUDIT_FAILED


def check_command(options: argparse.Namespace, overrides: list[str], argv: Sequence[str]) -> int:
    """Build a recipe's federation and print its description: ``fdl check``; nothing is trained or written.

    Args:
        options: the parsed options.
        overrides: ``key=value`` strings.
        argv: the command-line arguments; unused.

    Returns:
        The exit code.
    """
    from fdl import recipe
    from fdl.runs import run as runs

    loaded = recipe.load(options.recipe, overrides)
    folder = runs.folder_of(loaded, options.output_dir)
    runs.require_usable(folder)
    print(loaded.to_yaml())
    from fdl.cli.check import describe_federation

    print(describe_federation(loaded, folder))
    if note := runs.rejection_reason(loaded, folder):
        print(f"fdl fit would stop: {note}")
    return 0


def compare_command(options: argparse.Namespace, overrides: list[str], argv: Sequence[str]) -> int:
    """Run several variants over several seeds and tabulate them: ``fdl compare``.

    Args:
        options: the parsed options.
        overrides: ``key=value`` strings.
        argv: the command-line arguments, for the command that continues an interrupted comparison.

    Returns:
        The exit code.
    """
    from fdl.runs.compare import run_comparison

    try:
        run_comparison(options.recipe, overrides, options.methods, options.seeds, options.output_dir, options.overwrite)
    except KeyboardInterrupt as stop:
        command = [word for word in argv if word != "--overwrite"]
        print(f"interrupted. To go on, give the same command:\n  {_program()} {shlex.join(command)}", file=sys.stderr)
        return getattr(stop, "code", 130)
    return 0


def export_command(options: argparse.Namespace, overrides: list[str], argv: Sequence[str]) -> int:
    """Write a run's student in the format of another library: ``fdl export``.

    Args:
        options: the parsed options.
        overrides: ``key=value`` strings; unused.
        argv: the command-line arguments; unused.

    Returns:
        The exit code.
    """
    from fdl.runs.export import export

    print(f"written to {export(options.run, options.format, options.output_dir, options.which)}")
    return 0


def audit_command(options: argparse.Namespace, overrides: list[str], argv: Sequence[str]) -> int:
    """Attack a finished run: ``fdl audit``.

    Args:
        options: the parsed options.
        overrides: ``key=value`` strings.
        argv: the command-line arguments; unused.

    Returns:
        The exit code; `AUDIT_FAILED` if an attack finds more than the run's privacy accounting allows.
    """
    from fdl.runs.audit import audit_run, print_audit

    result, path = audit_run(options.run, options.attacks or (), overrides)
    print_audit(result, console())
    print(f"written to {path}")
    return 0 if result.passed else AUDIT_FAILED


def list_command(options: argparse.Namespace, overrides: list[str], argv: Sequence[str]) -> int:
    """Print the possible contents of recipes: ``fdl list``.

    Args:
        options: the parsed options.
        overrides: ``key=value`` strings; unused.
        argv: the command-line arguments; unused.

    Returns:
        The exit code.
    """
    from fdl.cli.listing import page

    print(page(options.words))
    return 0


COMMANDS: dict[str, Callable[[argparse.Namespace, list[str], Sequence[str]], int]] = {
    "fit": fit_command,
    "check": check_command,
    "compare": compare_command,
    "export": export_command,
    "audit": audit_command,
    "list": list_command,
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise UserError(f"{message}\n{self.prog} --help tells more")

    def _check_value(self, action: argparse.Action, value: object) -> None:
        # like argparse's own message, with the nearest choices instead of all in one line
        if action.choices is not None and value not in action.choices:
            from fdl.utils.suggest import suggest

            raise argparse.ArgumentError(action, f"invalid choice: {value!r}{suggest(str(value), action.choices)}")


def _parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parse options and overrides, in any order."""
    options, rest = _parser().parse_known_args(argv)
    given = getattr(options, "overrides", [])
    if wrong := [text for text in rest if text.startswith("-")]:
        raise UserError(_explain_option(wrong[0], rest + given))
    return options, given + rest


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=_program(),
        description="Federated distillation of foundation models.",
        epilog="List the keys of a recipe: fdl list keys. List the plug-ins: fdl list.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"fdl {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    def command(name: str, help: str, *example: str) -> argparse.ArgumentParser:
        epilog = "examples:\n" + "\n".join(f"  python -m fdl {line}" for line in example)
        form = argparse.RawDescriptionHelpFormatter
        return commands.add_parser(
            name, help=help, description=help, epilog=epilog, formatter_class=form, allow_abbrev=False
        )

    def recipe_options(sub: argparse.ArgumentParser, many: bool = False) -> None:
        action, hint = ("append", "; may be given several times") if many else ("store", "")
        sub.add_argument(
            "--recipe", required=True, action=action, metavar="FILE", help=f"the recipe, a YAML file{hint}"
        )
        sub.add_argument(
            "--output-dir", type=_path, metavar="DIR", help="folder of the run; default <output_dir>/<name>"
        )
        sub.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe; the last one wins")

    sub = command(
        "fit",
        "Run a federation.",
        "fit --recipe recipes/quickstart.yaml",
        "fit --recipe recipes/quickstart.yaml federation.rounds=10 specialists.1.args.hidden=[32]",
    )
    recipe_options(sub)
    how = sub.add_mutually_exclusive_group()
    how.add_argument("--resume", action="store_true", help="continue from the last checkpoint")
    how.add_argument(
        "--overwrite", action="store_true", help="replace the run in the folder; files not written by fdl are kept"
    )

    recipe_options(
        command(
            "check",
            "Build the federation of a recipe and show models, data and bytes per round, without training.",
            "check --recipe recipes/quickstart.yaml",
        )
    )

    sub = command(
        "compare",
        "Run several methods over several seeds and tabulate them; complete runs are not repeated.",
        "compare --recipe recipes/quickstart.yaml --methods centralized,fedavg --seeds 0,1,2",
    )
    recipe_options(sub, many=True)
    sub.add_argument("--methods", type=_names, metavar="A,B", help="variants of the recipe, or methods")
    sub.add_argument("--seeds", type=_seeds, metavar="0,1", help="seeds; default compare.seeds of the recipe")
    sub.add_argument("--overwrite", action="store_true", help="replace runs of a recipe that has changed since")

    sub = command(
        "export",
        "Write a run's student, with a model card, in the format of another library.",
        "export --run runs/quickstart --format torch",
    )
    sub.add_argument("--run", required=True, type=_path, metavar="DIR", help="folder of a finished run")
    sub.add_argument("--format", required=True, choices=FORMATS, help="library that loads the student")
    sub.add_argument(
        "--which", default="best", choices=("best", "last"), help="best round on validation data, or last; default best"
    )
    sub.add_argument(
        "--output-dir", type=_path, metavar="DIR", help="new folder; default export-<format> in the run's folder"
    )

    sub = command(
        "audit",
        "Attack a finished run: measure what its models and messages leak, and check its privacy accounting. "
        "Exit code 3: an attack found more than the accounting allows.",
        "audit --run runs/quickstart",
        "audit --run runs/quickstart --attacks loss_threshold,label_leakage",
        "audit --run runs/quickstart 'evaluation.attacks=[{target: lira, args: {shadows: 64}}]'",
    )
    sub.add_argument("--run", required=True, type=_path, metavar="DIR", help="folder of a finished run")
    sub.add_argument(
        "--attacks", type=_names, metavar="A,B", help="attacks; default those of the recipe, or else a standard set"
    )
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the attacks: evaluation.attacks")

    sub = command(
        "list",
        "List the plug-ins, metrics, recipes and keys, or describe the arguments of one plug-in.",
        "list methods",
        "list keys",
        "list module timm",
    )
    sub.add_argument(
        "words", nargs="*", metavar="name", help="a kind of plug-in, metrics, recipes or keys; a plug-in; or both"
    )
    return parser


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _path(text: str) -> Path:
    try:
        return expanded(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _seeds(text: str) -> list[int]:
    try:
        return [int(seed) for seed in _names(text)]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected whole numbers with commas, got {text!r}") from None


def _explain_option(option: str, others: list[str]) -> str:
    """Describe an unknown option, with the recipe key or the option that was probably meant."""
    from fdl.recipe.config import Recipe
    from fdl.recipe.validate import keys
    from fdl.utils.suggest import suggest

    name, _, value = option.lstrip("-").partition("=")
    paths = [path for path, *_ in keys(Recipe)]
    word = name.replace("-", "_")
    path = next((p for p in paths if word == p), None) or next((p for p in paths if p.endswith(f".{word}")), None)
    if path:
        value = value or next((other for other in others if "=" not in other and not other.startswith("-")), "…")
        return f"unknown option {option}; keys of the recipe are set without dashes: {path}={value}"
    options = ["--recipe", "--resume", "--overwrite", "--output-dir", "--methods", "--seeds"]
    return f"unknown option {option}{suggest(f'--{name}', options, few=0)}"


def _missing_path_hint(error: UserError, options: argparse.Namespace | None) -> str:
    """Return a hint for a missing relative path, which users may expect to be relative to the recipe."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, MissingPathError):
        cause = cause.__cause__
    recipe = getattr(options, "recipe", None)
    if cause is None or cause.path.is_absolute() or recipe is None:
        return ""
    folders = dict.fromkeys(Path(one).absolute().parent for one in ([recipe] if isinstance(recipe, str) else recipe))
    for folder in folders:
        if (folder / cause.path).exists():
            return f"; beside the recipe there is {folder / cause.path}, but paths start where fdl does"
    elsewhere = [str(folder) for folder in folders if folder != Path.cwd()]
    return f"; paths start where fdl does, not in the recipe's {elsewhere[0]}" if elsewhere else ""


def _program() -> str:
    """Return the command that started fdl, for messages that show a command."""
    return "fdl" if Path(sys.argv[0]).name == "fdl" else "python -m fdl"

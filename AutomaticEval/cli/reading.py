"""How the command line is read before options are: flags with a value, options that may stand without one, and names that are no command."""

from __future__ import annotations

from typing import Any

from typer.core import TyperGroup

from AutomaticEval.cli.options import spelling
from AutomaticEval.errors import did_you_mean
from AutomaticEval.store.disk.overwriting import VERSION

YES, NO = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
"""What people write behind a flag, which needs nothing behind it."""
RAW = "AutomaticEval.arguments"
ALONE = {"--mlflow": "local", "--overwrite": "true"}
"""What an option stands for that has no value behind it: the parser expects one."""


class Commands(TyperGroup):
    """The commands, and the benchmark that runs without one. `--flag true` is `--flag`, and `--flag false` is nothing."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta[RAW] = args = _with_values(_plain(args, _flags(self)))
        parsed: list[str] = super().parse_args(ctx, list(args))
        return parsed

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Names of no command that stand behind an option are told with it: most are a value too many."""
        raw: list[str] = ctx.meta[RAW]
        at = len(raw) - len(args)
        if at > 0 and self.get_command(ctx, args[0]) is None:
            ctx.fail(_misplaced(args[0], raw[:at], _flags(self), list(self.commands)))
        return super().resolve_command(ctx, args)


def _flags(group: TyperGroup) -> set[str]:
    """The names of all options without a value, of the benchmark and of all commands."""
    found: set[str] = set()
    for command in (group, *group.commands.values()):
        found |= {name for each in command.params if getattr(each, "is_flag", False) for name in each.opts}
        if isinstance(command, TyperGroup) and command is not group:
            found |= _flags(command)
    return found


def _plain(args: list[str], flags: set[str]) -> list[str]:
    """The arguments without what is said of flags: `--flag true`, `--flag=true` -> `--flag`; `--flag false` -> nothing."""
    plain: list[str] = []
    left = list(args)
    while left:
        name, equals, value = left.pop(0).partition("=")
        if name == "--":
            return [*plain, name, *left]
        if _named(name) not in flags:
            plain.append(f"{name}{equals}{value}")
            continue
        if not equals and left and left[0].lower() in YES[:3] + NO[:3]:  # 1 and 0 may be an argument
            equals, value = "=", left.pop(0)
        if value.lower() in NO:
            continue
        plain.append(name if value.lower() in YES else f"{name}{equals}{value}")
    return plain


def _with_values(args: list[str]) -> list[str]:
    """The arguments, with a value for the options in ALONE that have none. Behind --overwrite only what it means is a value, and never a prompt."""
    completed = list(args)
    for at, each in enumerate(args[: args.index("--")] if "--" in args else args):
        behind = args[at + 1] if at + 1 < len(args) else "-"
        is_value = behind in (VERSION, *YES[:3], *NO[:3]) if each == "--overwrite" else not behind.startswith("-")
        if each in ALONE and not is_value:
            completed[at] = f"{each}={ALONE[each]}"
    return completed


def _named(argument: str) -> str:
    """An option in the one spelling that it has."""
    return f"--{spelling(argument[2:])}" if argument.startswith("--") else argument


def _misplaced(word: str, before: list[str], flags: set[str], commands: list[str]) -> str:
    """What is wrong with a word behind options that is no command."""
    last = before[-1]
    near = did_you_mean(word, commands)
    command = f"{near} The options of a command stand behind its name." if near else ""
    if _named(last) in flags:
        return f"{last} takes no value, and {word!r} stands behind it; leave it out.{command}"
    option, value = last.split("=", 1) if last.startswith("--") and "=" in last else (before[-2:][0], last)
    return (
        f"{option} takes one value, {value!r}, and {word!r} stands behind it. Write several with commas and no spaces "
        f"({value},{word}), and put what has spaces between quotes.{command}"
    )

"""Completion in bash, zsh and fish: the scripts that the shells load, and what they ask at each press of the key.

A script sends what was typed, and gets one offer on each line. The names in the offers come from clients, so no script
evaluates them: zsh and fish quote what they insert, and for bash it is quoted here.
"""

import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import typer

PROGRAM: Final = "dspex-persist"
VARIABLE: Final = "_DSPEX_PERSIST_COMPLETE"
"""Set to `source_SHELL`, the program prints the script; to `complete_SHELL`, offers."""
_LINE, _REPLACED, _WORDS = "_DSPEX_PERSIST_LINE", "_DSPEX_PERSIST_REPLACED", "_DSPEX_PERSIST_WORDS"
_BETWEEN: Final = "\x1f"
_OF_FILES: Final = ("BACKUP", "DIR", "FILE", "PATH", "PATH|URL", "TARGET")
"""How the help calls values that are files."""
_FILES: Final = "files"
"""The first line of an answer, if the shell is to offer files; otherwise it is empty."""

_BASH: Final = f"""\
# Completion of {PROGRAM} for bash.
_dspex_persist_completion() {{
    local offer is_first=1 program="${{1/#\\~/$HOME}}" line="${{COMP_LINE:0:COMP_POINT}}"
    COMPREPLY=()
    while IFS= read -r offer; do
        if [[ -n $is_first ]]; then
            is_first=
            [[ $offer == {_FILES} ]] && compopt -o default 2>/dev/null
        else
            COMPREPLY+=("$offer")
        fi
    done < <({VARIABLE}=complete_bash {_LINE}="$line" {_REPLACED}="$2" "$program" 2>/dev/null)
}}
complete -F _dspex_persist_completion {PROGRAM}
"""

_ZSH: Final = f"""\
#compdef {PROGRAM}
# Completion of {PROGRAM} for zsh.
_dspex_persist_completion() {{
    local typed=$PREFIX
    # In an open quote, the quote is no part of it.
    [[ -z $compstate[quote] ]] && typed=${{(Q)PREFIX}}
    local -a asked=("${{(@Q)words[2,CURRENT-1]}}" "$typed") offers
    offers=("${{(@f)$({VARIABLE}=complete_zsh {_WORDS}="${{(pj:\\x1f:)asked}}" ${{~words[1]}} 2>/dev/null)}}")
    local first=$offers[1]
    offers=("${{(@)offers[2,-1]}}")
    if (( $#offers )); then
        _describe -V '{PROGRAM}' offers
    elif [[ $first == {_FILES} ]]; then
        [[ $PREFIX == --*=* ]] && compset -P '*='
        _files
    fi
}}
if [[ $funcstack[1] == _{PROGRAM} ]]; then
    _dspex_persist_completion "$@"
else
    compdef _dspex_persist_completion {PROGRAM}
fi
"""

_FISH: Final = f"""\
# Completion of {PROGRAM} for fish.
function __dspex_persist_completion
    set -l words (commandline -opc)
    set -l last (commandline -ct)
    set -l program (string replace -r '^~' $HOME -- $words[1])
    set -l asked (string join \\x1f -- $words[2..-1] "$last")
    set -l offers (env {VARIABLE}=complete_fish {_WORDS}=$asked $program 2>/dev/null)
    if test (count $offers) -gt 1
        printf '%s\\n' $offers[2..-1]
    else if test "$offers[1]" = {_FILES}
        set -l option (string match -r '^--[^=]*=' -- $last)
        set -l path (string replace -r '^--[^=]*=' '' -- $last)
        for found in (complete -C "'' $path")
            printf '%s%s\\n' "$option" $found
        end
    end
end
complete --command {PROGRAM} --no-files --keep-order --arguments '(__dspex_persist_completion)'
"""

_SCRIPTS: Final[Mapping[str, str]] = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}


class Offer(NamedTuple):
    """A word that may be meant, in full, and what it is."""

    word: str
    about: str = ""


@dataclass(frozen=True, slots=True)
class Typed:
    """What was typed: whole words, and the beginning of the last one.

    Attributes:
        words: The words before it, without quotes.
        last: The beginning of the last word, without quotes.
        raw: The same as it was typed.
        quote: The quote in it that is open, if there is one.
    """

    words: tuple[str, ...]
    last: str
    raw: str = ""
    quote: str = ""


def answer(command: Any, instruction: str) -> int:
    """Do what the environment variable says; return the exit code."""
    what, _, shell = instruction.partition("_")
    if shell not in _SCRIPTS or what not in ("source", "complete"):
        print(f"{VARIABLE} is {instruction}: it must be source_SHELL, with {', '.join(_SCRIPTS)}", file=sys.stderr)
        return 2
    if what == "source":
        print(_SCRIPTS[shell], end="")
        return 0
    # What is wrong on the line must not appear in the middle of it.
    try:
        typed = _typed(shell)
        offers, are_files = offers_for(command, typed.words, typed.last)
        lines = list(_lines(shell, typed, offers))
    except (Exception, SystemExit):  # noqa: BLE001 - a half-typed command may be anything
        return 0
    print(_FILES if are_files else "")
    for line in lines:
        print(line)
    return 0


def _typed(shell: str) -> Typed:
    if shell == "bash":
        return split(os.environ.get(_LINE, ""))
    *words, last = os.environ.get(_WORDS, "").split(_BETWEEN)
    return Typed(tuple(words), split(f"- {last}").last if shell == "fish" else last)


def _lines(shell: str, typed: Typed, offers: Sequence[Offer]) -> Iterator[str]:
    for word, about in offers:
        if shell == "bash":
            yield from for_bash(typed, word)
        elif shell == "zsh":
            escaped = word.replace("\\", "\\\\").replace(":", "\\:")
            yield f"{escaped}:{about}" if about else escaped
        else:
            yield f"{word}\t{about}" if about else word


# What could follow


def offers_for(command: Any, words: Sequence[str], last: str) -> tuple[list[Offer], bool]:
    """Return what the last word may be, and whether it may be a file.

    Args:
        command: The whole command line.
        words: The words before it.
        last: The beginning of the word.
    """
    context, rest = _context_of(command, words)
    option, equals, value = last.partition("=")
    if equals and option.startswith("--"):
        parameter = _option_of(context.command, option)
        return _offers_of(parameter, context, value, f"{option}=") if parameter is not None else ([], False)
    if rest and (parameter := _option_of(context.command, rest[-1])) is not None:
        return _offers_of(parameter, context, last)
    if last.startswith("-") and "--" not in rest:
        return list(_options(context.command, last, rest)), False
    parameter = _argument_of(context)
    if parameter is not None:
        return _offers_of(parameter, context, last)
    commands = getattr(context.command, "commands", None) or {}
    if any(not word.startswith("-") for word in rest):
        # There is no such command.
        commands = {}
    named = [each for each in commands.items() if each[0].startswith(last) and not each[1].hidden]
    return [Offer(name, plain(each.help or "")) for name, each in named], False


def _context_of(command: Any, words: Sequence[str]) -> tuple[Any, list[str]]:
    """Return the context of the command that the words name, and those that follow its name."""
    context = typer.Context(command, info_name=PROGRAM, resilient_parsing=True)
    rest = list(words)
    while (commands := getattr(context.command, "commands", None)) is not None:
        # Options of groups have no values.
        names = [word for word in rest if not word.startswith("-")]
        if not names or names[0] not in commands:
            return context, rest
        rest = rest[rest.index(names[0]) + 1 :]
        named = commands[names[0]]
        parsed = rest if getattr(named, "commands", None) is None else []
        if parsed and _option_of(named, parsed[-1]) is not None:
            # Its value is what is being typed.
            parsed = parsed[:-1]
        context = named.make_context(names[0], list(parsed), parent=context, resilient_parsing=True)
    return context, rest


def _option_of(command: Any, word: str) -> Any:
    """Return the option with a value that has this name."""
    for parameter in command.params:
        takes_value = parameter.param_type_name == "option" and not parameter.is_flag
        if takes_value and word in (*parameter.opts, *parameter.secondary_opts):
            return parameter
    return None


def _options(command: Any, beginning: str, rest: Sequence[str]) -> Iterator[Offer]:
    """Yield the options that begin so, but for those that are there and take one value only."""
    for parameter in command.params:
        if parameter.param_type_name != "option" or parameter.hidden:
            continue
        names = [*parameter.opts, *parameter.secondary_opts]
        if not parameter.multiple and any(name in rest for name in names):
            continue
        yield from (Offer(name, plain(parameter.help or "")) for name in names if name.startswith(beginning))
    yield from (Offer(name, "Show help") for name in ("--help",) if name.startswith(beginning))


def _argument_of(context: Any) -> Any:
    """Return the first argument that has no value yet."""
    for parameter in context.command.params:
        if parameter.param_type_name != "argument":
            continue
        if parameter.nargs == -1 or not context.params.get(parameter.name):
            return parameter
    return None


def _offers_of(parameter: Any, context: Any, beginning: str, before: str = "") -> tuple[list[Offer], bool]:
    """Return what the value of a parameter may be, with what stands before it in the same word."""
    found = [str(each.value) for each in parameter.shell_complete(context, beginning)]
    return [Offer(f"{before}{word}") for word in found if word], parameter.metavar in _OF_FILES


def plain(text: str) -> str:
    """Return the first sentence of a help text, without markup."""
    first = re.split(r"(?<=\.)\s|\n\n", re.sub(r"\[/?[a-z]+\]", "", text).strip(), maxsplit=1)[0]
    return " ".join(first.split()).rstrip(".")


# Words of bash, which also fit the last word of fish

_ENDING: Final = " \t\n;|&<>()"
_IN_DOUBLE: Final = '"\\$`'
_SAFE: Final = re.compile(r"[\w@%+=:,./-]", re.ASCII)


def split(line: str) -> Typed:
    """Split the line up to the cursor as a shell does, without expanding anything."""
    words: list[str] = []
    word, began, quote, is_word = "", 0, "", False
    place = 0
    while place < len(line):
        each, following = line[place], line[place + 1 : place + 2]
        if not is_word and each not in _ENDING:
            began, is_word = place, True
        if quote == "'" or (quote == '"' and each != "\\"):
            quote, word = ("", word) if each == quote else (quote, word + each)
        elif each == "\\":
            escaped = following if not quote or following in _IN_DOUBLE else each + following
            word, place = word + escaped, place + 1
        elif each in "'\"":
            quote = each
        elif each in _ENDING:
            if is_word:
                words.append(word)
            word, is_word = "", False
        else:
            word += each
        place += 1
    # Assignments before the command are not part of it.
    while words and re.match(r"[A-Za-z_]\w*=", words[0]):
        del words[0]
    return Typed(tuple(words[1:]), word, line[began:] if is_word else "", quote)


def for_bash(typed: Typed, word: str) -> Iterator[str]:
    """Return what bash has to insert for a word: quoted, and without what it does not replace.

    It replaces what comes after an open quote, or after one of the characters in COMP_WORDBREAKS, such as a colon.
    """
    replaced = os.environ.get(_REPLACED, "")
    kept = typed.raw[: len(typed.raw) - len(replaced)] if typed.raw.endswith(replaced) else ""
    before = split(f"- {kept}").last
    if word.startswith(before):
        yield quoted(word[len(before) :], typed.quote)


def quoted(text: str, quote: str) -> str:
    """Return a text as it is written in bash: after this quote, or without one."""
    if quote == "'":
        return text.replace("'", "'\\''")
    if quote:
        # Nothing but single quotes protects an exclamation mark.
        escaped = "".join(f"\\{each}" if each in _IN_DOUBLE else each for each in text)
        return escaped.replace("!", "\"'!'\"")
    return "".join(each if _SAFE.match(each) or not each.isascii() else f"\\{each}" for each in text)


# Installing


def install(shell: str, home: Path) -> Path:
    """Write the script to where the shell finds it from its next start on; return the file."""
    if shell == "fish":
        return _write(home / f".config/fish/completions/{PROGRAM}.fish", _FISH)
    if shell == "zsh":
        _add_line(home / ".zshrc", "fpath+=~/.zfunc; autoload -Uz compinit; compinit")
        return _write(home / f".zfunc/_{PROGRAM}", _ZSH)
    path = _write(home / f".bash_completions/{PROGRAM}.sh", _BASH)
    _add_line(home / ".bashrc", f"source '{path}'")
    return path


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def _add_line(path: Path, line: str) -> None:
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if line not in text.splitlines():
        path.write_text(f"{text}{'' if not text or text.endswith(chr(10)) else chr(10)}{line}\n", encoding="utf-8")


def running_shell() -> str:
    """Return the shell that runs this program, one of those with a script.

    Raises:
        BadParameter: It is another one, or not known.
    """
    # It comes with typer, and has no types.
    import shellingham  # type: ignore[import-untyped]

    try:
        name = str(shellingham.detect_shell()[0])
    except shellingham.ShellDetectionFailure:
        name = Path(os.environ.get("SHELL", "")).name
    if name not in _SCRIPTS:
        known = ", ".join(_SCRIPTS)
        raise typer.BadParameter(f"there is no completion for {name or 'this shell'}, only for {known}")
    return name


def option(name: str, what: Callable[[str], None], help_text: str) -> Any:
    """Return an option of the program that does something for the running shell, and ends."""

    def call(wanted: bool) -> None:
        if wanted:
            what(running_shell())
            raise typer.Exit

    return typer.Option(name, callback=call, is_eager=True, help=help_text)


def show(shell: str) -> None:
    """Print the script."""
    print(_SCRIPTS[shell], end="")


def install_here(shell: str) -> None:
    """Install the script for this user, and say where."""
    path = install(shell, Path.home())
    print(f"{shell} completion installed in {path}\nIt takes effect in the next terminal.")

"""`module`: the name of a module, such as `dspy.ChainOfThought`."""

from typing import Final

from dspex_persist.state.values.json_text import RefusedError, shown
from dspex_persist.state.values.keywords import PATTERN, Keyword, Rule, one_of, read_text
from dspex_persist.state.values.registry import ValueType


def _to_module(document: object) -> str:
    if isinstance(document, str):
        return document
    raise RefusedError(f"a module is a JSON string, not {shown(document)}")


def _namespace(stated: object) -> Rule:
    namespace = read_text("namespace", stated)

    def check(module: str) -> str | None:
        if module == namespace or module.startswith(f"{namespace}."):
            return None
        return f"value {shown(module)} is not in namespace {shown(namespace)}"

    return Rule(check)


MODULE: Final = ValueType(
    "module",
    coerce=_to_module,
    constrain={
        **one_of("choices"),
        **one_of("allowed_modules"),
        **PATTERN,
        "namespace": Keyword(_namespace, empty=""),
    },
)

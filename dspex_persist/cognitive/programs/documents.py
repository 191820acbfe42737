"""The JSON of a saved program, and the names under which it is stored.

A program is a variable of the type map, `programs/NAME`; its tags are another one, `program-tags/NAME`. Any client of
the session can write both, so everything is checked when it is read. All in it is data: class names are only compared
with those of the module that the program is loaded into, and nothing is ever imported by them.
"""

import hashlib
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from dspex_persist.cognitive.programs.errors import DamagedProgramError
from dspex_persist.spelling import shorten
from dspex_persist.state.errors import InvalidArgumentError
from dspex_persist.state.model import Value
from dspex_persist.state.values.json_text import RefusedError, canonical

FORMAT: Final = 1
"""The version of the format that this release writes. It reads this one only."""

PROGRAMS: Final = "programs/"
TAGS: Final = "program-tags/"
MARK: Final = "program_format"
"""The key of the metadata that marks a program's variable; its text is the version of the format."""
_NAME_LENGTH: Final = 200
_MOST_SHOWN: Final = 3


class Part(BaseModel):
    """A part of a saved program."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, populate_by_name=True)


class SavedField(Part):
    """A field of a signature.

    Attributes:
        role: Whether it is an input or an output.
        type: Its type, as text.
        prefix: What DSPy writes before it.
        desc: Its description.
    """

    name: str
    role: Literal["input", "output"]
    type: str
    prefix: str
    desc: str


class SavedSignature(Part):
    """The signature of a predictor.

    Attributes:
        instructions: Its instructions.
        fields: Its fields, in their order.
        types: The classes among the types of its fields: by name, the types of a class's fields, or the values of an
            enumeration.
    """

    instructions: str
    fields: tuple[SavedField, ...] = Field(strict=False)
    types: dict[str, dict[str, str]] = {}


class SavedDemo(Part):
    """A demo of a predictor.

    Attributes:
        kind: Whether it is a `dspy.Example` or a dict.
        values: The names of its fields and their values, in their order.
        inputs: The names of the input fields, if the example says so.
    """

    kind: Literal["example", "dict"] = "example"
    values: tuple[Annotated[tuple[str, JsonValue], Field(strict=False)], ...] = Field(strict=False)
    inputs: tuple[str, ...] | None = Field(default=None, strict=False)


class SavedLm(Part):
    """The LM of a predictor that has one of its own: what it is called, never how to reach it.

    Attributes:
        name: Its name among the `lms` that were given; None without one.
        model: Its model.
        options: Its default options, of those that change answers.
    """

    name: str | None = None
    model: str
    options: dict[str, JsonValue] = {}


class SavedPredictor(Part):
    """A predictor.

    Attributes:
        kind: The name of its class.
        signature: Its signature.
        demos: Its demos.
        config: The options of its calls.
        decisions: How it decides, by output field (experimental in DSPy).
        lm: Its own LM.
        frozen: Whether it is inside of a frozen module, so that optimizers leave it as it is.
        also: Further paths that lead to the same predictor.
    """

    kind: str
    signature: SavedSignature
    demos: tuple[SavedDemo, ...] = Field(default=(), strict=False)
    config: dict[str, JsonValue] = {}
    decisions: dict[str, JsonValue] = {}
    lm: SavedLm | None = None
    frozen: bool = False
    also: tuple[str, ...] = Field(default=(), strict=False)


class SavedModule(Part):
    """A module, or a module inside of it.

    Attributes:
        kind: Its class.
        source: The SHA-256 of the class's source, unless the class is DSPy's own, or its source cannot be found.
        compiled: Whether it is frozen (`_compiled`). The program itself may be, too, which loading leaves out.
        settings: Such as `max_iters`.
        tools: The tools of an agent: by name, a hash of what the LM is told about the tool.
    """

    kind: str
    source: str | None = None
    compiled: bool = False
    settings: dict[str, int | float | None] = {}
    tools: dict[str, str] | None = None


class LeftOut(Part):
    """Something that is not in the saved program.

    Attributes:
        path: The predictor, or the module, that has it.
        what: What it is: the name of an option, or "forward".
        why: "secret" if it may be secret or an address, "unknown" if it is an option that nothing is known about,
            "object" if it is no data.
    """

    path: str
    what: str
    why: Literal["secret", "unknown", "object"]


class SavedBinding(Part):
    """Which variables set which options of a module; see `dspex_persist.dspy.bind`.

    Attributes:
        path: The module that is bound.
        options: By option, the name of the variable.
        per: The same by the path of a predictor.
        is_default: Whether variables give way to what the program says.
        live: Whether they are read for each call of an LM.
        lms: The names of the LMs that a variable chooses from.
        adapters: The names of the adapters.
    """

    path: str
    options: dict[str, str] = {}
    per: dict[str, dict[str, str]] = {}
    is_default: bool = False
    live: bool = False
    lms: tuple[str, ...] = Field(default=(), strict=False)
    adapters: tuple[str, ...] = Field(default=(), strict=False)


class SavedProgram(Part):
    """A saved program.

    Attributes:
        format: The version of the format.
        dspy: The version of DSPy that wrote it.
        adapter: The class of the adapter that was configured then.
        modules: The modules by path; "self" is the program.
        predictors: The predictors by path.
        retrievers: By path, how many passages a `dspy.Retrieve` asks for.
        bindings: Which variables set which options.
        left_out: What of its configuration is not here.
    """

    format: Literal[1] = FORMAT
    dspy: str
    adapter: str
    modules: dict[str, SavedModule]
    predictors: dict[str, SavedPredictor]
    retrievers: dict[str, Annotated[int, Field(ge=0)]] = {}
    bindings: tuple[SavedBinding, ...] = Field(default=(), strict=False)
    left_out: tuple[LeftOut, ...] = Field(default=(), strict=False)

    @property
    def kind(self) -> str:
        """The class of the program."""
        root = self.modules.get("self")
        return root.kind if root is not None else ""

    @property
    def demos(self) -> int:
        """How many demos its predictors have."""
        return sum(len(predictor.demos) for predictor in self.predictors.values())

    def document(self) -> dict[str, Any]:
        """Return it as JSON, without what is as it is by default."""
        return {"format": self.format, **self.model_dump(mode="json", exclude_defaults=True)}


class SavedTag(Part):
    """Which version a tag is on.

    Attributes:
        version: The version of the program's variable.
        hash: The hash of what the program was, by which it is found in a fork, where versions have other numbers.
    """

    version: int = Field(ge=0)
    hash: str


def variable_of(name: object) -> str:
    """Return the name of the variable that has a program.

    Raises:
        InvalidArgumentError: It cannot be the name of a program.
    """
    if not isinstance(name, str) or not name.strip() or not name.isprintable() or len(name) > _NAME_LENGTH:
        reason = f"the name of a program is 1 to {_NAME_LENGTH} printable characters, not {name!r:.80}"
        raise InvalidArgumentError("name", reason)
    return PROGRAMS + name


def tags_variable_of(name: str) -> str:
    """Return the name of the variable that has a program's tags."""
    return TAGS + variable_of(name).removeprefix(PROGRAMS)


def hash_of(value: Value) -> str:
    """Return the hash of a program as it is stored."""
    return hashlib.sha256(value.json.encode(errors="surrogatepass")).hexdigest()


def parse(name: str, version: int, document: object) -> SavedProgram:
    """Read a program.

    Args:
        name: The name of the program, for errors.
        version: The version of the variable, for errors.
        document: The value of the variable.

    Raises:
        DamagedProgramError: It is not a program, or one of another format.
    """
    if not isinstance(document, Mapping):
        raise DamagedProgramError(name, version, f"it is no program but a {type(document).__name__}")
    form = document.get("format")
    if type(form) is int and form > FORMAT:
        reason = f"its format is {form}, and this release reads {FORMAT}: upgrade dspex-persist"
        raise DamagedProgramError(name, version, reason)
    if type(form) is not int or form != FORMAT:
        reason = f"its format is {_brief(form)}, and the only one is {FORMAT}: ctx.programs.save did not write it"
        raise DamagedProgramError(name, version, reason)
    try:
        return SavedProgram.model_validate(document)
    except ValidationError as error:
        raise DamagedProgramError(name, version, _sentence(error)) from None
    except RecursionError:
        raise DamagedProgramError(name, version, "it is nested too deep") from None


def parse_tags(name: str, version: int, document: object) -> dict[str, SavedTag]:
    """Read the tags of a program; see `parse`."""
    if not isinstance(document, Mapping):
        raise DamagedProgramError(name, version, "its tags are no map")
    try:
        return {str(tag): SavedTag.model_validate(each) for tag, each in document.items()}
    except ValidationError as error:
        raise DamagedProgramError(
            name, version, f"its tags are not what ctx.programs.tag writes: {_sentence(error)}"
        ) from None


def size_of(document: object) -> int:
    """Return how many bytes a part of a program takes as JSON."""
    try:
        return len(canonical(document).encode(errors="surrogatepass"))
    except RefusedError:
        return 0


def _sentence(error: ValidationError) -> str:
    """Say what is wrong, without the values, which may be megabytes."""
    mistakes = error.errors(include_input=False, include_url=False, include_context=False)
    texts = [f"{'.'.join(map(_brief, each['loc'])) or 'it'}: {each['msg']}" for each in mistakes[:_MOST_SHOWN]]
    more = len(mistakes) - len(texts)
    return "; ".join(texts) + (f"; and {more} more" if more else "")


def _brief(thing: object) -> str:
    return shorten(thing if isinstance(thing, str) and thing.isprintable() else repr(thing), 60)

"""Typed state: models of variables, what is written and read, and migrations."""

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from decimal import Decimal
from typing import Any, ClassVar

import pytest
from pydantic import BaseModel, ConfigDict, Field, RootModel, computed_field, field_validator

from dspex_persist import Context, LocalState, ToolContext, tool
from dspex_persist.cognitive import typed
from dspex_persist.cognitive.errors import MigrationError, TypedValueError
from dspex_persist.cognitive.typed import migration, model
from dspex_persist.state.errors import InvalidArgumentError, InvalidValueError, VariableExistsError

pytestmark = pytest.mark.usefixtures("registry")


@pytest.fixture
def registry() -> Iterator[None]:
    """Forget the models and migrations of the test."""
    known = typed._KNOWN
    yield
    for each in (known.models, known.holders, known.migrations, known.typed, known.names):
        each.clear()


@pytest.fixture(scope="module")
def state() -> Iterator[LocalState]:
    with LocalState(tools={"rename": rename, "peek": peek}) as state:
        yield state


@pytest.fixture
def ctx(state: LocalState) -> Iterator[Context]:
    with Context(None, state) as ctx:
        yield ctx


class Holder:
    """Stands for a context."""


class Old(BaseModel):
    name: str


class New(BaseModel):
    first: str
    last: str = ""
    born: date | None = None


class Full(BaseModel):
    names: list[str]


@tool
def rename(ctx: ToolContext, first: str) -> str:
    before = ctx["profile"]
    ctx["profile"] = before.model_copy(update={"first": first})
    return f"{type(before).__name__} {before.first}"


@tool
def peek(ctx: ToolContext) -> str:
    return type(ctx["profile"]).__name__


def older(ctx: Context, value: object, kind: Any = Old, version: int = 1) -> None:
    """Have another program define the variable with an older model."""
    constraints = {"schema": kind.model_json_schema(), "schema_version": version}
    ctx.define("profile", value, type_name="map", constraints=constraints)


def split_names() -> None:
    @migration("profile", from_=1, to=2)
    def split(value: dict[str, Any]) -> dict[str, Any]:
        first, _, last = value["name"].partition(" ")
        return {"first": first, "last": last}


# Writing and reading


def test_instances_are_written_and_read(ctx: Context) -> None:
    ctx.define("profile", New(first="Ada", born=date(1815, 12, 10)), description="who")
    assert ctx["profile"] == ctx.get("profile") == New(first="Ada", born=date(1815, 12, 10))
    ctx["profile"] = New(first="Grace")
    ctx.set("profile", {"first": "Grace", "last": "Hopper"})
    assert ctx.get_many() == {"profile": New(first="Grace", last="Hopper")} == ctx.variables
    assert ctx.update("profile", lambda each: each.model_copy(update={"last": "H."})) == New(first="Grace", last="H.")
    ctx.update_many({"profile": New(first="Ada")})
    assert ctx.rollback("profile", 0) == New(first="Ada", born=date(1815, 12, 10))
    assert ctx.history("profile")[0].value == {"first": "Ada", "last": "", "born": "1815-12-10"}
    assert (ctx.info("profile").type, ctx.info("profile").description) == ("map", "who")
    ctx.delete("profile")
    ctx["profile"] = New(first="new")
    assert ctx.info("profile").constraints["schema_version"] == 1


def test_everybody_writes_what_the_model_can_read(ctx: Context, state: LocalState) -> None:
    ctx.define("profile", model=New, value={"first": "Ada"})
    with pytest.raises(InvalidValueError, match='"first" is a required property'):
        state.set_variable(ctx.session_id, "profile", {"last": "x"})
    with pytest.raises(InvalidValueError, match="first: Field required"):
        ctx["profile"] = {"last": "x"}
    with pytest.raises(InvalidValueError, match="first: Input should be a valid string"):
        ctx.update("profile", lambda _: {"first": 5})
    state.set_variable(ctx.session_id, "profile", {"first": "Grace"})
    assert ctx["profile"] == New(first="Grace")


def test_defining_again_keeps_the_value(ctx: Context) -> None:
    first = ctx.define("profile", New(first="Ada"))
    assert ctx.define("profile", New(first="other")) == first
    assert ctx["profile"] == New(first="Ada")


def test_defaults_of_the_model(ctx: Context) -> None:
    class Options(BaseModel):
        depth: int = 3

    ctx.define("options", model=Options)
    assert ctx["options"] == Options()
    with pytest.raises(InvalidValueError, match="there is no value, and New has none by default: first"):
        ctx.define("profile", model=New)
    with pytest.raises(InvalidArgumentError, match="it is missing"):
        ctx.define("other")


def test_lists_aliases_computed_fields_and_patterns(ctx: Context) -> None:
    class Tags(RootModel[list[str]]):
        pass

    class Account(BaseModel):
        model_config = ConfigDict(extra="forbid", populate_by_name=True)
        amount: Decimal
        id: str = Field(alias="_id")

        @computed_field  # type: ignore[prop-decorator]
        @property
        def twice(self) -> Decimal:
            return 2 * self.amount

    ctx.define("tags", Tags(["a", "b"]))
    assert (ctx["tags"], ctx.info("tags").type) == (Tags(["a", "b"]), "list")
    # The pattern of a Decimal looks ahead, which no pattern in a schema may.
    account = Account(amount=Decimal("0.10"), id="a")
    ctx.define("account", account)
    assert (ctx["account"], account.twice) == (account, Decimal("0.20"))
    assert ctx.history("account")[0].value == {"_id": "a", "amount": "0.10"}


def test_several_definitions(ctx: Context) -> None:
    ctx.define_many({"profile": New(first="Ada"), "n": 1})
    assert ctx.get_many() == {"profile": New(first="Ada"), "n": 1}
    assert ctx.info("profile").constraints["schema_version"] == 1


def test_what_is_no_model(ctx: Context) -> None:
    class Number(RootModel[int]):
        pass

    for kind in (int, dict, "New"):
        with pytest.raises(InvalidArgumentError, match="it must be a pydantic model"):
            ctx.define("x", 1, model=kind)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match="is not a JSON object or array"):
        ctx.define("x", Number(1))


def test_tools_read_and_write_models(ctx: Context) -> None:
    ctx.define("profile", New(first="Ada"))
    assert ctx.call("rename", first="Grace") == "New Ada"
    assert ctx["profile"] == New(first="Grace")


def test_handles_of_models(ctx: Context) -> None:
    older(ctx, {"name": "Ada Lovelace"})
    split_names()
    profile = ctx.handle("profile", New)
    assert profile.value == New(first="Ada", last="Lovelace")
    profile.value = New(first="Grace")
    assert profile.update(lambda each: each.model_copy(update={"last": "H."})) == New(first="Grace", last="H.")
    assert ctx.v.profile == ctx["profile"] == {"first": "Grace", "last": "H.", "born": None}
    assert [entry.cause for entry in ctx.history("profile")][-2:] == ["migration profile 1->2", "RegisterVariable"]


def test_from_asyncio(state: LocalState) -> None:
    split_names()

    async def use() -> None:
        async with Context.aopen(None, state) as ctx:
            older(ctx, {"name": "Ada Lovelace"})
            await ctx.define.aio("profile", model=New, value=New(first="x"))
            assert await ctx.get.aio("profile") == New(first="Ada", last="Lovelace")
            await ctx.set.aio("profile", New(first="Grace"))

    asyncio.run(use())


# Migrations


def test_an_older_value_is_migrated_when_it_is_read(ctx: Context) -> None:
    older(ctx, {"name": "Ada Lovelace"})
    split_names()
    model("profile")(New)
    assert ctx["profile"] == New(first="Ada", last="Lovelace")
    newest, _ = ctx.history("profile")
    assert (newest.version, newest.cause) == (1, "migration profile 1->2")
    assert ctx.info("profile").constraints["schema_version"] == 2
    assert ctx.get("profile") == New(first="Ada", last="Lovelace")
    assert len(ctx.history("profile")) == 2


def test_a_chain_is_one_commit(ctx: Context) -> None:
    older(ctx, {"name": "Ada Lovelace"})
    split_names()

    @migration("profile", from_=2, to=3)
    def join(value: dict[str, Any]) -> Full:
        return Full(names=[value["first"], value["last"]])

    ctx.define("profile", Full(names=[]))
    assert ctx["profile"] == Full(names=["Ada", "Lovelace"])
    assert [entry.cause for entry in ctx.history("profile")] == ["migration profile 1->3", "RegisterVariable"]


def test_a_write_migrates_first(ctx: Context) -> None:
    older(ctx, {"name": "Ada Lovelace"})
    split_names()
    model("profile")(New)
    ctx["profile"] = New(first="Grace")
    assert [entry.value for entry in ctx.history("profile")][:2] == [
        {"first": "Grace", "last": "", "born": None},
        {"first": "Ada", "last": "Lovelace", "born": None},
    ]
    assert ctx.update("profile", lambda each: each.model_copy(update={"last": "H."})).last == "H."


def test_concurrent_readers_migrate_once(ctx: Context) -> None:
    older(ctx, {"name": "Ada Lovelace"})
    split_names()
    model("profile")(New)
    with ThreadPoolExecutor(8) as threads:
        read = list(threads.map(lambda _: ctx["profile"], range(16)))
    assert read == [New(first="Ada", last="Lovelace")] * 16
    assert len(ctx.history("profile")) == 2


def test_tools_migrate_in_their_transaction(ctx: Context) -> None:
    older(ctx, {"name": "Ada Lovelace"})
    split_names()
    model("profile")(New)
    assert ctx.call("peek") == "New"
    newest = ctx.history("profile")[0]
    assert (newest.version, newest.execution_id is not None) == (1, True)
    assert ctx.info("profile").constraints["schema_version"] == 2


def test_a_failing_migration_changes_nothing(ctx: Context) -> None:
    older(ctx, {"name": "Ada Lovelace"})

    @migration("profile", from_=1, to=2)
    def broken(value: dict[str, Any]) -> dict[str, Any]:
        return {"first": value["nickname"]}

    model("profile")(New)
    with pytest.raises(MigrationError) as error:
        ctx["profile"]
    assert (error.value.name, error.value.from_version, error.value.to_version) == ("profile", 1, 2)
    assert error.value.raw == {"name": "Ada Lovelace"}
    assert str(error.value) == (
        "cannot migrate variable 'profile' from version 1 to 2: it raised KeyError: 'nickname'; "
        "its value is {'name': 'Ada Lovelace'} (see .raw)"
    )
    assert len(ctx.history("profile")) == 1


def test_a_migration_whose_value_does_not_fit(ctx: Context) -> None:
    older(ctx, {"name": "Ada Lovelace"})
    migration("profile", from_=1, to=2)(lambda _: {"last": "x"})
    model("profile")(New)
    with pytest.raises(MigrationError, match=r"of the new value, it is not a New .*first: Field required"):
        ctx.get("profile")


def test_a_value_that_fits_no_known_version_is_an_error(ctx: Context) -> None:
    older(ctx, {"name": "Ada"}, version=7)
    model("profile")(New)
    with pytest.raises(TypedValueError, match="has version 7, and this program knows versions up to 1") as error:
        ctx.get("profile", None)
    assert error.value.raw == {"name": "Ada"}


def test_without_a_migration_an_older_value_is_an_error(ctx: Context) -> None:
    older(ctx, {"name": "Ada"})
    migration("profile", from_=2, to=3)(lambda value: value)
    model("profile")(New)
    with pytest.raises(TypedValueError, match="has version 1, and there is no migration from 1 to 3"):
        ctx["profile"]


def test_what_only_the_model_refuses(ctx: Context, state: LocalState) -> None:
    class Even(BaseModel):
        n: int

        @field_validator("n")
        @classmethod
        def check(cls, n: int) -> int:
            if n % 2:
                raise ValueError("odd")
            return n

    ctx.define("x", Even(n=2))
    state.set_variable(ctx.session_id, "x", {"n": 3})
    with pytest.raises(TypedValueError, match=r"it is not a Even \(version 1\): n: Value error, odd") as error:
        ctx["x"]
    assert error.value.raw == {"n": 3}


def test_a_variable_without_a_schema(ctx: Context) -> None:
    ctx.define("profile", {"first": "Ada"})
    model("profile")(New)
    assert ctx["profile"] == New(first="Ada")
    assert ctx.info("profile").constraints == {}, "reading alone gives it none"
    ctx.define("profile", New(first="x"))
    assert (ctx["profile"], ctx.info("profile").constraints["schema_version"]) == (New(first="Ada"), 1)


def test_a_variable_without_a_schema_that_does_not_fit(ctx: Context) -> None:
    ctx.define("profile", {"name": "Ada L"})
    model("profile")(New)
    with pytest.raises(TypedValueError, match="first: Field required"):
        ctx["profile"]
    migration("profile", from_=0, to=1)(lambda value: {"first": value["name"]})
    assert ctx["profile"] == New(first="Ada L")
    assert ctx.history("profile")[0].cause == "migration profile 0->1"


def test_another_schema_under_the_same_version(ctx: Context) -> None:
    class Same(New):
        """Only described in another way."""

        first: str = Field(title="Given name", description="without the middle ones")

    class Other(New):
        age: int = 0

    ctx.define("profile", New(first="Ada"))
    ctx.define("profile", Same(first="x"))
    with pytest.raises(VariableExistsError, match="the schema of Other is not that of its version 1; give it another"):
        ctx.define("profile", Other(first="x"))


def test_a_refused_definition_leaves_the_model(ctx: Context) -> None:
    class Loose(BaseModel):
        title: str = "none"

    ctx.define_many({"profile": Old(name="Ada"), "count": 1})
    refused: list[tuple[type[Exception], Callable[[], object]]] = [
        (VariableExistsError, lambda: ctx.define("profile", model=Loose)),
        (VariableExistsError, lambda: ctx.define_many({"profile": Loose()})),
        (InvalidValueError, lambda: ctx.define("profile", model=New)),
        (InvalidValueError, lambda: ctx.define("count", model=Old)),
        (VariableExistsError, lambda: ctx.define("count", model=Loose)),
    ]
    for error, define in refused:
        with pytest.raises(error):
            define()
        assert ctx.get_many() == {"profile": Old(name="Ada"), "count": 1}
    ctx["profile"], ctx["count"] = Old(name="Bob"), 2
    assert ctx.get_many() == {"profile": Old(name="Bob"), "count": 2}


def test_a_stated_version(ctx: Context) -> None:
    class Stated(BaseModel):
        schema_version: ClassVar[int] = 4
        a: int = 0

    ctx.define("x", Stated())
    assert ctx.info("x").constraints["schema_version"] == 4


@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 1), (-1, 1)])
def test_migrations_lead_to_later_versions(before: int, after: int) -> None:
    with pytest.raises(InvalidArgumentError, match="a migration leads to a later version"):
        migration("x", from_=before, to=after)


def test_two_migrations_from_one_version() -> None:
    def one(value: Any) -> Any:
        return value

    migration("x", from_=1, to=2)(one)
    migration("x", from_=1, to=2)(one)
    with pytest.raises(InvalidArgumentError, match=r"one is the migration of 'x' from version 1 already"):
        migration("x", from_=1, to=3)(lambda value: value)


def test_models_are_of_their_session(state: LocalState) -> None:
    with Context(None, state) as one, Context(None, state) as other:
        one.define("profile", New(first="Ada"))
        other.define("profile", {"first": "Grace"})
        assert one["profile"] == New(first="Ada")
        assert other["profile"] == {"first": "Grace"}


def test_models_of_sessions_without_a_context_are_forgotten(state: LocalState) -> None:
    with Context(None, state) as kept:
        kept.define("profile", New(first="Ada"))
        for number in range(2100):
            typed.use(f"session {number}", "profile", New, holder=Holder())
        assert len(typed._KNOWN.models) <= 1001
        assert kept["profile"] == New(first="Ada")

"""The verbs for the rules of a session, which hold between its variables after every commit."""

from collections.abc import Mapping

from dspex_persist.cognitive.steps import Steps, ask, verb
from dspex_persist.cognitive.variables import Variables, terms_of
from dspex_persist.state import commands
from dspex_persist.state.model import Rule


class Ruled(Variables):
    """A session with rules: expressions over its variables, checked inside each commit of every writer."""

    @verb
    def rule(
        self,
        name: str,
        expression: str,
        description: str = "",
        *,
        replace: bool = False,
        reason: str | None = None,
        actor: str | None = None,
    ) -> Steps[None]:
        """Add a rule, which holds from then on: `ctx.rule("fits", "max_tokens <= context_window - 500")`.

        It is checked when one of its variables changes and all of them exist. Adding the same rule again changes
        nothing.

        Args:
            name: The name of the rule.
            expression: An expression of the Common Expression Language (CEL) over variables of the session. Names that
                are no identifiers are written in backticks.
            description: What it is for; errors contain it.
            replace: Replace another rule of this name.
            reason: Why it is added.
            actor: Who adds it; by default the actor of the context.

        Raises:
            InvalidRuleError: The expression is not one, or does not hold now.
            RuleExistsError: There is another rule of this name.
        """
        yield from ask(
            commands.AddRule(self.session_id, name, expression, description, replace), terms_of(actor, reason)
        )

    @verb
    def remove_rule(self, name: str, *, reason: str | None = None, actor: str | None = None) -> Steps[None]:
        """Remove a rule.

        Raises:
            RuleNotFoundError: There is no rule of this name.
        """
        yield from ask(commands.RemoveRule(self.session_id, name), terms_of(actor, reason))

    @verb
    def rules(self) -> Steps[Mapping[str, Rule]]:
        """Return the rules by name, each with its `expression` and `description`."""
        found = yield from ask(commands.ListRules(self.session_id))
        return {rule.name: rule for rule in found}

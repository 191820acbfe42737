"""`ctx.programs`, on contexts, in tools and in transactions alike."""

from typing import TYPE_CHECKING

from dspex_persist.cognitive.variables import Variables

if TYPE_CHECKING:
    from dspex_persist.cognitive.dspy.programs import Programs


class WithPrograms(Variables):
    """A session's variables, and the DSPy programs among them."""

    @property
    def programs(self) -> "Programs":
        """The DSPy programs of the session: to save, load, compare and tag.

        Raises:
            DspyMissingError: DSPy is not installed.
        """
        # It imports DSPy, which takes seconds.
        from dspex_persist.cognitive.dspy.programs import Programs

        return Programs(self, self.session_id)

"""The one exception the package raises on purpose."""


class FourierError(ValueError):
    """Something the user can mend: says where (layer or file), what is wrong, and what to do.

    The message reads ``"<where>: <what>. <remedy>"``; the parts stay available as attributes, so that an outer
    layer that knows more (which tensor of which file) re-raises with :meth:`at` and loses nothing.
    """

    def __init__(self, what: str, *, remedy: str = "", where: str = "") -> None:
        self.what, self.remedy, self.where = what, remedy, where
        text = f"{where}: {what}" if where else what
        super().__init__(f"{text}. {remedy}" if remedy else text)

    def at(self, where: str) -> "FourierError":
        """The same error with its place put in front (outermost first)."""
        return FourierError(self.what, remedy=self.remedy, where=f"{where}: {self.where}" if self.where else where)

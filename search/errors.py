"""The errors that are told to the user in a line."""


class UserError(Exception):
    """One line for the user: what is wrong, what was given, and what is allowed."""


class NoResult(Exception):
    """The search ended and no trial succeeded; one line for the user."""

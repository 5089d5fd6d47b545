"""The error that ends a program with one line in place of a traceback."""


class UserError(Exception):
    """What a user asked for cannot be done; the message says what and why, in one line."""

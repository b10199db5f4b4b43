"""The error of the data package."""


class DataError(ValueError):
    """A source, data set or tokenizer that cannot be used; the message names it and the way out."""

"""The one exception of the input pipeline."""


class DataError(ValueError):
    """Data, or a data option, that cannot be trained on; the message names it and the way out."""

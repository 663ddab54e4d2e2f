"""The version of the program, which is part of what identifies a conversion."""

__version__ = "0.1.0"

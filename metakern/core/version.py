"""The version, where both setuptools and the package read it."""

__version__ = "0.1.0"

"""The package version, read by both setuptools and the package."""

__version__ = "0.1.0"

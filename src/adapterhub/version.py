"""The one place the version of adapterhub is written."""

__version__ = "0.1.0"

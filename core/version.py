"""The installed version: what the API, the worker and the client say of themselves."""

import importlib.metadata

VERSION = importlib.metadata.version("nightpress")

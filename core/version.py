"""The installed version: what the API, the worker and the client say of themselves."""

import importlib.metadata

VERSION = importlib.metadata.version("nightpress")

#: What decides, beside model, recipe, data and device, which bytes come out. The revision is raised whenever that changes within a version.
ENGINE = f"{VERSION}/2"

"""The interface between a supervisor and its child: the child reads spec.json, and writes frames, manifest.json and report.json."""

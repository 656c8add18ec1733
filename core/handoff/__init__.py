"""What a supervisor and its child say to each other: spec.json in, frames and manifest.json and report.json out."""

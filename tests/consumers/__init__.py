"""What each consumer of ours makes of each scheme that we write. `python -m tests.consumers NAME` tries it, and the docs show the answers."""

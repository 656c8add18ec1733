"""Where consumers are tried, and the file of each place."""

from pathlib import Path

from nightpress.core.processor import cpu_features

RESULTS = Path(__file__).with_name("results")


def place_of(device: str) -> str:
    """The name of this machine's processor, or of its GPU, in the table."""
    if device == "cuda":
        return "GPU"
    return "AVX-512" if "avx512f" in cpu_features() else "AVX2"


def file_of(consumer: str, place: str) -> str:
    return f"{consumer}-{place.lower()}.json"

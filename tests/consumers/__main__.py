"""Tries every scheme in a consumer and keeps what it made of them in tests/consumers/results. `docs/reference.py` shows these files.

python -m tests.consumers transformers                  on the processor
python -m tests.consumers vllm --device cuda            in the environment that NIGHTPRESS_VLLM_PYTHON names, on a GPU
python -m tests.consumers llama.cpp --scheme "fp8 cache"   one scheme; the others stay as they are
"""

import argparse
import json
import warnings
from datetime import UTC, datetime

import torch
from transformers.utils import logging

from nightpress.core.processor import cpu_features, processor
from tests.consumers.places import RESULTS, file_of, place_of
from tests.consumers.schemes import SCHEMES
from tests.consumers.tries import CONSUMERS, try_scheme, versions_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("consumer", choices=CONSUMERS)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--scheme", action="append", choices=SCHEMES, help="only these schemes")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    place = place_of(given.device)
    file = RESULTS / file_of(given.consumer, place)
    before = json.loads(file.read_bytes())["outcomes"] if file.exists() else {}
    outcomes = {scheme: before[scheme] for scheme in SCHEMES if scheme in before}
    for scheme in given.scheme or SCHEMES:
        outcome = try_scheme(scheme, given.consumer, given.device)
        print(f"{scheme}: {outcome.state} {outcome.why}", flush=True)
        outcomes[scheme] = [outcome.state, outcome.why]
        document = {
            "consumer": given.consumer,
            "place": place,
            "date": datetime.now(UTC).date().isoformat(),
            "processor": processor() if given.device == "cpu" else torch.cuda.get_device_name(),
            "features": cpu_features(),
            "versions": versions_of(given.consumer),
            "outcomes": {name: outcomes.get(name, ["", ""]) for name in SCHEMES},  # empty: not run yet
        }
        file.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()

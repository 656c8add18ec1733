"""Tries every class of transformers in tiny, and writes what works: `python -m tests.zoo [KIND …]`. It takes an hour or two.

Results go to tests/zoo/expected.json, which `docs.reference` makes a page of, and which a test holds: no cell may get worse.
"""

import argparse
import json
import shutil
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import torch
from transformers.models.auto import modeling_auto
from transformers.utils import logging

from tests.zoo.cells import CELLS, Cell, examine
from tests.zoo.models import save_tiny

EXPECTED = Path(__file__).with_name("expected.json")
#: Kind of model → transformers' mapping from the type of a model to its class.
KINDS = {
    "causal language models": "MODEL_FOR_CAUSAL_LM",
    "masked language models": "MODEL_FOR_MASKED_LM",
    "encoder-decoders": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM",
    "image classifiers": "MODEL_FOR_IMAGE_CLASSIFICATION",
    "text and images": "MODEL_FOR_IMAGE_TEXT_TO_TEXT",
    "text classifiers": "MODEL_FOR_SEQUENCE_CLASSIFICATION",
    "speech": "MODEL_FOR_SPEECH_SEQ_2_SEQ",
}


def classes_of(kind: str) -> dict[str, str]:
    """Return model type → class of a kind, as the installed transformers knows them."""
    found = getattr(modeling_auto, f"{KINDS[kind]}_MAPPING_NAMES")
    return {key: names if isinstance(names, str) else names[0] for key, names in sorted(found.items())}


def try_class(model_type: str, class_name: str, cells: list[str]) -> dict[str, Cell]:
    """Return the cells of a class, or the single cell `built` if it has no tiny form."""
    folder = Path(tempfile.mkdtemp(prefix="zoo-"))
    try:
        try:
            source = save_tiny(model_type, class_name, folder / "source")
        except Exception as error:
            return {"built": Cell("fails", f"{type(error).__name__}: {str(error).splitlines()[0][:120]}")}
        try:
            return examine(class_name, source, folder / "work", cells)
        except Exception as error:
            return {"built": Cell("fails", f"it does not run: {type(error).__name__}: {str(error)[:120]}")}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", default=list(KINDS), help=f"of {', '.join(KINDS)}")
    parser.add_argument("--type", action="append", help="only these types of models")
    parser.add_argument("--cells", default=",".join(CELLS))
    parser.add_argument("--out", type=Path, default=EXPECTED)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    results = json.loads(given.out.read_bytes()) if given.out.exists() else {}
    for kind in given.kinds:
        of_kind = results.setdefault(kind, {})
        for model_type, class_name in classes_of(kind).items():
            if given.type and model_type not in given.type:
                continue
            found = try_class(model_type, class_name, given.cells.split(","))
            cells = {name: [cell.state, cell.why] for name, cell in found.items()}
            before = of_kind.get(model_type, {})
            kept = {} if "built" in before or "built" in cells else before
            of_kind[model_type] = {**kept, "class": class_name, **cells}
            given.out.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
        states = {name: Counter(row[name][0] for row in of_kind.values() if name in row) for name in ("built", *CELLS)}
        for name, counted in states.items():
            print(f"{kind}: {name}: {dict(counted)}")


if __name__ == "__main__":
    main()

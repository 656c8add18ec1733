"""Check that llama.cpp tokenizes text as the model's own tokenizer does. Otherwise a file with correct weights gives wrong answers."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

from nightpress.core.compress.data.tokenized import open_tokenizer
from nightpress.core.compress.export.consumer_environment import consumer_environment
from nightpress.core.compress.export.gguf.file import FILE_NAME
from nightpress.core.errors import ErrorCode, NightpressError

_RUNNER = Path(__file__).parents[2] / "runners" / "llamacpp_tokens.py"
_SECONDS = 300
#: Texts that tokenizers treat differently: case, accents, other scripts, emoji, white space, numbers, punctuation, code.
TEXTS = (
    "The Quick BROWN Fox jumps over the lazy dog.",
    "NASA, McDonald's and iPhone: UPPER lower Mixed",
    "Café naïve façade Zürich Ångström déjà-vu",
    "Cafe\u0301 nai\u0308ve",
    "Привет, мир! Γειά σου Κόσμε",
    "你好，世界。我喜欢模型压缩。",
    "東京タワーへようこそ。",
    "Good 😀 morning 👩‍👩‍👧 🇫🇷!",
    "two  spaces,   three, a\ttab\nand a line\n\nand two",
    " leading and trailing ",
    "1 12 123 1234 12345 3.14159 1,000,000 2026-11-28",
    "don't can't we'll I'M THEY'RE",
    'a-b_c/d\\e @user #tag $5.00 50% (x+y)=z; [1] {2} <3> "q" ~^`|&*?!…',
    "def f(x):\n    return x**2  # squared\n",
    "https://example.org/a?b=c&d=%20",
    "antidisestablishmentarianism " * 40,
)

#: Language → a text that llama.cpp is known to tokenize differently for some models, which are used for other languages. A difference is
#: noted in the report and is no reason to refuse a file.
NOTED = {"Korean": "안녕하세요 세계"}  # with `strip_accents`, llama.cpp does not split Hangul syllables


def check_tokens(model_dir: Path, out_dir: Path, *, name: str, scratch: Path) -> tuple[str, ...]:
    """Compare both tokenizers. Returns notes for the report on the languages of NOTED that llama.cpp tokenizes differently.

    Raises NightpressError(verification_failed), with the first different text, if a text of TEXTS is tokenized differently.
    """
    encode = partial(open_tokenizer(model_dir).encode, special=True)
    theirs = dict(zip((*TEXTS, *NOTED.values()), _ask(out_dir, name, scratch), strict=True))
    for text in TEXTS:
        ours, found = encode(text), theirs[text]
        if ours != found:
            at = next((at for at, pair in enumerate(zip(ours, found, strict=False)) if pair[0] != pair[1]), 0)
            raise _failed(
                name,
                f"llama.cpp cuts {text[:60]!r} into other tokens than the model's tokenizer does: from token {at} on {found[at : at + 4]} in place of {ours[at : at + 4]}",
            )
    return tuple(
        f"llama.cpp cuts {language} text into other tokens than the model's tokenizer does: use another format for it."
        for language, text in NOTED.items()
        if encode(text) != theirs[text]
    )


def _ask(out_dir: Path, name: str, scratch: Path) -> list[list[int]]:
    run = subprocess.run(
        [sys.executable, "-I", "-B", str(_RUNNER), str((out_dir / FILE_NAME).resolve())],
        input=json.dumps([*TEXTS, *NOTED.values()]).encode(),
        capture_output=True,
        timeout=_SECONDS,
        env=consumer_environment(1, scratch),
    )
    if run.returncode:
        said = run.stderr.decode(errors="replace").strip().splitlines()
        raise _failed(name, f"llama.cpp could not read its tokenizer: {said[-1][:300] if said else 'it said nothing'}")
    tokens: list[list[int]] = json.loads(run.stdout)
    return tokens


def _failed(name: str, why: str) -> NightpressError:
    return NightpressError(
        ErrorCode.VERIFICATION_FAILED,
        f"The artifact {name} would answer otherwise than it should: {why}.",
        hint="Leave gguf out of `exports`: llama.cpp has no tokenizer like this model's. onnx and openvino carry it as it is.",
        artifact=name,
    )

"""`device: auto`: where each built-in recipe runs, depending on the model and the available workers."""

import pytest

from nightpress.core.recipes.builtins import builtin_recipes, get_recipe
from nightpress.core.recipes.header import ModelHeader
from nightpress.core.recipes.models import parse_recipe
from nightpress.core.recipes.placement import Need, Seat, place
from nightpress.core.recipes.plan import Plan, make_plan
from tests.headers import decoder, encoder

GB = 10**9
CPU = Seat("cpu", 256 * GB, 2)
GPU = Seat("gpu", 256 * GB, 2, 80 * GB)
SMALL_GPU = Seat("gpu", 256 * GB, 2, 1 * GB)
FLEETS = {"cpu only": (CPU,), "gpu only": (GPU,), "both": (CPU, GPU), "gpu too small": (CPU, SMALL_GPU), "none": ()}

SMALL_LM = decoder(768, 2048, 12, 4, 6, vocabulary=32000, tied=True)
LARGE_LM = decoder(4096, 14336, 32, 8, 32, vocabulary=128256)
SMALL_ENCODER, LARGE_ENCODER = encoder(384, 12, 6), encoder(1024, 16, 24)
#: An encoder-decoder, and an image classifier, of the same sizes.
TRANSLATOR, CLASSIFIER = (
    SMALL_ENCODER.model_copy(
        update={"model_type": kind, "architecture": name, "config": {**SMALL_ENCODER.config, "model_type": kind}}
    )
    for kind, name in (("marian", "MarianMTModel"), ("vit", "ViTForImageClassification"))
)
RERANKER = SMALL_ENCODER.model_copy(
    update={
        "architecture": "BertForSequenceClassification",
        "config": {**SMALL_ENCODER.config, "num_labels": 1},
    }
)

# Queues in the order of FLEETS.
#: The recipe gains little from a GPU, and uses one only if there is no CPU worker.
ANYWHERE = ("cpu", "gpu", "cpu", "cpu", "cpu")
ON_A_GPU = ("cpu", "gpu", "gpu", "cpu", "gpu")  #: the recipe gains much from a GPU
NO_GPU = ("cpu", "cpu", "cpu", "cpu", "cpu")  #: one of the passes has no code for a GPU
EXPECTED = {
    "auto": {
        "small lm": ANYWHERE,
        "large lm": ON_A_GPU,
        "small encoder": NO_GPU,
        "large encoder": NO_GPU,
        "translator": NO_GPU,
        "image classifier": NO_GPU,
    },
    "browser": {"small lm": NO_GPU, "large lm": NO_GPU, "small encoder": NO_GPU, "large encoder": NO_GPU},
    "cpu-encoder": {
        "small encoder": NO_GPU,
        "large encoder": NO_GPU,
        "translator": NO_GPU,
        "image classifier": NO_GPU,
    },
    "cpu-llm": {"small lm": ANYWHERE, "large lm": ON_A_GPU},
    "fast-encoder": {"small encoder": ON_A_GPU, "large encoder": ON_A_GPU},
    "gguf-lm": {"small lm": ANYWHERE, "large lm": ANYWHERE},
    "gpu-vllm": {"small lm": ANYWHERE, "large lm": ON_A_GPU},
    "int4-lm": {"small lm": ON_A_GPU, "large lm": ON_A_GPU},
    "int4-weights": {
        "small lm": ANYWHERE,
        "large lm": ON_A_GPU,
        "small encoder": ANYWHERE,
        "large encoder": ANYWHERE,
    },
    "int8-encoder": {
        "small encoder": NO_GPU,
        "large encoder": NO_GPU,
        "translator": NO_GPU,
        "image classifier": NO_GPU,
    },
    "int8-weights": {
        "small lm": ANYWHERE,
        "large lm": ON_A_GPU,
        "small encoder": ANYWHERE,
        "large encoder": ANYWHERE,
    },
    "mlx-4bit": {"small lm": ANYWHERE, "large lm": ON_A_GPU},
    "gguf-4bit": {"small lm": ANYWHERE, "large lm": ON_A_GPU},
    "gguf-3bit": {"small lm": ANYWHERE, "large lm": ON_A_GPU},
    "gguf-2bit": {"small lm": ANYWHERE, "large lm": ON_A_GPU},
    "reranker": {"reranker": NO_GPU},
    "small-lm": {"small lm": ANYWHERE, "large lm": ON_A_GPU},
    "sparse-half": {
        "small lm": ANYWHERE,
        "large lm": ON_A_GPU,
        "small encoder": ANYWHERE,
        "large encoder": ON_A_GPU,
    },
    "static-embedder": {"small encoder": NO_GPU, "large encoder": NO_GPU},
    "w8a8-lm": {"small lm": ANYWHERE, "large lm": ON_A_GPU},
}
MODELS = {
    "small lm": SMALL_LM,
    "large lm": LARGE_LM,
    "small encoder": SMALL_ENCODER,
    "large encoder": LARGE_ENCODER,
    "reranker": RERANKER,
    "translator": TRANSLATOR,
    "image classifier": CLASSIFIER,
}


def planned(recipe: str, model: ModelHeader, *fleet: Seat) -> Plan:
    return make_plan(get_recipe(recipe), model, fleet)


def test_every_built_in_recipe_is_in_the_table():
    assert EXPECTED.keys() == builtin_recipes().keys()


@pytest.mark.parametrize(
    ("recipe", "model", "queues"),
    [(recipe, model, queues) for recipe, row in EXPECTED.items() for model, queues in row.items()],
)
@pytest.mark.slow
def test_where_a_built_in_recipe_runs(recipe: str, model: str, queues: tuple[str, ...]):
    plans = {name: planned(recipe, MODELS[model], *fleet) for name, fleet in FLEETS.items()}
    assert {name: plan.queue for name, plan in plans.items()} == dict(zip(FLEETS, queues, strict=True))
    for plan in plans.values():
        assert plan.queue_reason.endswith(".")
        assert plan.estimate is not None
        assert (plan.estimate.gpu_bytes > 0) == (plan.queue == "gpu")


@pytest.mark.slow
def test_the_reason_names_what_decided():
    reasons = {name: planned("int4-lm", LARGE_LM, *fleet).queue_reason for name, fleet in FLEETS.items()}
    assert "s on a GPU" in reasons["both"]
    assert "h on a processor" in reasons["both"]
    assert "no GPU worker has been seen lately" in reasons["cpu only"]
    assert "of a GPU's memory, and the largest GPU has 1.0 GB" in reasons["gpu too small"]
    assert "no worker has been seen lately" in reasons["none"]
    assert "`dynamic-int8` runs on a processor alone" in planned("int8-encoder", LARGE_ENCODER, GPU).queue_reason
    assert "no processor's worker has been seen lately" in planned("int8-weights", SMALL_LM, GPU).queue_reason


def test_a_gpu_whose_host_has_too_little_memory_counts_as_none():
    plan = planned("int4-lm", LARGE_LM, CPU, Seat("gpu", 3 * GB, 16, 80 * GB))
    assert plan.queue == "cpu"
    assert "of memory, and the GPU workers offer 3.0 GB at most" in plan.queue_reason


def test_what_no_processors_worker_can_hold_goes_to_a_gpu_that_can():
    plan = planned("gguf-lm", LARGE_LM, Seat("cpu", 8 * GB), GPU)
    assert plan.queue == "gpu"
    assert "no processor's worker can hold it" in plan.queue_reason


def test_a_gpu_that_does_not_say_its_memory_may_try():
    assert planned("int4-lm", LARGE_LM, CPU, Seat("gpu", 256 * GB, 16, None)).queue == "gpu"


def test_a_device_that_the_recipe_names_is_kept_whatever_the_fleet():
    for device, other in (("cpu", GPU), ("gpu", CPU)):
        recipe = get_recipe("int4-lm").model_copy(update={"device": device})
        plan = make_plan(recipe, LARGE_LM, (other,))
        assert (plan.queue, plan.queue_reason) == (device, f"the recipe says `device: {device}`.")


def test_without_a_model_nothing_is_decided():
    plan = make_plan(get_recipe("int4-lm"), None, (CPU, GPU))
    assert plan.estimate is None
    assert "none is named" in plan.queue_reason


def test_training_gains_by_a_gpu():
    student = {"pass": "recover", "train": {"epochs": 3}}
    recipe = {"name": "r", "passes": [{"pass": "channels", "share": 0.25}, student], "exports": ["safetensors"]}
    assert make_plan(parse_recipe(recipe), LARGE_ENCODER, (CPU, GPU)).queue == "gpu"


def test_an_estimate_counts_the_threads_of_the_workers():
    few, many = (planned("int4-lm", LARGE_LM, Seat("cpu", 256 * GB, threads)).estimate for threads in (2, 16))
    assert few is not None
    assert many is not None
    assert (few.threads, many.threads) == (2, 16)
    assert few.seconds > 6 * many.seconds


@pytest.mark.parametrize(("on_cpu", "on_gpu", "queue"), [(900, 30, "gpu"), (250, 1, "cpu"), (36000, 30000, "cpu")])
def test_a_gpu_is_for_what_gains_much_by_it(on_cpu: float, on_gpu: float, queue: str):
    assert place(Need(GB, 0, on_cpu), Need(GB, GB, on_gpu), (CPU, GPU)).queue == queue

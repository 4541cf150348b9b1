"""lm-evaluation-harness on a model: likelihoods are ELBOs, generation is the sampler's."""

import json
import math
from typing import Any

import pytest
from test_api import folders, models  # noqa: F401

from megatron_espo.api import Model

lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed")

from megatron_espo.api.harness import HarnessModel  # noqa: E402

pytestmark = pytest.mark.slow

CHOICES = [" red", " green and blue", " x"]
DOCS = [{"text": f"{word} is", "answer": i % 3} for i, word in enumerate(["ab", "this", "q", "z"])]
NUM_MC = 3


@pytest.fixture(scope="module")
def found(models: dict[str, Model], tmp_path_factory: pytest.TempPathFactory) -> Any:  # noqa: F811
    """A choice, a perplexity and a generation, on files of this machine."""
    folder = tmp_path_factory.mktemp("harness")
    (folder / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    common = {
        "dataset_path": "json", "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": str(folder / "docs.jsonl")},
                           "cache_dir": str(folder / "cache")},
    }  # fmt: skip
    tasks = [
        {**common, "task": "choice", "output_type": "multiple_choice", "doc_to_text": "{{text}}",
         "doc_to_choice": CHOICES, "doc_to_target": "{{answer}}", "target_delimiter": "",
         "metric_list": [{"metric": "acc"}]},
        {**common, "task": "rolling", "output_type": "loglikelihood_rolling", "doc_to_text": "",
         "doc_to_target": "{{text}}", "metric_list": [{"metric": "byte_perplexity"}]},
        {**common, "task": "open", "output_type": "generate_until", "doc_to_text": "{{text}}",
         "doc_to_target": "{{answer}}", "metric_list": [{"metric": "exact_match"}],
         "generation_kwargs": {"until": ["e", "\n"], "max_gen_toks": 8, "do_sample": True,
                               "temperature": 0.7}},
    ]  # fmt: skip
    model = HarnessModel(models["llada"], num_mc=NUM_MC, seed=4)
    return lm_eval.simple_evaluate(model=model, tasks=tasks, bootstrap_iters=0)


def test_answers_of_a_choice_are_compared_by_their_bounds(
    models: dict[str, Model],  # noqa: F811
    found: Any,
) -> None:
    texts = [doc["text"] for doc in DOCS for _ in CHOICES]
    expected = models["llada"].elbo(texts, CHOICES * len(DOCS), num_mc=NUM_MC, seed=4).elbo
    samples = sorted(found["samples"]["choice"], key=lambda sample: sample["doc_id"])
    got = [response[0][0] for sample in samples for response in sample["resps"]]
    assert got == pytest.approx(expected.tolist(), rel=1e-5)
    best = expected.view(len(DOCS), -1).argmax(1).tolist()
    right = sum(a == doc["answer"] for a, doc in zip(best, DOCS, strict=True)) / len(DOCS)
    assert found["results"]["choice"]["acc,none"] == right


def test_texts_are_bounded_whole(models: dict[str, Model], found: Any) -> None:  # noqa: F811
    model = models["llada"]
    texts = [doc["text"] for doc in DOCS]
    start = [[model.handle.eos_token_id]] * len(texts)
    bounds = model.elbo(start, texts, num_mc=NUM_MC, seed=4).elbo
    per_byte = -bounds.double().sum().item() / sum(map(len, texts))
    perplexity = found["results"]["rolling"]["byte_perplexity,none"]
    assert perplexity == pytest.approx(math.exp(per_byte), rel=1e-5)
    # More than one window.
    harness = HarnessModel(model, num_mc=1)
    long = [type("Request", (), {"args": (text,)}) for text in ("a" * 300, "b")]
    first, second = harness.loglikelihood_rolling(long)
    assert first < second < 0.0


def test_contexts_are_completed_to_the_stop_word(
    models: dict[str, Model],  # noqa: F811
    found: Any,
) -> None:
    texts = models["llada"].generate(
        [doc["text"] for doc in DOCS], completion_length=8, temperature=0.7, seed=4
    )
    samples = sorted(found["samples"]["open"], key=lambda sample: sample["doc_id"])
    got = [sample["resps"][0][0] for sample in samples]
    assert got == [text.partition("e")[0].partition("\n")[0] for text in texts]
    harness = HarnessModel(models["llada"])
    with pytest.raises(ValueError, match="num_beams is not known"):
        harness._settings({"num_beams": 4})
    assert harness._settings({"max_gen_toks": 999})["completion_length"] == 127

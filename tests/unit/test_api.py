"""Models in Python: several in one process, each computing what it computes alone."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from test_conversion import TINY
from test_hugging_face_folder import write_adapter

import megatron_espo
from megatron_espo.api import Model, load
from megatron_espo.conversion import dream, llada
from megatron_espo.conversion.convert import convert_to_megatron
from megatron_espo.conversion.families import FAMILIES
from megatron_espo.conversion.hugging_face import HuggingFaceWeights
from megatron_espo.conversion.random_model import write_random_model
from megatron_espo.data.tokenizer import byte_tokenizer
from megatron_espo.errors import UserError
from megatron_espo.passes.block_mask import BlockAttention
from megatron_espo.rl.elbo import estimate_elbo

pytestmark = pytest.mark.slow

SHAPES = {
    "llada": dataclasses.replace(llada.PUBLISHED, **TINY),
    "dream": dataclasses.replace(dream.PUBLISHED, **TINY | {"hidden_size": 32}),
}
PROMPTS = ["ab", "what is this?", [{"role": "user", "content": "hello"}], [65, 66, 67]]
COMPLETIONS: list[str | list[int]] = ["xyz", "a", "pqr", [70, 71, 72, 73, 74]]


@pytest.fixture(scope="module")
def folders(one_rank: object, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random models in Hugging Face's form and converted."""
    root = tmp_path_factory.mktemp("folders")
    for name, shape in SHAPES.items():
        write_random_model(
            root / name, FAMILIES[name], shape, torch.float32, byte_tokenizer(), std=0.2
        )
        convert_to_megatron(str(root / name), str(root / f"{name}-megatron"))
    return root


@pytest.fixture(scope="module")
def models(folders: Path) -> dict[str, Model]:
    """Both in this process at once."""
    return {name: load(folders / f"{name}-megatron") for name in SHAPES}


def outputs(model: Model) -> tuple[Any, ...]:
    texts = model.sample(PROMPTS, completion_length=8, temperature=1.0, num_samples=2, seed=3)
    scores = model.elbo(PROMPTS, COMPLETIONS, num_mc=4, seed=5)
    return texts, scores.draws.tolist(), scores.num_tokens.tolist()


def test_two_models_compute_what_each_does_alone(folders: Path, models: dict[str, Model]) -> None:
    together = {name: outputs(model) for name, model in models.items()}
    assert together["llada"] != together["dream"]
    for name in SHAPES:
        assert outputs(load(folders / f"{name}-megatron")) == together[name]
    # Those that were loaded first, after all others.
    assert {name: outputs(model) for name, model in models.items()} == together


def test_samples_are_told_apart_and_return(models: dict[str, Model]) -> None:
    model = models["llada"]
    settings = {"completion_length": 8, "temperature": 1.0, "num_samples": 3}
    first = model.sample(PROMPTS, seed=1, **settings)
    assert first == model.sample(PROMPTS, seed=1, **settings)
    one_by_one = model.sample(PROMPTS, seed=1, micro_batch_size=1, **settings)
    assert [s.token_ids for s in one_by_one] == [s.token_ids for s in first]
    assert first != model.sample(PROMPTS, seed=2, **settings)
    assert len(first) == 12 and len({tuple(s.token_ids) for s in first}) == 12
    assert [s.text for s in first] == model.generate(PROMPTS, seed=1, **settings)
    # Greedy, a token a step, unless something else is asked for.
    alone = model.sample(PROMPTS[:1], completion_length=8)
    assert alone == model.sample(PROMPTS[:1], completion_length=8, seed=9)
    assert [s.num_evaluations for s in alone] == [8]
    assert len(model.sample(PROMPTS[:1])[0].token_ids) == TINY["max_position_embeddings"] - 2
    fewer = model.sample(PROMPTS[:1], completion_length=8, denoising_steps=2)
    assert [s.num_evaluations for s in fewer] == [2]


def test_a_conversation_is_answered_in_its_format(models: dict[str, Model]) -> None:
    model = models["llada"]
    answer = model.chat("hello", completion_length=8, temperature=0.7)
    assert answer == model.generate([PROMPTS[2]], completion_length=8, temperature=0.7)[0]
    assert model.chat(PROMPTS[2], completion_length=8, temperature=0.7) == answer


def test_steps_are_shown_as_they_come(models: dict[str, Model]) -> None:
    left: list[int] = []

    def watch(tokens: torch.Tensor) -> None:
        left.append(int((tokens == models["dream"].handle.mask_token_id).sum()))

    models["dream"].sample(["ab"], completion_length=4, on_step=watch)
    assert left == [3, 2, 1, 0]


@pytest.mark.parametrize("name", SHAPES)
def test_likelihoods_are_those_of_training(models: dict[str, Model], name: str) -> None:
    """Completions of several lengths, each as a batch of its own with its own number's masks."""
    model = models[name]
    found = model.elbo(PROMPTS, COMPLETIONS, num_mc=6, estimator="bernoulli", seed=2)
    assert found.num_tokens.tolist() == [3, 1, 3, 5]
    encoded = model._encode_all(PROMPTS)
    for i, text in enumerate(COMPLETIONS):
        ids = [ord(c) for c in text] if isinstance(text, str) else text
        alone = estimate_elbo(
            model.handle, [encoded[i]], torch.tensor([ids]), estimator="bernoulli", num_mc=6,
            seed=2, sample_ids=torch.tensor([i]),
        )  # fmt: skip
        torch.testing.assert_close(found.draws[i], alone.draws[0], rtol=1e-5, atol=1e-5)
    draws = found.draws.double()
    torch.testing.assert_close(found.elbo.double(), draws.mean(1), rtol=1e-6, atol=1e-6)
    error = (draws.var(1, unbiased=True) / 6).sqrt()
    torch.testing.assert_close(found.standard_error.double(), error, rtol=1e-5, atol=1e-6)
    assert torch.equal(found.per_token, found.elbo / torch.tensor([3, 1, 3, 5]))
    # Filled up as rollouts are.
    eos = model.handle.eos_token_id
    filled = model.elbo(["ab"], ["xy"], num_mc=2, length=4)
    spelled = model.elbo(["ab"], [[120, 121, eos, eos]], num_mc=2)
    assert torch.equal(filled.draws, spelled.draws) and filled.num_tokens.tolist() == [4]
    assert model.elbo(["ab"], ["xy"], num_mc=1).standard_error.isnan().all()


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda m: m.generate("ab"), "prompts is one text; pass a list"),
        (lambda m: m.generate(["ab"], completion_length=8, block_length=3), "completion_length 8 "),
        (lambda m: m.generate(["ab"], top_p=0.5), "top_p 0.5 has no effect on greedy"),
        (lambda m: m.generate(["a" * 125], completion_length=8), "prompt of 125 tokens and compl"),
        (lambda m: m.generate(["<|mask|>"], completion_length=8), "prompt 0 spells the special"),
        (lambda m: m.generate([[1, 999]], completion_length=8), "prompt 0: token id 999 lies"),
        (lambda m: m.generate(["ab", ""], completion_length=8), "prompt 1 is empty"),
        (lambda m: m.elbo(["a", "b"], ["c"]), "2 prompts and 1 completions"),
        (lambda m: m.elbo(["a"], "c"), "completions is one text"),
        (lambda m: m.elbo(["a"], [""]), "completion 0 is empty"),
        (lambda m: m.elbo(["a"], ["c"], num_mc=0), "num_mc 0"),
        (lambda m: m.elbo(["a"], [[256]]), "completion 0 holds the mask token"),
        (lambda m: m.elbo(["a"], ["c" * 128]), "have 129 tokens and 128 fit"),
        (lambda m: m.elbo(["a"], ["ccc"], length=2), "has 3 tokens, more than length 2"),
        (lambda m: m.export("out"), "pass like, the model whose code"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said_in_a_sentence(
    models: dict[str, Model], call: Any, said: str
) -> None:
    with pytest.raises(UserError) as caught:
        call(models["dream"])
    assert said in str(caught.value) and "--rollout" not in str(caught.value)


def test_there_are_no_other_settings(models: dict[str, Model]) -> None:
    with pytest.raises(TypeError, match="no_such_setting"):
        models["dream"].generate(["ab"], no_such_setting=1)


def test_a_hugging_face_folder_with_an_adapter_and_back(folders: Path, tmp_path: Path) -> None:
    shapes = {
        name.removesuffix(".weight"): stored.shape
        for name, stored in HuggingFaceWeights(folders / "llada").tensors.items()
        if name.endswith(("q_proj.weight", "up_proj.weight"))
    }
    adapter = write_adapter(tmp_path / "lora", layers=shapes)
    convert_to_megatron(str(folders / "llada"), str(tmp_path / "merged"), lora=str(adapter))
    expected = load(tmp_path / "merged").elbo(PROMPTS, COMPLETIONS)
    model = megatron_espo.load(folders / "llada", lora=adapter, cache=tmp_path / "cache")
    assert torch.equal(model.elbo(PROMPTS, COMPLETIONS).draws, expected.draws)
    assert not torch.equal(
        load(folders / "llada-megatron").elbo(PROMPTS, COMPLETIONS).draws, expected.draws
    )
    # What it is exported as is the merged model.
    model.export(tmp_path / "back")
    convert_to_megatron(str(tmp_path / "back"), str(tmp_path / "again"))
    again = load(tmp_path / "again", dtype="bfloat16").elbo(PROMPTS, COMPLETIONS).draws
    assert torch.equal(load(tmp_path / "again").elbo(PROMPTS, COMPLETIONS).draws, expected.draws)
    assert not torch.equal(again, expected.draws)
    torch.testing.assert_close(again, expected.draws, rtol=0.1, atol=0.5)


def test_what_cannot_be_loaded_is_said_in_a_sentence(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for arguments, said in (
        (((tmp_path / "nothing"), {}), "no such folder"),
        (((folders / "llada"), {"iteration": 3}), "is not the folder of a run"),
        (((folders / "llada-megatron"), {"lora": tmp_path}), "is the folder of a run"),
        (((folders / "llada-megatron"), {"iteration": 3}), "iter_0000003: no such checkpoint"),
    ):
        with pytest.raises(UserError, match=said):
            load(arguments[0], **arguments[1])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="of one process"):
        load(folders / "llada-megatron")


def test_a_completion_is_drawn_as_it_fills_in(models: dict[str, Model], tmp_path: Path) -> None:
    model, settings = models["llada"], {"completion_length": 8, "denoising_steps": 4}
    text = model.animate("ab", tmp_path / "steps", **settings)
    assert text == model.generate(["ab"], **settings)[0]
    assert len(list((tmp_path / "steps").iterdir())) == 5
    with pytest.raises(UserError, match="jpeg"):
        model.animate("ab", tmp_path / "x.jpeg", **settings)


def test_a_block_model_is_sampled_in_its_own_blocks(models: dict[str, Model]) -> None:
    handle = models["llada"].handle
    in_blocks = dataclasses.replace(handle, blocks=BlockAttention(4, causal=False))
    model = dataclasses.replace(models["llada"], handle=in_blocks)
    plain, cached = (model.sample(["abc"], completion_length=8, cache=c) for c in ("none", "exact"))
    assert plain[0].text == cached[0].text
    assert model.sample(["abc"], completion_length=8)[0].text == plain[0].text
    with pytest.raises(UserError, match="block_length 8: the model's blocks have 4 tokens; use 4"):
        model.sample(["abc"], completion_length=8, block_length=8)
    assert model.elbo(["abc"], ["xyz"], num_mc=2).draws.isfinite().all()

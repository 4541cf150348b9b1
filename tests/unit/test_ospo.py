"""Owen-Shapley credit: values, parts of sudoku and code, tokens, advantages, refusals."""

import itertools
import math
from dataclasses import replace
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_espo.config import EspoConfig
from megatron_espo.data.encoding import decode_completion, token_spans
from megatron_espo.data.tokenizer import byte_tokenizer
from megatron_espo.errors import UserError
from megatron_espo.evaluation.scoring import score_completions
from megatron_espo.generation.sampler import Generation
from megatron_espo.objectives import Given, check_objective, objective_of
from megatron_espo.objectives.credit import split_advantages
from megatron_espo.passes.shapes import Shapes
from megatron_espo.rewards.workers import Failures, RewardWorkers
from megatron_espo.rl.credit import check_parts, coalitions_of, token_worths, with_credit
from megatron_espo.rl.rollout import place_completions, with_scores
from megatron_espo.rl.types import Prompt
from megatron_espo.tasks import Example, Score, code, load_task, sudoku
from megatron_espo.tasks.parts import Coalitions, owen_shapley, part_worths, runs

ALL = Coalitions(32, 64)
PUZZLE = {"puzzle": "3102200002100320", "solution": "3142243142131324", "style": "bare"}
BARE = Example(PUZZLE["puzzle"], PUZZLE)
CHAT = Example("?", {key: PUZZLE[key] for key in ("puzzle", "solution")})
BLANKS = [place for place, cell in enumerate(PUZZLE["puzzle"]) if cell == "0"]
PROGRAM = (
    "import math\n\n# Half.\ndef half(x):\n    return x / 2\n\ndef root(x): return math.sqrt(x)\n"
)


def enumerated(known: dict[frozenset[int], float], n: int) -> list[float]:
    """The definition, over all subsets."""
    credit = []
    for i in range(n):
        others, total = [j for j in range(n) if j != i], 0.0
        for size in range(n):
            for subset in map(frozenset, itertools.combinations(others, size)):
                if subset in known and subset | {i} in known:
                    weight = 1 / (n * math.comb(n - 1, size))
                    total += weight * (known[subset | {i}] - known[subset])
        credit.append(total)
    return credit


@pytest.mark.parametrize("width", [1, 2, 32])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 6])
def test_values_are_those_of_the_enumerated_definition(n: int, width: int) -> None:
    values = {run: Random(f"{run}{n}").uniform(-1, 2) for run in runs(n, Coalitions(width, 64))}
    neighbours = [
        frozenset(range(start, stop)) for start in range(n) for stop in range(start + 1, n + 1)
    ]
    asked = [s for s in neighbours if len(s) <= width or len(s) == n]
    known = {frozenset(range(*run)): value for run, value in values.items()}
    assert set(known) == set(asked)
    known[frozenset()] = 0.0
    credit = owen_shapley(values, n)
    assert credit == pytest.approx(enumerated(known, n), abs=1e-12)
    if n <= 2:  # every coalition is a run: Shapley's value, which is efficient
        assert sum(credit) == pytest.approx(values[0, n], abs=1e-12)
    elif width == 32:
        assert sum(credit) != pytest.approx(values[0, n], abs=1e-3)


def test_even_weights_credit_a_part_with_what_it_always_adds() -> None:
    own = [0.5, 0.0, 0.25, 0.25, 1.0]
    values = {run: sum(own[slice(*run)]) for run in runs(5, ALL)}
    assert owen_shapley(values, 5, even=True) == pytest.approx(own)
    plain = owen_shapley({run: float(run[1] - run[0]) for run in values}, 5)
    assert plain[0] == plain[4] > 1.4 * plain[2]


def test_the_narrowest_runs_are_asked_for_first() -> None:
    assert runs(3, ALL) == [(0, 1), (1, 2), (2, 3), (0, 2), (1, 3), (0, 3)]
    assert runs(3, Coalitions(32, 6)) == [(0, 1), (1, 2), (2, 3), (0, 2), (0, 3)]
    assert len(runs(12, ALL)) == 63


class _Letters:
    """Earns a point for each a, and has every letter for a part."""

    name = "letters"

    def __init__(self, spans: Any = None, values: Any = None) -> None:
        self._spans, self._values = spans, values

    def read(self, path: Any) -> list[Example]:
        return []

    def score(self, example: Example, completion: str) -> Score:
        return Score(float(completion.count("a")), False, {})

    def segments(self, example: Example, completion: str) -> Any:
        return self._spans or [(k, k + 1) for k in range(len(completion))]

    def score_segments(self, example: Example, completion: str, kept: Any) -> Any:
        return self._values or [sum(completion[k] == "a" for k in part) for part in kept]


def test_neighbours_are_taken_together_where_parts_are_many() -> None:
    """Four coalitions, of no part and of all among them: two players of three letters each."""
    parts = part_worths(_Letters(), BARE, "aabbab", Coalitions(32, 4))
    assert parts == tuple((k, k + 1, 2.0 if k < 3 else 1.0) for k in range(6))
    assert part_worths(_Letters(), BARE, "a", ALL) == ()


@pytest.mark.parametrize(
    ("task", "part"),
    [(_Letters(spans=[(0, 1), (0, 2)]), "ascending"), (_Letters(spans=[(0, 9), (9, 10)]), "within"),
     (_Letters(spans=[(0, 0), (1, 2)]), "empty"), (_Letters(spans=[1, 2]), "spans"),
     (_Letters(values=[1.0]), "return 6 finite"), (_Letters(values=[math.nan] * 6), "finite"),
     (_Letters(values="abcdef"), "finite")],
)  # fmt: skip
def test_what_a_task_says_of_its_parts_is_checked(task: Any, part: str) -> None:
    with pytest.raises(UserError, match=f"task letters: .*{part}"):
        part_worths(task, BARE, "aba", ALL)


def test_cells_of_a_sudoku_are_parts() -> None:
    wrong = PUZZLE["solution"][:-1] + "1"
    spaced = " ".join(wrong[k : k + 4] for k in range(0, 16, 4))
    dressed = f"<answer>9</answer> so\n<answer>\n{spaced}</answer> 3"
    for example, text in ((BARE, wrong), (BARE, spaced), (CHAT, dressed), (BARE, wrong[:9])):
        spans = sudoku.segments(example, text)
        cells = [cell for cell in BLANKS if cell < (9 if len(text) == 9 else 16)]
        assert [text[slice(*span)] for span in spans] == [wrong[cell] for cell in cells]
        every, none, one = sudoku.score_segments(example, text, [range(len(spans)), [], [0]])
        assert every == sudoku.score(example, text).reward
        assert (none, one) == (0.0, 1 / len(BLANKS))
    worths = part_worths(sudoku, BARE, wrong, Coalitions(32, 64, even=True))
    assert [w for *_, w in worths] == pytest.approx(
        [0.0 if cell == 15 else 1 / len(BLANKS) for cell in BLANKS]
    )
    assert sudoku.segments(CHAT, "no tags 1234") == []


def test_statements_of_a_program_are_parts() -> None:
    def pieces(program: str) -> list[str]:
        text = f"Here.\n```python\n{program}```\n\n"
        return [text[slice(*span)] for span in code.segments(BARE, text)]

    first, half, root = pieces(PROGRAM)
    assert (first, root) == ("import math\n", "\ndef root(x): return math.sqrt(x)\n")
    assert half == "\n# Half.\ndef half(x):\n    return x / 2\n"
    assert pieces("a = 1; b = [\n2]\n@f\ndef g():\n    x = '''\n\n'''\n    return x\n# end\n") == [
        "a = 1; b = [\n2]\n", "@f\ndef g():\n    x = '''\n\n'''\n    return x\n# end\n"
    ]  # fmt: skip
    assert pieces("a = (\n") == pieces("") == pieces("a = 1\r\nb = 2\n") == []


def test_a_program_of_some_statements_earns_its_pass_rate() -> None:
    """Half is called by one of two tests, the root by the other and needs the import."""
    tests = ["assert half(4) == 2", "assert root(4) == 2"]
    example = Example("?", {"tests": tests, "given": ""})
    text = f"```python\n{PROGRAM}```"
    values = code.score_segments(example, text, [[0], [1], [2], [0, 1], [1, 2], [0, 1, 2]])
    assert values == [0.0, 0.5, 0.0, 0.5, 0.5, 1.0]


def test_tokens_have_the_characters_that_they_wrote() -> None:
    """Two bytes of a letter are two tokens, of which the last has it."""
    tokenizer = byte_tokenizer()
    ids = tokenizer("aéb", add_special_tokens=False)["input_ids"]
    stop = tokenizer.eos_token_id
    spans = token_spans(tokenizer, [*ids, stop, *ids], [stop])
    assert decode_completion(tokenizer, [*ids, stop], [stop]) == "aéb"
    assert spans == [(0, 1), (1, 1), (1, 2), (2, 3)]
    assert token_spans(tokenizer, ids[:1], [stop]) == [(0, 1)]
    assert token_spans(tokenizer, [stop], [stop]) == []


def test_a_token_of_two_parts_has_their_mean_by_characters() -> None:
    spans = [(0, 2), (2, 2), (2, 6), (6, 7), (7, 9)]
    worth, inside = token_worths(spans, [(1, 3, 1.0), (3, 6, 5.0), (7, 8, 2.0)], 6)
    assert worth.tolist() == [1.0, 0.0, 4.0, 0.0, 2.0, 0.0]
    assert inside.tolist() == [True, False, True, False, True, False]


@pytest.mark.parametrize("blame", [False, True])
def test_advantages_are_split_by_worth(blame: bool) -> None:
    advantages = torch.tensor([2.0, -2.0, 1.0, -1.0], dtype=torch.float64)
    worth = torch.tensor([[-1, 0, 3, 9], [-1, 0, 3, 9], [2, 2, 2, 2], [0, 0, 0, 0]]).double()
    inside = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]]).bool()
    split = split_advantages(advantages, worth, inside, math.inf, blame)
    shares = [0.0, 0.25, 1.0]
    other = [1.0 - share for share in shares] if blame else shares
    expected = [
        [*(2 * 3 * share / 1.25 for share in shares), 2.0],
        [*(-2 * 3 * share / sum(other) for share in other), -2.0],
        [1.0] * 4,
        [-1.0] * 4,
    ]
    wanted = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(split, wanted, rtol=1e-12, atol=0)
    assert torch.allclose(split.mean(dim=1), advantages)
    limited = split_advantages(advantages, worth, inside, 1.5, blame)
    assert torch.equal(limited, split.clamp(-1.5, 1.5))


def test_equal_advantages_give_espos_gradient() -> None:
    generator = torch.Generator().manual_seed(1)
    now, old, reference = (
        -3 * torch.rand(4, 2, 2, 5, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    weights = torch.rand(4, 2, 2, generator=generator, dtype=torch.float64)
    advantages = torch.tensor([1.0, -0.5, 0.0, 2.0], dtype=torch.float64)
    found = {}
    for name in ("espo", "ospo"):
        espo = EspoConfig(objective=name, kl_coef=0.05)

        def taken(table: torch.Tensor, whole: bool = name == "espo") -> torch.Tensor:
            return (table.sum(dim=3) * weights).sum(dim=2) if whole else table

        leaf = now.clone().requires_grad_()
        given = Given(
            taken(old), taken(reference), advantages, None, torch.ones(4, 5).bool(), 5.0,
            torch.ones(4, 2, 2, 5).bool(), weights, 5, espo,
            token_advantages=advantages[:, None].expand(4, 5),
        )  # fmt: skip
        loss = objective_of(espo).loss(taken(leaf), given)
        found[name] = loss.loss, torch.autograd.grad(loss.loss.sum(), leaf)[0]
    torch.testing.assert_close(found["espo"], found["ospo"], rtol=1e-12, atol=1e-14)


def test_a_rollouts_tokens_get_their_parts_share() -> None:
    """Two groups of two: wrong cells take nothing, givens and what follows the end keep A."""
    espo = EspoConfig(
        objective="ospo", group_size=2, prompts_per_rollout=2, objective_args=["even=1", "limit=0"]
    )
    tokenizer, length = byte_tokenizer(), 18
    stop = tokenizer.eos_token_id
    texts = [PUZZLE["solution"], "1" * 16, PUZZLE["solution"][:8] + "1" * 8, ""]
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    completions = torch.tensor([row + [stop] * (length - len(row)) for row in rows])
    layout = SimpleNamespace(dp_rank=0, dp_size=1)
    model: Any = SimpleNamespace(
        layout=layout, pad_token_id=0, shapes=Shapes(), stop_token_ids=(stop,)
    )
    cost = torch.zeros(4)
    generation = Generation(completions, cost, cost, cost, cost, torch.zeros(4, 0).int())
    prompts = [Prompt(k, (65,), BARE) for k in range(2)]
    solo: Any = SimpleNamespace(is_first_of_samples=True, mp=None, cp=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "megatron_espo.evaluation.scoring.object_from_first_of_samples", lambda s, _: s
        )
        scores = score_completions(sudoku, [BARE] * 4, texts, solo, None, coalitions_of(espo))
    sampled = place_completions(model, prompts, generation, 2)
    rollout = with_scores(sampled, texts, scores, espo)
    split = with_credit(rollout, model, tokenizer, espo).token_advantages
    assert split is not None and split.dtype == torch.float32
    for row, (text, advantage) in enumerate(zip(texts, rollout.advantages.tolist(), strict=True)):
        right = [cell for cell in BLANKS if text[cell : cell + 1] == PUZZLE["solution"][cell]]
        for cell in range(length):
            share = 1.0
            if text and cell in BLANKS and 0 < len(right) < len(BLANKS):
                share = (cell in right) * len(BLANKS) / len(right)
            assert split[row, cell].item() == pytest.approx(share * advantage), (row, cell)
    limited = replace(espo, objective_args=["even=1"])
    deviation = float(rollout.advantages.double().std())
    clamped = with_credit(rollout, model, tokenizer, limited).token_advantages
    assert clamped is not None
    torch.testing.assert_close(clamped, split.clamp(-2 * deviation, 2 * deviation))
    assert with_credit(rollout, model, tokenizer, EspoConfig()) is rollout


TASK = """
import os, signal, time
from pathlib import Path
from megatron_espo.tasks import Score

name = "parted"
read = None


def score(example, completion):
    return Score(float(len(completion)), True, {})


def segments(example, completion):
    return [(0, 1), (1, 2)]


def score_segments(example, completion, kept):
    if completion == "sleep":
        time.sleep(30)
    if completion == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if completion == "bad":
        return None
    return [float(len(parts)) for parts in kept]
"""


def test_workers_score_parts_after_the_whole(tmp_path: Path) -> None:
    """Parts that hang or kill the worker are missing; the score is there, and they are counted."""
    path = tmp_path / "parted.py"
    path.write_text(TASK.replace("read = None", "def read(path): return []"))
    workers = RewardWorkers(load_task(str(path)), str(path), 1, 2.0)
    try:
        asked = [
            workers.submit(BARE, text, ALL) for text in ("fine", "sleep", "die", "fine", "bad")
        ]
        asked.append(workers.submit(BARE, "fine"))
        parts = ((0, 1, 1.0), (1, 2, 1.0))
        whole = [Score(4.0, True, {}, None, parts), Score(5.0, True, {}, None, ()),
                 Score(3.0, True, {}, None, ()), Score(4.0, True, {}, None, parts)]  # fmt: skip
        assert [job.result() for job in asked[:4]] == whole
        with pytest.raises(UserError, match="score_segments returned None"):
            asked[4].result()
        assert asked[5].result() == Score(4.0, True, {})
        assert workers.take_failures() == Failures(1, 2)
    finally:
        workers.close()


def test_what_has_no_parts_is_refused(tmp_path: Path) -> None:
    check_parts(EspoConfig(objective="ospo", task="sudoku:2,code"))
    check_parts(EspoConfig(task="countdown"))
    for name in ("countdown", "sudoku:2,countdown:1"):
        with pytest.raises(UserError, match=r"--espo-objective ospo .* task countdown scores none"):
            check_parts(EspoConfig(objective="ospo", task=name))
    own = tmp_path / "own.py"
    own.write_text(
        "from megatron_espo.objectives import Objective\n"
        "from megatron_espo.objectives.ospo import Ospo\n\n"
        "class Whole(Ospo):\n    per_token = False\n\nobjective = Whole\n"
    )
    with pytest.raises(UserError, match=r"own\.py: splits advantages over tokens"):
        check_objective(EspoConfig(objective=str(own)))


def test_several_tasks_with_parts_ask_the_problems_own() -> None:
    blend = load_task("sudoku:2,code")
    example = Example("?", {"task": "sudoku", "answer": dict(PUZZLE)})
    text = PUZZLE["solution"]
    assert part_worths(blend, example, text, ALL) == part_worths(sudoku, BARE, text, ALL)

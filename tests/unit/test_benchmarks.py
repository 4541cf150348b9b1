"""The benchmarks run, and compare like with like; how fast anything is decides no test."""

import json
import os
import re
import subprocess
import sys
from itertools import groupby
from pathlib import Path

import pytest
import torch
from interpreter import python
from peer_stand_in import write_stand_in
from safetensors.torch import load_file, save_file

from benchmarks.confident import LENGTH, RUN, reward, write_data
from benchmarks.conversion import difference, hashes, shape_of
from benchmarks.measure import interleaved, peak_memory, ratios, spread
from benchmarks.peer_link import Peer, check_checkouts
from megatron_espo.errors import UserError

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def run(*arguments: str, status: int = 0) -> str:
    """Run a benchmark as a user does."""
    done = subprocess.run(
        [python(), "-W", "ignore", "-m", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=560,
        check=False,
    )
    assert done.returncode == status, done.stdout[-3000:]
    return done.stdout


def test_both_sides_give_equal_tokens_elbos_and_gradients(tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    printed = run(
        *"benchmarks.rollout_and_elbo --shape smoke --pairs 1 --threads 1 --prompt-length 8 "
        "--completion-length 16 --block-length 8 --denoising-steps 8 --head-chunk 5 --no-memory "
        "--out".split(),
        str(out),
    )
    report = json.loads(out.read_text())
    rollout, update = report["rollout"], report["update"]
    assert rollout["exact"]["equal tokens"] == 1.0
    assert rollout["exact"]["model evaluations"] == 8
    assert rollout["exact"]["tokens per evaluation"] == 2.0
    assert 0.0 < rollout["exact"]["mean confidence"] < 1.0
    # Caches change what is attended to, not how many tokens a step commits.
    for name in ("prefix cache", "dual cache"):
        assert rollout[name]["model evaluations"] == 8
    for name in ("default", "two-pass", "default, head in chunks"):
        difference = update[name]["largest difference"]
        assert 0.0 <= max(difference.values()) < 1e-5, (name, difference)
    assert update["default"]["operations allow"] > 1.0
    assert report["machine"]["threads"] == 1
    for name in (*rollout, *update):
        assert name in printed


def test_a_whole_iteration_is_the_same_on_both_sides(tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    options = "--shape smoke --pairs 1 --threads 1 --out".split()
    printed = run("benchmarks.iteration", *options, str(out))
    report = json.loads(out.read_text())
    # The benchmark itself fails where they differ; here how much, after Adam's steps.
    differences = report["largest differences"]
    assert 0.0 <= max(differences.values()) < 1e-3, differences
    assert set(differences) == {"old ELBO", "reference ELBO", "weights"}
    assert report["operations allow"] > 1.0 and "| smoke |" in printed


def test_prompts_that_are_passed_once_change_no_token() -> None:
    sizes = "--prompt 24 --completion 8 --shape smoke --pairs 1"
    printed = run("benchmarks.blocks", "prompts", *sizes.split())
    assert "equal tokens; positions passed allow " in printed
    assert float(printed.split("passed allow ")[1].split()[0]) > 1.5


def test_cut_rows_train_a_model_as_padded_ones_do(tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    options = "--shape smoke --seq-length 256 --steps 3 --batch 8 --pairs 1 --threads 1 --out"
    printed = run("benchmarks.sft_rows", *options.split(), str(out))
    report = json.loads(out.read_text())
    losses = report["losses"]
    assert report["largest difference of a loss"] < 1e-5 and "| cut" in printed
    # Three steps of gradient descent: the curve goes down on both sides.
    assert len(losses["cut"]) == 3 and losses["cut"][2] < losses["cut"][0]


def test_rounding_of_logits_is_told_from_other_rounding() -> None:
    options = "--shape smoke --completions 2 --length 16".split()
    printed = run("benchmarks.logit_rounding", *options).splitlines()
    rows = [line.split("|")[3:9] for line in printed if line.startswith(("| 1 ", "| 2 ", "| 4 "))]
    assert len(rows) == 3
    for row in rows:
        alone, unrounded, rounded, *_ = map(float, row)
        # The three are sides of one triangle, printed with two digits.
        assert 0 < alone <= 1.1 * (unrounded + rounded)
        assert rounded <= 1.1 * (alone + unrounded)


# Blocks of one step: caches change nothing, and the stand-in knows no other.
PEERS = (
    "benchmarks.peers --shape smoke --pairs 2 --threads 1 --prompt-length 8 --completion-length 16 "
    "--block-length 8 --denoising-steps 2 --threshold 1e-9 --trained"
).split()


def test_peers_take_turns_after_equal_tokens_elbos_and_gradients(tmp_path: Path) -> None:
    flags = write_stand_in(tmp_path / "peers")
    folder, out = tmp_path / "models", tmp_path / "report.json"
    run(*f"benchmarks.confident --shape smoke --threads 1 --out {folder}/smoke".split())
    printed = run(*PEERS, str(folder), *flags, "--out", str(out))
    report = json.loads(out.read_text())
    cases = report["smoke"]["cases"]
    assert len(cases) == 7
    for name, row in cases.items():
        assert f"| {name} " in printed
        seconds = row["their seconds"]["median"], row["our seconds"]["median"]
        assert min(seconds) > 0 and row["times as fast"]["median"] > 0
        assert row["weights"] == ("trained" if "threshold" in name else "random")
        # Two blocks; two draws of two sides against two sequences.
        assert row["evaluations"] == ([4, 2] if name == "ESPO update" else [2, 2])
    assert max(cases["ESPO update"]["largest difference"].values()) < 1e-5
    assert report["smoke"]["peer"]["transformers"] == "4.49.0"
    assert report["commits"].keys() == {"fast-dllm", "llada", "espo"}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"added": 1}, "error: Fast-dLLM, prefix cache: 32 of 32 tokens differ"),
        ({"scale": 1.01}, "error: ESPO: ELBOs or gradients differ ({'ELBO': "),
    ],
    ids=["rollout", "update"],
)
def test_peers_that_do_something_else_are_not_timed(
    tmp_path: Path, wrong: dict[str, float], said: str, request: pytest.FixtureRequest
) -> None:
    flags = write_stand_in(tmp_path / "peers", **wrong)
    part = request.node.callspec.id
    printed = run(*PEERS, str(tmp_path), *flags, "--only", part, status=2)
    assert said in printed and "times as fast" not in printed


def test_what_peers_lack_is_said_in_one_sentence(tmp_path: Path) -> None:
    write_stand_in(tmp_path)
    checkouts = {name: str(tmp_path / name) for name in ("Fast-dLLM", "LLaDA")}
    checkouts = {name.lower(): folder for name, folder in checkouts.items()}
    assert check_checkouts(checkouts).keys() == {"fast-dllm", "llada"}
    (tmp_path / "LLaDA/generate.py").unlink()
    with pytest.raises(UserError) as lacking:
        check_checkouts(checkouts)
    assert str(lacking.value) == (
        f"--llada {tmp_path}/LLaDA: holds no generate.py; give a checkout of "
        "github.com/ML-GSAI/LLaDA."
    )
    (tmp_path / "LLaDA/generate.py").touch()
    for own, said in (
        (sys.executable, f"{sys.executable} has transformers 5."),
        ("/no/such/python", "/no/such/python: cannot be started ("),
    ):
        with pytest.raises(UserError, match=f"--peer-python:? {re.escape(said)}") as wrong:
            Peer(own, tmp_path / "model", checkouts, 1, tmp_path / "log")
        if own == sys.executable:
            assert str(wrong.value).endswith(
                "their code needs transformers 4; install it in an environment of its own."
            )


def hold(megabytes: int):
    """Work that holds memory for a moment (at the top level: it is sent to another process)."""

    def work(small: bool) -> None:
        block = bytearray(2**20 if small else megabytes * 2**20)
        block[:: 2**10] = b"x" * len(block[:: 2**10])

    return work


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_peak_memory_is_that_of_the_work_alone() -> None:
    assert abs(peak_memory(hold, 200) / 2**20 - 200) < 20


def test_rounds_are_interleaved_and_alternate_their_order() -> None:
    calls: list[str] = []
    seconds, results = interleaved(
        {name: lambda name=name: calls.append(name) or name for name in "ab"}, 3
    )
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}
    assert results == {"a": "a", "b": "b"}


def test_ratio_is_taken_round_by_round() -> None:
    # The machine was half as fast in the second round: the ratio did not change.
    assert ratios([2.0, 4.0, 2.0], [1.0, 2.0, 1.0]) == spread([2.0])
    assert spread([3.0, 1.0, 2.0]) == spread([2.0, 1.0, 3.0])
    assert str(spread([1.0, 2.0, 4.0])) == "2.00 (1.00-4.00)"


def test_training_text_fills_prompt_and_completion_with_runs(tmp_path: Path) -> None:
    write_data(tmp_path, count=200, held_out=5)
    lengths: list[int] = []
    for name, lines in (("train", 200), ("heldout", 5)):
        records = [json.loads(x) for x in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        assert len(records) == lines
        for record in records:
            assert len(record["prompt"].encode()) == len(record["completion"].encode()) == LENGTH
            assert reward(record["prompt"], record["completion"]) == 1.0
            lengths += [
                len(list(run)) for _, run in groupby(record["prompt"] + record["completion"])
            ]
    # A run ends at each of the 255 places after the first with that chance.
    changes = len(lengths) - 205
    assert changes == pytest.approx(205 * 255 / RUN, rel=0.15)


@pytest.mark.parametrize(
    ("completion", "wanted"),
    [
        ("aaaa", 1.0),
        ("adca", 0.75),  # d and k may follow a, c and j d, n and e c
        ("akma", 0.75),  # f and m may follow k
        ("a?aa", 0.5),
        ("dddd", 1.0),
        ("bbbb", 0.75),
        ("????", 0.0),
    ],
)
def test_reward_counts_the_letters_that_the_language_allows(completion: str, wanted: float) -> None:
    assert reward("kaa", completion) == wanted


def test_a_mixture_comes_back_from_the_converter_tensor_by_tensor(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    options = f"llada2 --tiny --layers 2 --leave-free 0 --folder {folder}"
    printed = run("benchmarks.conversion", *options.split())
    shape = shape_of("llada2", 2, small=True)
    experts = shape.experts
    assert experts is not None and experts.layers == (0, 1) and shape.num_layers == 2
    # Of each layer the norms, those of heads, qkv and its projection; the first's feed-forward
    # part; router, biases, experts and the shared one of the second; embedding, norm and head.
    number = 2 * 6 + 3 + 2 + 3 * (experts.num_experts + 1) + 3
    assert f"{number} of {number} tensors equal in 1 files" in printed
    assert "| to-megatron | " in printed and "| to-hf | " in printed
    assert not folder.exists()


def test_a_tensor_that_differs_in_a_bit_in_type_or_in_place_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    tensors = {"a": torch.zeros(3, dtype=torch.bfloat16), "b": torch.ones(2, 2)}
    save_file(tensors, path)
    before = hashes(tmp_path)
    assert before.keys() == {"a", "b"} and before["b"].shape == (2, 2)
    save_file(load_file(path), path, metadata={"format": "pt"})
    assert difference(before, hashes(tmp_path)) is None
    for changed in (
        {"a": -tensors["a"]},  # a zero's sign
        {"a": tensors["a"].half()},
        {"b": tensors["b"].view(4)},
        {"c": tensors["a"].clone()},
    ):
        save_file({**tensors, **changed}, path)
        found = difference(before, hashes(tmp_path))
        assert found is not None and found.startswith(next(iter(changed)))
    save_file(tensors, tmp_path / "other.safetensors")
    assert "other.safetensors" in str(difference(before, hashes(tmp_path)))

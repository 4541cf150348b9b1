"""Runs other people's released code for benchmarks.peers: one model, JSON lines in and out.

It runs in an environment of theirs (transformers 4) and imports nothing of this project. Their
checkouts are given by path and used as they are: Fast-dLLM's modeling code loads the model, with
its samplers or LLaDA's, and ESPO's trainer gets the attributes that its loss reads, without a
dataset or an optimizer around it. Only their own calls are timed.

Requests are objects with "do" and that function's arguments; the answer is what it returns, or
{"error": one sentence}. The first line of the output says which versions are at work.
"""

import argparse
import gc
import importlib.util
import json
import os
import sys
import time
import traceback
from collections import defaultdict
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

FILES = {
    "fast-dllm": "v1/llada/generate.py",
    "llada": "generate.py",
    "espo": "espo/espo_trainer.py",
}
"""What is read of each checkout."""

SAMPLERS = {
    "none": "generate",
    "prefix": "generate_with_prefix_cache",
    "dual": "generate_with_dual_cache",
}
"""Fast-dLLM's samplers by this project's --rollout-cache."""


def load_file(name: str, checkout: str, file: str) -> ModuleType:
    """Import a file of a checkout under a name of its own (several are called generate.py)."""
    spec = importlib.util.spec_from_file_location(name, Path(checkout) / file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


class Peers:
    """Their code with one model loaded."""

    def __init__(self, model: str, checkouts: dict[str, str]) -> None:
        """Load their code, and the model once.

        Args:
            model: folder with config.json and safetensors, float32.
            checkouts: folders by their names in FILES; Fast-dLLM's must be among them.
        """
        import torch

        # Their files say "from model.modeling_llada import LLaDAModelLM".
        sys.path.insert(0, str(Path(checkouts["fast-dllm"], FILES["fast-dllm"]).parent))
        self._code = {
            name: load_file(f"peer_{index}", checkout, FILES[name])
            for index, (name, checkout) in enumerate(checkouts.items())
        }
        from model.modeling_llada import LLaDAModelLM  # type: ignore[import-not-found]

        self._model = LLaDAModelLM.from_pretrained(model, torch_dtype=torch.float32).eval()

    def rollout(
        self,
        code: str,
        prompts: list[list[int]],
        mask_token_id: int,
        completion_length: int,
        block_length: int,
        denoising_steps: int,
        cache: str = "none",
        threshold: float | None = None,
    ) -> dict[str, Any]:
        """Sample completions, greedily and in the low-confidence order.

        Args:
            code: whose sampler: "fast-dllm" or "llada".
            prompts: token ids, all of one length.
            mask_token_id: the mask token.
            completion_length: tokens of a completion.
            block_length: tokens of a block.
            denoising_steps: steps of a completion, without a threshold.
            cache: "none", "prefix" or "dual".
            threshold: Fast-dLLM's parallel decoding.

        Returns:
            "seconds", "tokens", and "evaluations" of the model.
        """
        import torch

        self._model.eval()
        settings: dict[str, Any] = {
            "steps": denoising_steps,
            "gen_length": completion_length,
            "block_length": block_length,
            "temperature": 0.0,
            "remasking": "low_confidence",
            "mask_id": mask_token_id,
        }
        sampler = getattr(self._code[code], SAMPLERS[cache])
        if code == "fast-dllm":
            settings["threshold"] = threshold
        given = torch.tensor(prompts)
        gc.collect()
        start = time.perf_counter()
        found = sampler(self._model, given, **settings)
        seconds = time.perf_counter() - start
        tokens, evaluations = found if isinstance(found, tuple) else (found, denoising_steps)
        completions = tokens[:, given.size(1) :].tolist()
        return {"seconds": seconds, "tokens": completions, "evaluations": int(evaluations)}

    def masks(self, tokens: list[list[int]], prompt_length: int, seeds: list[int]) -> Any:
        """Draw the masks of ESPO's first views: 0 and 1, ``[m, b, l]`` for m seeds.

        Args:
            tokens: prompts with their completions.
            prompt_length: tokens of a prompt.
            seeds: of each draw.
        """
        import torch

        batch = torch.tensor(tokens)
        prompt = torch.arange(batch.size(1)) < prompt_length
        masks = []
        for seed in torch.tensor(seeds):
            noisy, _ = self._code["espo"].forward_process(batch, prompt, -1, seed=seed)
            masks.append((noisy[:, prompt_length:] == -1).int().tolist())
        return masks

    def update(
        self,
        tokens: list[list[int]],
        prompt_length: int,
        mask_token_id: int,
        seeds: list[int],
        elbo_old: list[float],
        advantages: list[float],
        gradients: str | None = None,
    ) -> dict[str, Any]:
        """Compute ESPO's loss and its gradient, as a step of its trainer does.

        Args:
            tokens: prompts with their completions.
            prompt_length: tokens of a prompt.
            mask_token_id: the mask token.
            seeds: of each draw of masks.
            elbo_old: of the policy that sampled, the mean over the draws.
            advantages: of each completion.
            gradients: safetensors file for the gradients; they and the ELBOs are not timed.

        Returns:
            "seconds" of loss and backward pass, "loss", and with ``gradients`` "elbo".
        """
        import torch

        model, length = self._model.train(), len(tokens[0]) - prompt_length
        trainer = self._trainer(mask_token_id, len(seeds))
        given = torch.tensor(tokens)
        inputs = {
            "prompt_ids": given[:, :prompt_length],
            "completion_ids": given[:, prompt_length:],
            "mask_seeds": torch.tensor([[seeds, seeds]]),
            "old_per_token_logps": torch.tensor([elbo_old, elbo_old]).T,
            "advantages": torch.tensor(advantages),
        }
        gc.collect()
        start = time.perf_counter()
        model.zero_grad()
        loss = trainer.compute_loss(model, inputs)
        loss.backward()
        answer: dict[str, Any] = {"seconds": time.perf_counter() - start, "loss": loss.item()}
        if gradients is not None:
            from safetensors.torch import save_file

            found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            save_file(found, gradients)
            with torch.no_grad():
                elbo = trainer._get_elbo_mc(
                    model, given[None], length, torch.tensor([seeds]), num_mc=len(seeds)
                )
            answer["elbo"] = elbo[:, 0].tolist()
        return answer

    def _trainer(self, mask_token_id: int, num_mc: int) -> Any:
        """Make a trainer of what its loss reads: the first of two updates of a rollout."""
        trainer_class = self._code["espo"].ESPOTrainer
        trainer = object.__new__(trainer_class)
        self._model.config.name_or_path = "LLaDA"  # decides how the logits are read
        trainer.model = self._model
        trainer.processing_class = SimpleNamespace(mask_token_id=mask_token_id)
        trainer.args = SimpleNamespace(
            num_iterations=2, gradient_accumulation_steps=1, num_mc=num_mc, report_to=[]
        )
        trainer.num_iterations, trainer.num_mc, trainer._step = 2, num_mc, 1
        trainer.epsilon_low = trainer.epsilon_high = 0.2
        trainer.beta = 0.0
        trainer.accelerator = SimpleNamespace(
            gather_for_metrics=lambda value: value, is_main_process=True
        )
        trainer.control = SimpleNamespace(should_evaluate=False)
        trainer._metrics = defaultdict(lambda: defaultdict(list))
        return trainer


def refusal() -> str | None:
    """Say in one sentence why this Python cannot run their code; None: it can."""
    try:
        import transformers
    except ImportError:
        return f"{sys.executable} has no transformers; install transformers 4 in it."
    if transformers.__version__.split(".")[0] != "4":
        return (
            f"{sys.executable} has transformers {transformers.__version__}, their code needs "
            "transformers 4; install it in an environment of its own."
        )
    return None


def main() -> None:
    """Answer requests until the input ends."""
    # Their imports must find nothing of the folder that this file lies in.
    here = Path(__file__).parent.resolve()
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != here]
    # Whatever their code prints must not come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(value: Any) -> None:
        print(json.dumps(value), file=answers, flush=True)

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--threads", type=int, required=True)
    for name in FILES:
        parser.add_argument(f"--{name}")
    options = vars(parser.parse_args())
    if (reason := refusal()) is not None:
        answer({"error": reason})
        return
    try:
        import torch
        import transformers

        torch.set_num_threads(options["threads"])
        given = {name: options[name.replace("-", "_")] for name in FILES}
        peers = Peers(options["model"], {name: path for name, path in given.items() if path})
        answer({"torch": torch.__version__, "transformers": transformers.__version__})
        for line in sys.stdin:
            request = json.loads(line)
            answer(getattr(peers, request.pop("do"))(**request))
    except Exception as error:
        traceback.print_exc()
        answer({"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()

"""A model for EleutherAI's lm-evaluation-harness (lm_eval, an optional dependency).

    import lm_eval, megatron_espo
    from megatron_espo.api.harness import HarnessModel

    model = megatron_espo.load("GSAI-ML/LLaDA-8B-Instruct")
    lm_eval.simple_evaluate(model=HarnessModel(model, num_mc=128), tasks=["arc_easy"])

Requests for likelihoods get ELBOs, which are lower bounds: answers of a choice are compared with
the same kind of bound, a perplexity comes out too high.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megatron_espo.api.model import Model
from megatron_espo.data.encoding import encode, render_chat
from megatron_espo.diffusion.noise import ElboEstimator

# Settings of a request that ask for nothing else than what stands here, or are read elsewhere.
_GREEDY = {"do_sample", "temperature", "until", "max_gen_toks"}


class HarnessModel(TemplateLM):
    """Answers the harness's requests with a masked-diffusion model."""

    def __init__(
        self,
        model: Model,
        *,
        num_mc: int = 128,
        estimator: ElboEstimator = "coupled",
        batch_size: int = 32,
        seed: int = 0,
        **sampling: Any,
    ) -> None:
        """Wrap a model.

        Args:
            model: what :func:`megatron_espo.load` returns.
            num_mc: draws of the masks for each likelihood.
            estimator: see :meth:`Model.elbo`.
            batch_size: rows of a model pass, at most.
            seed: of masks and samples.
            **sampling: settings of :class:`RolloutConfig` for what is generated. A task's own
                max_gen_toks decides the length where ``completion_length`` is not given.
        """
        super().__init__()
        self.model, self.tokenizer = model, model.tokenizer
        self._scoring: dict[str, Any] = {
            "num_mc": num_mc, "estimator": estimator, "batch_size": batch_size, "seed": seed,
        }  # fmt: skip
        self._sampling: dict[str, Any] = {
            "seed": seed, "micro_batch_size": batch_size, **sampling,
        }  # fmt: skip

    @property
    def eot_token_id(self) -> int:
        """The token that ends a sequence; stands before a text without context."""
        return self.model.handle.eos_token_id

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's folder, by which the harness tells its caches apart."""
        return str(self.tokenizer.name_or_path)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Return the ids of a text; none is added."""
        return encode(self.tokenizer, string)

    def apply_chat_template(
        self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Write a conversation in the tokenizer's chat format."""
        return render_chat(self.tokenizer, chat_history, generation_header=add_generation_prompt)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """Bound the likelihood of continuations; whether they are the greedy ones is not looked at.

        Contexts that are too long lose their start.
        """
        room = self.model.max_length
        found = self.model.elbo(
            [context[max(len(context) + len(rest) - room, 0) :] for _, context, rest in requests],
            [rest for _, _, rest in requests],
            **self._scoring,
        )
        return [(value, False) for value in found.elbo.tolist()]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Bound the likelihood of whole texts, window by window."""
        pairs: list[tuple[list[int], list[int]]] = []
        sizes = []
        for request in requests:
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                # With what stands before a window's first token.
                max_seq_len=self.model.max_length - 1,
                context_len=1,
            )
            own = [make_disjoint_window(window) for window in windows]
            sizes.append(len(own))
            pairs += own
        scores = iter(self._loglikelihood_tokens([(("", ""), *pair) for pair in pairs]))
        return [sum(next(scores)[0] for _ in range(size)) for size in sizes]

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Complete contexts, up to the first of a request's stop words.

        Contexts that are too long lose their start.
        """
        texts: dict[int, str] = {}
        kinds: dict[tuple[tuple[str, Any], ...], list[int]] = {}
        for number, request in enumerate(requests):
            settings = self._settings(request.args[1])
            kinds.setdefault(tuple(sorted(settings.items())), []).append(number)
        for kind, numbers in kinds.items():
            chosen = dict(kind)
            room = self.model.max_length - chosen["completion_length"]
            prompts = [self.tok_encode(requests[number].args[0]) for number in numbers]
            kept = [ids[max(len(ids) - room, 0) :] for ids in prompts]
            texts.update(zip(numbers, self.model.generate(kept, **chosen), strict=True))
        return [
            _until(texts[number], request.args[1].get("until"))
            for number, request in enumerate(requests)
        ]

    def _settings(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Make sampling settings of those of a request.

        Raises:
            ValueError: a request asks for something that is no setting of a diffusion sampler.
        """
        if unknown := asked.keys() - _GREEDY - {"top_p", "top_k"}:
            raise ValueError(f"generation setting {min(unknown)} is not known here; leave it out.")
        settings = {
            "completion_length": min(asked.get("max_gen_toks", 256), self.model.max_length - 1)
        }
        if asked.get("do_sample") and asked.get("temperature", 1.0) > 0.0:
            drawn = {"temperature": asked.get("temperature", 1.0)}
            settings |= drawn | {k: asked[k] for k in ("top_p", "top_k") if asked.get(k)}
        return settings | self._sampling


def _until(text: str, stops: str | Sequence[str] | None) -> str:
    """Cut a text at its first stop word."""
    for stop in [stops] if isinstance(stops, str) else stops or []:
        text = text.partition(stop)[0] if stop else text
    return text

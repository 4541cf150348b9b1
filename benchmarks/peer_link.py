"""The other side of benchmarks.peers: their checkouts, their process, and the folder both read."""

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch
from megatron.core.utils import unwrap_model
from megatron.training import get_args
from megatron.training.checkpointing import save_checkpoint
from torch import Tensor

from benchmarks.measure import KEEP_MEMORY
from benchmarks.models import Shape
from benchmarks.peer_process import FILES
from megatron_espo.conversion import llada, llama
from megatron_espo.conversion.mapping import Names
from megatron_espo.conversion.verification import quiet
from megatron_espo.data.tokenizer import byte_tokenizer, save_tokenizer
from megatron_espo.errors import UserError
from megatron_espo.model.handle import DiffusionModel

ROOT = Path(__file__).parents[1]
SOURCES = {
    "fast-dllm": "github.com/NVlabs/Fast-dLLM",
    "llada": "github.com/ML-GSAI/LLaDA",
    "espo": "github.com/ML-GSAI/ESPO",
}


def check_checkouts(checkouts: dict[str, str]) -> dict[str, str]:
    """Look for the file that is used of each checkout.

    Args:
        checkouts: folders by their names in FILES.

    Returns:
        The commit of each, "unknown" where git does not say.

    Raises:
        UserError: naming the flag and the file.
    """
    commits = {}
    for name, folder in checkouts.items():
        if not Path(folder, FILES[name]).is_file():
            raise UserError(
                f"--{name} {folder}: holds no {FILES[name]}; give a checkout of {SOURCES[name]}."
            )
        command = ["git", "-C", folder, "rev-parse", "HEAD"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        commits[name] = done.stdout.strip() if done.returncode == 0 else "unknown"
    return commits


def save_random(model: DiffusionModel, mask_token_id: int, folder: Path) -> Path:
    """Write the checkpoint of a model that benchmarks.models.build_random made last.

    The mask token's row of the output head becomes zero first. With random weights it would be the
    likeliest token here and there, which their samplers would take and which ours never does; a
    trained model never predicts it.

    Args:
        model: the model; changed as said.
        mask_token_id: the mask token.
        folder: gets the checkpoint and a tokenizer beside it.

    Returns:
        The --save folder.
    """
    (chunk,) = unwrap_model(list(model.chunks))
    with torch.no_grad():
        chunk.output_layer.weight[mask_token_id].zero_()
    save_tokenizer(byte_tokenizer(), folder / "tokenizer")
    checkpoint = folder / "checkpoint"
    args = get_args()
    args.save, args.iteration = str(checkpoint), 1
    with quiet():
        save_checkpoint(1, list(model.chunks), None, None, 0)
    return checkpoint


def export(checkpoint: Path, out: Path) -> None:
    """Write a checkpoint as the LLaDA folder that their code loads, in a process of its own.

    Args:
        checkpoint: --save folder; the tokenizer lies beside it.
        out: folder to make.

    Raises:
        UserError: the converter's last words.
    """
    python = os.environ.get("PYTHON_EXEC", sys.executable)  # as torchrun does
    command = [python, "-W", "ignore", str(ROOT / "tools/convert_hf.py"), "to-hf"]
    command += ["--megatron", str(checkpoint), "--family", "llada", "--dtype", "float32"]
    command += ["--tokenizer-model", str(checkpoint.parent / "tokenizer"), "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = (done.stderr.strip() or "the converter failed").splitlines()[-1]
        raise UserError(said.removeprefix("error: "))


def published_gradients(gradients: dict[str, Tensor], shape: Shape) -> dict[str, Tensor]:
    """Rename tensors of LlamaForCausalLM as LLaDA's published code calls them.

    Args:
        gradients: by the names that benchmarks.models.llama_weights gives.
        shape: the model.

    Returns:
        The same tensors.
    """
    ours, theirs = (_tensor_names(each.NAMES, shape.num_layers) for each in (llama, llada))
    return {theirs[ours.index(name)]: value for name, value in gradients.items()}


def _tensor_names(names: Names, num_layers: int) -> list[str]:
    """List a family's weights, in one order for all families."""
    parts = (
        names.attention_norm,
        names.query,
        names.key,
        names.value,
        names.attention_output,
        names.ffn_norm,
        names.gate,
        names.up,
        names.down,
    )
    listed = [names.embedding, names.final_norm, names.head]
    listed += [
        names.layer.format(layer=layer) + part for layer in range(num_layers) for part in parts
    ]
    return [f"{name}.weight" for name in listed]


class Peer:
    """Their process: started once, it keeps its model and answers one request after the other."""

    def __init__(
        self, python: str, model: Path, checkouts: dict[str, str], threads: int, log: Path
    ) -> None:
        """Start it and wait until the model is loaded.

        Args:
            python: of their environment.
            model: the folder that :func:`export` made.
            checkouts: folders by their names in FILES.
            threads: of the process.
            log: gets what it prints.

        Raises:
            UserError: the Python does not start or lacks what is needed.
        """
        command = [python, "-W", "ignore", str(ROOT / "benchmarks/peer_process.py")]
        command += ["--model", str(model), "--threads", str(threads)]
        for name, folder in checkouts.items():
            command += [f"--{name}", str(Path(folder).absolute())]
        environment = {**os.environ, **KEEP_MEMORY, "OMP_NUM_THREADS": str(threads)}
        environment.pop("PYTHONPATH", None)  # nothing of this project
        self._log = log
        try:
            with log.open("w") as errors:
                self._process = subprocess.Popen(
                    command,
                    env=environment,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                )
        except OSError as error:
            raise UserError(f"--peer-python {python}: cannot be started ({error}).") from error
        try:
            self.versions: dict[str, str] = self._answer()
        except UserError:
            self.close()
            raise

    def ask(self, do: str, **request: Any) -> Any:
        """Let it do something.

        Args:
            do: the function of benchmarks.peer_process.Peers.
            **request: its arguments.

        Returns:
            What it returned.

        Raises:
            UserError: what went wrong over there.
        """
        stdin: IO[str] | None = self._process.stdin
        assert stdin is not None
        with suppress(OSError):  # of a process that has ended: the answer says why
            stdin.write(json.dumps({"do": do, **request}) + "\n")
            stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            last = (self._log.read_text().strip() or "it says nothing").splitlines()[-1]
            raise UserError(f"--peer-python: the process of the peers ended: {last}")
        found = json.loads(line)
        if isinstance(found, dict) and "error" in found:
            raise UserError(f"--peer-python: {found['error']}")
        return found

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(OSError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def __enter__(self) -> "Peer":
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the process."""
        self.close()

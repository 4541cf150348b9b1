"""Draws an ESPO run into a PNG, or compares several; prints the table of a demo's accuracies.

megatron-espo plot runs/sudoku-seed1 --title "ESPO on sudoku"
megatron-espo plot runs/lr3e-6 runs/lr1e-5 --out compared.png
megatron-espo plot runs/sudoku-seed* --demo --out demo.png
"""

import json
from collections.abc import Sequence
from pathlib import Path

from megatron_espo.command_line import Parser
from megatron_espo.errors import UserError
from megatron_espo.monitor.curves import find_events, read_scalars, run_names
from megatron_espo.monitor.pictures import draw_demo, draw_runs

_ROWS = {
    "base": "before (fine-tuned base)",
    "espo": "after ESPO",
    "hf": "the same, from Hugging Face",
    "control": "control (more SFT)",
}


def read_evaluation(log: Path) -> dict[str, float] | None:
    """Find the JSON object that tools/evaluate.py printed, or None."""
    if not log.is_file():
        return None
    lines = [line for line in log.read_text().splitlines() if line.startswith('{"accuracy"')]
    return json.loads(lines[-1]) if lines else None


def main(argv: Sequence[str]) -> None:
    """Draw and print."""
    parser = Parser(description=__doc__)
    parser.add_argument("run", type=Path, nargs="+", help="folders of runs or of their events")
    parser.add_argument("--title", help="heading (default: the folders' names)")
    parser.add_argument("--out", type=Path, help="PNG to write (default: curves.png in the run)")
    parser.add_argument(
        "--demo",
        action="store_true",
        help="of demos: what is solved before, after and by the control, and on the way",
    )
    options = parser.parse_args(argv)
    runs = {
        name: read_scalars(find_events(folder))
        for name, folder in zip(run_names(options.run), options.run, strict=True)
    }
    target = options.out or options.run[0] / "curves.png"
    if options.demo:
        draw_demo(
            {name: _tested(folder) for name, folder in zip(runs, options.run, strict=True)},
            runs,
            target,
        )
    else:
        draw_runs(runs, options.title or ", ".join(runs), target)
    for folder in options.run:
        print_table(folder)


def _tested(folder: Path) -> dict[str, float]:
    """Collect what a demo's evaluations found, for :func:`draw_demo`.

    Raises:
        UserError: the folder is not that of a demo that came to its end.
    """
    found = {
        label: read_evaluation(folder / f"test-{name}.log")
        for name, label in (("base", "before"), ("espo", "after ESPO"), ("control", "control"))
    }
    accuracies = {label: row["accuracy"] for label, row in found.items() if row}
    if "after ESPO" not in accuracies:
        raise UserError(f"{folder}: --demo wants the folder of a demo that has been tested.")
    return accuracies


def print_table(folder: Path) -> None:
    """Print what the evaluations of a demo found, and keep it in results.json."""
    results = {name: read_evaluation(folder / f"test-{name}.log") for name in _ROWS}
    if not any(results.values()):
        return
    print(f"\n{'held-out test split, greedy':30}  exact accuracy  mean reward  problems")
    for name, label in _ROWS.items():
        row = results[name]
        if row is not None:
            print(
                f"{label:30}  {100 * row['accuracy']:13.1f}%  {row['reward']:11.3f}  "
                f"{row['num_problems']:8d}"
            )
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")

"""Draws an ESPO run into a PNG and, beside a demo's test logs, prints the table of accuracies.

python tools/plot_run.py runs/sudoku-seed1 --title "ESPO on sudoku"
"""

import argparse
import json
import sys
from pathlib import Path

from megatron_espo.monitor.curves import draw_run, read_scalars

_ROWS = {"base": "before (fine-tuned base)", "espo": "after ESPO", "control": "control (more SFT)"}


def read_evaluation(log: Path) -> dict[str, float] | None:
    """Find the JSON object that tools/evaluate.py printed, or None."""
    if not log.is_file():
        return None
    lines = [line for line in log.read_text().splitlines() if line.startswith('{"accuracy"')]
    return json.loads(lines[-1]) if lines else None


def main() -> None:
    """Draw and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--title", default="ESPO")
    parser.add_argument("--out", type=Path, help="PNG to write (default: curves.png in the run)")
    options = parser.parse_args()
    folder = options.run / "tensorboard" / "espo"
    draw_run(
        read_scalars(folder if folder.is_dir() else options.run),
        options.title,
        options.out or options.run / "curves.png",
    )
    results = {name: read_evaluation(options.run / f"test-{name}.log") for name in _ROWS}
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
    (options.run / "results.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

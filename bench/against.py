"""How fast this tree is against another revision of it: a command is run there and here in turn.

    python bench/against.py REV [--figure NAME] [--times 5] -- COMMAND

    python bench/against.py v0.1 --figure ms_per_frame -- \\
        python bench/ms_per_frame.py --frames 8 --out {}/result.json
    python bench/against.py HEAD~1 --figure frames_per_second -- \\
        python train.py --preset tiny --no-shared-fakes --total-kframes 2 --out {}/run

REV is checked out in a temporary folder beside this one. `{}` in the command is an empty folder,
made anew for each run. What is compared is the last number called NAME in the JSON files that the
command leaves there; without --figure it is the seconds that the command takes. Each round runs the
command at both revisions, the first one last in the next round, so that a machine whose clock
wanders slows both alike. A ratio is of one round; more than 1 means that this tree is faster.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def measure(tree, command, figure):
    """The figure of one run of the command in a tree. Ends the program if the command fails."""
    with tempfile.TemporaryDirectory() as folder:
        words = [word.replace("{}", folder) for word in command]
        # The tree's own packages, wherever the installed ones point.
        environment = os.environ | {"PYTHONPATH": str(tree)}
        started = time.perf_counter()
        done = subprocess.run(words, cwd=tree, env=environment, capture_output=True, text=True)
        seconds = time.perf_counter() - started
        if done.returncode:
            sys.exit(f"against.py: in {tree} the command failed:\n{done.stdout}{done.stderr}")
        return seconds if figure is None else last_number(folder, figure)


def last_number(folder, name):
    """The last number called `name` in the newest JSON file below a folder that has one."""
    files = [path for path in Path(folder).rglob("*") if path.suffix in (".json", ".jsonl")]
    pattern = re.compile(rf'"{re.escape(name)}": *(-?\d[-+.\deE]*)')
    for path in sorted(files, key=lambda path: path.stat().st_mtime, reverse=True):
        if numbers := pattern.findall(path.read_text()):
            return float(numbers[-1])
    sys.exit(f"against.py: the command left no JSON file with a number called {name} in {{}}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("revision", metavar="REV", help="a commit, tag or branch")
    parser.add_argument("--figure", metavar="NAME", help="default: the seconds of the command")
    parser.add_argument("--times", type=int, default=5, help="rounds (default 5)")
    parser.add_argument("command", nargs="+", metavar="-- COMMAND")
    args = parser.parse_args()
    git = ["git", "-C", str(ROOT), "worktree"]
    with tempfile.TemporaryDirectory() as folder:
        there = Path(folder, "tree")
        added = subprocess.run(
            [*git, "add", "--quiet", "--detach", str(there), args.revision], capture_output=True
        )
        if added.returncode:
            sys.exit(f"against.py: {added.stderr.decode().strip()}")
        try:
            compare(there, args)
        finally:
            subprocess.run([*git, "remove", "--force", str(there)], check=True)


def compare(there, args):
    """Runs all rounds, and prints each ratio, their median and their range."""
    name, ratios = args.figure or "seconds", []
    for round_ in range(args.times):
        trees = [there, ROOT] if round_ % 2 == 0 else [ROOT, there]
        figures = {tree: measure(tree, args.command, args.figure) for tree in trees}
        before, now = figures[there], figures[ROOT]
        ratios.append(now / before if name.endswith("per_second") else before / now)
        print(
            f"{name}: {args.revision} {before:.4g}, here {now:.4g}: {ratios[-1]:.3f} x", flush=True
        )
    print(
        f"{statistics.median(ratios):.3f} x as fast as {args.revision} (median of {len(ratios)}, "
        f"from {min(ratios):.3f} to {max(ratios):.3f})"
    )


if __name__ == "__main__":
    main()

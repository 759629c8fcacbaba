"""python -m kernels: prints the tables of choices that are kept on this machine, one for each
device and version. Each line is an op with its shapes and one implementation of it: its time, its
relative error against plain PyTorch, and * if it is the one in use, or why it was dropped.
"""

import argparse
import json

from kernels.choose import cache_folder


def main():
    argparse.ArgumentParser(prog="python -m kernels", description=__doc__).parse_args()
    tables = sorted(cache_folder().glob("*.json"))
    if not tables:
        print(
            f"{cache_folder()} is empty: train.py and sample.py fill it at their first run on a GPU"
        )
    for path in tables:
        try:
            saved = json.loads(path.read_text())
            lines = [line for text, row in saved["rows"].items() for line in lines_of(text, row)]
            print(f"{path}\n  {', '.join(f'{key} {value}' for key, value in saved['key'].items())}")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as reason:
            print(f"{path} cannot be read: {reason}")
            continue
        print("\n".join(lines))


def lines_of(text, row):
    """The lines of one op: its name and shapes, then one line for each implementation."""
    yield f"  {text}"
    for name, ms in sorted(row["ms"].items(), key=lambda item: item[1] or 0):
        mark = "*" if name == row.get("chosen") else " "
        time = "not timed" if ms is None else f"{ms:.4f} ms"
        error = row["error"].get(name)
        yield f"  {mark} {name:24}{time:>14}" + ("" if error is None else f"   error {error:.1e}")
    for name, reason in row["dropped"].items():
        yield f"    {name:24}{'dropped':>14}   {reason}"


if __name__ == "__main__":
    main()

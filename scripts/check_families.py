"""What docs/backbones.md says of each family, measured on tiny models. Restartable.

    check_families.py CELLS.json                    run the cells that CELLS.json does not have, and print the table
    check_families.py CELLS.json --only bert resume run one cell

A result is in the file as soon as its cell ends. A cell that fails is run again.
"""

import json
import sys
import tempfile
import traceback
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from gritlm.models.families import FAMILIES, is_encoder  # noqa: E402

CELLS = ("probe", "packed = padded", "1 rank", "2 ranks", "resume", "served")


def run_cell(family: str, cell: str) -> str:
    """The result of one cell: a number, or "ok". Any failure is an exception."""
    from family_checks import packed_and_padded, probed, resumed, served, verified

    with tempfile.TemporaryDirectory() as folder:
        check = {"probe": probed, "packed = padded": packed_and_padded, "resume": resumed, "served": served}
        if cell in check:
            return check[cell](family, Path(folder))
        return verified(family, int(cell[0]))


def as_table(cells: dict[str, str]) -> str:
    head = f"| family | {' | '.join(CELLS)} |\n|{'---|' * (len(CELLS) + 1)}"
    kind = {name: f"`{name}`{' (encoder)' if is_encoder(name) else ''}" for name in FAMILIES}
    rows = [f"| {kind[f]} | {' | '.join(cells.get(f'{f} {cell}', 'not run') for cell in CELLS)} |" for f in FAMILIES]
    return "\n".join([head, *rows])


def main(path: Path, only: tuple[str, str] | None) -> int:
    cells = json.loads(path.read_text()) if path.exists() else {}
    wanted = [only] if only else [(family, cell) for family in FAMILIES for cell in CELLS]
    for family, cell in wanted:
        if f"{family} {cell}" in cells and not only:
            continue
        try:
            cells[f"{family} {cell}"] = result = run_cell(family, cell)
            path.write_text(json.dumps(cells, indent=1))
        except Exception:
            traceback.print_exc()
            result = "FAILED"
        print("cell:", family, cell, result, flush=True)
    print(as_table(cells))
    return int(any(f"{family} {cell}" not in cells for family, cell in wanted))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), tuple(sys.argv[3:5]) if sys.argv[2:3] == ["--only"] else None))

"""Print `names=[...]`: the distributions that the commits since a base touch.

A change of the thin library, of the root's settings or of the workflows touches all of them; so does a base that git
does not know (a first push).
"""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def names(changed: list[str] | None) -> list[str]:
    """The distributions touched by the changed paths; all of them for None."""
    projects = {
        path.parent.relative_to(ROOT).as_posix(): tomllib.loads(path.read_text(encoding="utf-8"))["project"]["name"]
        for path in [ROOT / "shared/pyproject.toml", *sorted(ROOT.glob("packages/*/pyproject.toml"))]
    }
    own = {name for path in changed or [] for folder, name in projects.items() if path.startswith(f"{folder}/")}
    common = {"pyproject.toml", "noxfile.py"}
    everything = changed is None or any(path in common or path.startswith(("shared/", ".github/")) for path in changed)
    return [name for name in projects.values() if everything or name in own]


if __name__ == "__main__":
    diff = subprocess.run(["git", "diff", "--name-only", f"{sys.argv[1]}...HEAD"], capture_output=True, text=True)
    print("names=" + json.dumps(names(diff.stdout.splitlines() if diff.returncode == 0 else None)))

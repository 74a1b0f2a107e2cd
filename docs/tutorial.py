"""Run the commands of a package's tutorial and put down what they print: `python docs/tutorial.py pckd`.

In `docs/tutorials/<distribution>.md` each block ```` ```console ```` holds commands, each after `$ `; what follows a command
is replaced by what it printed. Commands run one after another in one new folder, through `sh`. Of a long output the first
and the last lines are kept. A block ```` ```python ```` after a comment `<!-- file: make.py -->` is a file of that folder. A
comment `<!-- picture: run/figures/a.png -->` before a picture copies that file of the folder over the picture's.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

TUTORIALS = Path(__file__).parent / "tutorials"
SHOWN = 24
"""Lines of an output that are kept."""


def shortened(text: str) -> list[str]:
    """An output's lines: no more than are shown, none with trailing spaces, progress as it stood last."""
    lines = [line.split("\r")[-1].rstrip() for line in text.splitlines()]
    lines = [line for line in lines if line]
    if len(lines) > SHOWN:
        return [*lines[: SHOWN // 2], "...", *lines[-SHOWN // 2 :]]
    return lines


def run(page: Path, folder: Path) -> str:
    """The page with the outputs and the pictures of a run in the folder."""

    def block(match: re.Match[str]) -> str:
        lines: list[str] = []
        for command in re.findall(r"^\$ ((?:.*\\\n)*.*)$", match[1], re.MULTILINE):
            sys.stderr.write(f"$ {command}\n")
            done = subprocess.run(
                ["/bin/sh", "-c", command], cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
            if done.returncode:
                raise SystemExit(f"{page.name}: exit code {done.returncode} of {command}\n{done.stdout}")
            lines += [f"$ {command}", *shortened(done.stdout)]
        return "```console\n" + "\n".join(lines) + "\n```"

    def picture(match: re.Match[str]) -> str:
        shutil.copy(folder / match[1], page.parent / match[2])
        return match[0]

    text = page.read_text(encoding="utf-8")
    for name, code in re.findall(r"<!-- file: (\S+) -->\s*```python\n(.*?)```", text, re.DOTALL):
        (folder / name).write_text(code, encoding="utf-8")
    text = re.sub(r"```console\n(.*?)\n```", block, text, flags=re.DOTALL)
    return re.sub(r"<!-- picture: (\S+) -->\s*!\[[^\]]*\]\(([^)]+)\)", picture, text)


def main(names: list[str]) -> int:
    """Each tutorial named, or all."""
    for page in sorted(TUTORIALS.glob("*.md")):
        if not names or page.stem in names:
            with tempfile.TemporaryDirectory(prefix="tutorial-") as folder:
                text = run(page, Path(folder))
            page.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The site: `nox -s docs`. Pages of READMEs and of the API are written here for every distribution that is found."""

import dataclasses
import importlib
import inspect
import re
import shutil
import tomllib
from pathlib import Path

from tenfold.cli import _helps
from tenfold.config import Settings

ROOT = Path(__file__).parents[1]
AUTO = Path(__file__).parent / "auto"

project, author, copyright = "Tenfold", "The Tenfold developers", "The Tenfold developers"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_design"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "Tenfold"
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4
myst_links_external_new_tab = True
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
suppress_warnings = ["ref.python"]  # an attribute has the name of other classes' attributes
maximum_signature_line_length = 100
autodoc_default_options = {
    "exclude-members": "set_fit_request, set_predict_request, set_score_request"
}  # scikit-learn's
autodoc_inherit_docstrings = False
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # attributes are documented once, in the class


def distributions() -> dict[str, tuple[str, Path]]:
    """Import name and folder of each distribution by its name."""
    found = {}
    for file in [ROOT / "shared/pyproject.toml", *sorted(ROOT.glob("packages/*/pyproject.toml"))]:
        name = tomllib.loads(file.read_text(encoding="utf-8"))["project"]["name"]
        found[name] = (name if file.parent.name == "shared" else file.parent.name, file.parent)
    return found


def readme_page(name: str, folder: Path) -> str:
    """The README as a page of the site: links and pictures lead from here."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    text = text.replace("](../../docs/images/", "](../images/").replace("](../../docs/", "](../")
    text = re.sub(r"\]\(\.\./(\w+)/README\.md", lambda m: f"]({m[1]}.md", text)
    text = re.sub(r"\]\((?:\.\./)*packages/(\w+)/README\.md", lambda m: f"]({m[1]}.md", text)
    own = [
        f"{title} <../{file.relative_to(Path(__file__).parent).with_suffix('').as_posix()}>"
        for title, file in pages_of(name).items()
    ]
    import_name = name if name == "tenfold" else folder.name
    own += [f"settings <{import_name}-settings>"] if name != "tenfold" else []
    tree = ["```{toctree}", ":hidden:", "", *own, f"API <{import_name}-api>", "```", ""]
    return "\n".join([text, *tree])


def pages_of(name: str) -> dict[str, Path]:
    """The hand-written pages of a distribution, by their titles in the tree."""
    folder = Path(__file__).parent
    titles = {"tutorial": f"tutorials/{name}.md", "method and measurements": f"{name}.md"}
    found = {title: folder / file for title, file in titles.items() if (folder / file).exists()}
    others = {file.stem.removeprefix(f"{name}-").replace("-", " "): file for file in folder.glob(f"{name}-*.md")}
    return found | others


def api_page(name: str, import_name: str) -> str:
    """The public names in the order of the alphabet, after the order in which to read the method."""
    module = importlib.import_module(import_name)
    lines = [
        f"# API of `{name}`",
        "",
        "```{eval-rst}",
        f".. automodule:: {import_name}",
        "",
        f".. currentmodule:: {import_name}",
        "",
    ]
    names = module.__all__ if import_name != "tenfold" else []
    for public in sorted((each for each in names if each != "__version__"), key=str.lower):
        value = getattr(module, public)
        kind = "class" if inspect.isclass(value) else "function" if callable(value) else "data"
        lines += [f".. auto{kind}:: {public}"]
        if kind == "class":
            lines += ["   :members:"]
        lines += [""]
    if import_name == "tenfold":
        for file in sorted((ROOT / "shared/src/tenfold").glob("[!_]*.py")):
            lines += [f".. automodule:: tenfold.{file.stem}", "   :members:", ""]
    return "\n".join([*lines, "```", ""])


def settings_page(name: str, import_name: str) -> str:
    """Every setting with its default and its meaning, which says where a value comes from."""
    config = importlib.import_module(f"{import_name}.config")
    lines = [
        f"# Settings of `{name}`",
        "",
        f"Every field of `{import_name}.config`, by class: its default, and what it means. Where a default is the paper's or",
        f"the authors' code's, its text or [the table of both](../{name}.md) says so; the others are ours.",
        "",
    ]
    for kind in vars(config).values():
        if not (inspect.isclass(kind) and issubclass(kind, Settings) and kind.__module__ == config.__name__):
            continue
        own = {field.name: field for field in dataclasses.fields(kind)}
        helps = dict(_helps(kind))
        rows = []
        for field in own.values():
            if field.default is not dataclasses.MISSING:
                default = repr(field.default)
            elif field.default_factory is not dataclasses.MISSING:
                made = field.default_factory()
                default = type(made).__name__ if dataclasses.is_dataclass(made) else repr(made)
            else:
                default = "needed"
            text = " ".join(helps.get(field.name, "").split()).replace("|", "\\|").replace("<", "&lt;")
            rows.append(f"| `{field.name}` | `{default}` | {text} |")
        if rows:
            about = (kind.__doc__ or "").strip().splitlines()[0]
            lines += [f"## {kind.__name__}", "", about, "", "| field | default | meaning |", "|---|---|---|", *rows, ""]
    return "\n".join(lines)


def papers_page() -> str:
    """What to cite, and where each value of a method is compared with the paper's and the authors' code's."""
    lines = [
        "# Papers",
        "",
        "What to cite, and where our values stand beside the paper's and the authors' code's. Formulas, numbers and names come",
        "from the papers; sentences and code do not.",
        "",
    ]
    for name, (import_name, folder) in distributions().items():
        if folder.parent.name != "packages":
            continue
        _, _, cite = (folder / "README.md").read_text(encoding="utf-8").partition("\n## Cite\n")
        cite = cite.partition("\n## ")[0].strip()
        links = f"[paper, authors' code, ours](../{name}.md) · [every setting]({import_name}-settings.md)"
        lines += [f"## {name}", "", links, "", cite, ""]
    return "\n".join(lines)


def recipes_page() -> str:
    """The recipes of all packages, as they are: the comment says what it is for and what to give."""
    lines = [
        "# Recipes",
        "",
        "Settings of whole runs, taken by `--config recipe:NAME`. Options on the command line win.",
        "",
    ]
    for name, (import_name, folder) in distributions().items():
        files = sorted((folder / "src" / import_name / "recipes").glob("*.yaml"))
        lines += [f"## {name}", ""] if files else []
        for file in files:
            about, settings = re.fullmatch(
                r"((?:#[^\n]*\n)*)(.*)", file.read_text(encoding="utf-8"), re.DOTALL
            ).groups()
            lines += [f"### {file.stem}", "", *(line.removeprefix("#").strip() for line in about.splitlines()), ""]
            lines += ["```yaml", settings.strip(), "```", ""]
    return "\n".join(lines)


def write_pages() -> None:
    """Pages of the README, the API and the settings of each distribution, of papers and of recipes, below `docs/auto`."""
    shutil.rmtree(AUTO, ignore_errors=True)
    AUTO.mkdir()
    pages = {"papers": papers_page(), "recipes": recipes_page()}
    for name, (import_name, folder) in distributions().items():
        pages |= {import_name: readme_page(name, folder), f"{import_name}-api": api_page(name, import_name)}
        if folder.parent.name == "packages":
            pages[f"{import_name}-settings"] = settings_page(name, import_name)
    for page, text in pages.items():
        (AUTO / f"{page}.md").write_text(text, encoding="utf-8")


def links_of_the_site(app, name, source):
    """Links of the hand-written pages to READMEs lead to the READMEs' pages."""
    if "/" not in name:
        source[0] = re.sub(r"\]\(\.\./packages/(\w+)/README\.md", lambda m: f"](auto/{m[1]}.md", source[0])
        source[0] = source[0].replace("](../shared/README.md", "](auto/tenfold.md")


def formulas(app, what, name, obj, options, lines):
    """Indented paragraphs and tables of a docstring are shown as they are written; a bar is no substitution elsewhere."""
    out, literal = [], None  # the indent of the literal block that is open
    for line in lines:
        indent, text = len(line) - len(line.lstrip()), line.strip()
        if literal is not None and text and indent < literal:
            literal = None
        if literal is None and text and not (out and out[-1].strip()):
            previous = next((each for each in reversed(out) if each.strip()), "")
            deeper = indent - (len(previous) - len(previous.lstrip()))
            opened = previous.strip() == "::" or previous.rstrip().endswith("::")
            if opened and deeper > 0:
                literal = indent
            elif text.startswith("|") or (deeper >= 4 and previous and not text.startswith((":", "*", "-", ".."))):
                literal = indent
                out += [" " * (indent - (0 if text.startswith("|") else 4)) + "::", ""]
        if literal is None:
            out.append(line.replace("|", "\\|"))
        else:
            out.append("    " + line if text.startswith("|") else line)
    lines[:] = out


def setup(app):
    """What Sphinx calls first."""
    write_pages()
    app.connect("source-read", links_of_the_site)
    app.connect("autodoc-process-docstring", formulas)

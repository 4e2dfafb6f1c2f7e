"""Adds files outside `docs/` to the site as pages, and adapts their links."""

import re
from pathlib import Path

from mkdocs.structure.files import File

PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "benchmarks.md",
}


def on_files(files, config):
    for name, page in PAGES.items():
        content = (Path(config.docs_dir).parent / name).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=content))
    for path in sorted((Path(config.docs_dir).parent / "examples").glob("*.[ip]*")):
        content = path.read_bytes()
        files.append(File.generated(config, f"examples/{path.name}", content=content))
    return files


def on_page_markdown(markdown, **_):
    markdown = re.sub(r"\]\((\.\./)?(docs/)?", "](", markdown)
    for name, page in PAGES.items():
        markdown = markdown.replace(f"]({name}", f"]({page}")
    return markdown
